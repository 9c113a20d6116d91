"""Sampling with transformers' own loop and caches, for models that the engine would not serve exactly.

Sliding windows, recurrent states, embeddings that follow the length, code of a repository: what these keep between
tokens is theirs to know. Rows of one batch have equally long prompts, so nothing is padded. Every row carries its
prompt, and one that ends waits for the others.

Shapes: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prefsel.generate.cohort import Row
from prefsel.generate.draw import Sampling, draw
from prefsel.models.architecture import model_shape, unwrapped
from prefsel.models.logps import model_device
from prefsel.models.rotary import reset

SINGLE = ("rwkv",)
"""Model types whose rows transformers mixes: RWKV adds states [B, D] to tokens [B, 1, D], of which every row gets all.
Three equal rows answered otherwise than one alone, from the second token on."""


def run(
    model: nn.Module,
    stops: Sequence[int],
    prompts: Sequence[list[int]],
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    most_rows: int,
    token_budget: int,
) -> dict[str, float]:
    """Fill every row.

    Args:
        model: In evaluation mode.
        stops: Tokens that end a response.
        prompts: Their tokens.
        rows: Empty ones; `Row.prompt` is a place in `prompts`.
        sampling: How tokens are drawn.
        most_rows: Of a batch.
        token_budget: Of a batch, prompts and responses; a single row may take more.

    Returns:
        What `Generator.counters` counts of a pass.
    """
    counters: dict[str, float] = defaultdict(float)
    shape = model_shape(model)
    most_rows = 1 if unwrapped(model).config.model_type in SINGLE else most_rows
    longest_first = sorted(rows, key=lambda row: -len(prompts[row.prompt]))
    for length, group in groupby(longest_first, key=lambda row: len(prompts[row.prompt])):
        equal = list(group)
        size = max(1, min(most_rows, token_budget // (length + sampling.max_new_tokens)))
        for start in range(0, len(equal), size):
            batch = equal[start : start + size]
            steps = _run_batch(model, stops, [prompts[row.prompt] for row in batch], batch, sampling)
            read = len(batch) * (length + steps - 1)
            counters["prefill_tokens"] += len(batch) * length
            counters["rows_decoded"] += len(batch) * steps
            counters["steps"] += steps - 1
            counters["flops_model"] += shape.flops(
                trunk_tokens=read, head_rows=len(batch) * steps, attention_area=read * (length + steps) / 2
            )
    return counters


def _run_batch(
    model: nn.Module, stops: Sequence[int], prompts: list[list[int]], rows: Sequence[Row], sampling: Sampling
) -> int:
    """One call of `generate`; returns how many tokens were drawn for every row."""
    draws = _Draws(rows, stops, sampling)
    ids_BT = torch.tensor(prompts, device=model_device(model))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=draws.filler,
    )
    reset(model)  # rotary embeddings that remember the longest sequence they have met
    with _plain_settings(model):
        model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=settings,
            logits_processor=LogitsProcessorList([draws]),
        )
    reset(model)
    return draws.steps


class _Draws(LogitsProcessor):
    """Leaves of the logits one token a row: the one that the row's random number draws."""

    def __init__(self, rows: Sequence[Row], stops: Sequence[int], sampling: Sampling) -> None:
        self.rows, self.stops, self.sampling, self.steps = rows, stops, sampling, 0
        self.filler = stops[0] if stops else 0
        """What rows that have ended go on with."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As transformers calls it: tokens so far, [B, T], and logits, [B, V]."""
        self.steps += 1
        running = [number for number, row in enumerate(self.rows) if not row.stop]
        next_B = [self.filler] * len(self.rows)
        for number, token in zip(running, draw([self.rows[i] for i in running], scores[running], self.sampling)):
            self.rows[number].take(token, self.stops, self.sampling.max_new_tokens)
            next_B[number] = self.filler if token < 0 else token
        chosen_B1 = torch.tensor(next_B, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B1, 0.0)


@contextmanager
def _plain_settings(model: nn.Module) -> Iterator[None]:
    """Hide the model's generation settings: transformers completes those of a call with them."""
    owners: list[Any] = list({id(one): one for one in (model, unwrapped(model))}.values())
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, settings in zip(owners, before):
            owner.generation_config = settings
