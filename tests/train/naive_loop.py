"""Textbook training: no packing, no DeepSpeed, one sequence at a time, the whole batch in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefsel.train.deepspeed_config import lr_factor


@dataclass(frozen=True)
class NaiveRun:
    """What is left after the last step."""

    losses: list[float]
    norms: list[float]
    """Of the gradient, before clipping."""
    model: torch.nn.Module
    optimizer: torch.optim.AdamW


def naive_training(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batches: Iterable[Iterable[int]],
    *,
    output: Callable[..., torch.Tensor],
    loss: Callable[[dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor],
    learning_rate: float,
    num_warmup_steps: int,
    weight_decay: float = 0.0,
) -> NaiveRun:
    """AdamW on the mean loss of each batch of rows, clipped at 1, with the linear and cosine schedule.

    `output` is (model, tokenizer, prompt, completion) → number; `loss` is (row, number of chosen, of rejected) → loss.
    """
    spared = {name for name, _ in model.named_parameters() if "norm" in name or name.endswith("bias")}
    groups = [
        {"params": [weight for name, weight in model.named_parameters() if name not in spared]},
        {"params": [weight for name, weight in model.named_parameters() if name in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    steps, losses, norms = [list(batch) for batch in batches], [], []
    for step, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * lr_factor(
                step, num_steps=len(steps), num_warmup_steps=num_warmup_steps, min_ratio=0.0
            )
        found = []
        for row in (rows[i] for i in batch):
            sides = (output(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
            found.append(loss(row, *sides))
        mean = torch.stack(found).mean()
        optimizer.zero_grad()
        mean.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(mean.item())
    return NaiveRun(losses, norms, model, optimizer)
