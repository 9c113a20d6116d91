"""Textbook preference training: no packing, no DeepSpeed, one sequence at a time, the whole batch in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from tiny_policy import TinyRun, naive_logps
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.train.deepspeed_config import lr_factor

LossOfPair = Callable[[dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor]
"""(row of the table, log-prob of chosen, log-prob of rejected) → loss."""


@dataclass(frozen=True)
class NaiveRun:
    """What is left after the last step."""

    losses: list[float]
    norms: list[float]
    """Of the gradient, before clipping."""
    model: torch.nn.Module
    optimizer: torch.optim.AdamW


def naive_training(
    tiny_run: TinyRun,
    table: pa.Table,
    loss_of: LossOfPair,
    batches: Iterable[Iterable[int]],
    *,
    learning_rate: float,
    num_warmup_steps: int,
) -> NaiveRun:
    """AdamW on the mean loss of each batch of rows, clipped at 1, with the linear and cosine schedule."""
    model = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    rows, steps, losses, norms = table.to_pylist(), [list(batch) for batch in batches], [], []
    for step, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * lr_factor(
                step, num_steps=len(steps), num_warmup_steps=num_warmup_steps, min_ratio=0.0
            )
        found = []
        for row in (rows[i] for i in batch):
            sides = (naive_logps(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
            found.append(loss_of(row, *sides))
        loss = torch.stack(found).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return NaiveRun(losses, norms, model, optimizer)
