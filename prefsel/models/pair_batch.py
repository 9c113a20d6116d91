"""Pairs through a model: one batch of prompts with two completions each, and its outputs in the order of the pairs.

Shapes: P pairs, C = 2P completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from prefsel.models.architecture import supports_packing
from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import model_device, packed_logps
from prefsel.models.neighbours import require_causal, require_padding
from prefsel.models.packing import PackedBatch, pack
from prefsel.models.padded import PaddedBatch, pad, padded_logps

Batch = PackedBatch | PaddedBatch


def pair_batch(groups: Sequence[EncodedGroup], *, is_packed: bool, pad_token_id: int = 0) -> Batch:
    """Pairs as one batch, whatever its size.

    Args:
        groups: Prompts with two `ok` completions, chosen first.
        is_packed: Whether the model takes packed rows; else each completion is a padded row of its own.
        pad_token_id: What fills padded rows; it is masked and follows the last token, so a language model takes any.
    """
    tokens = [2 * len(group.prompt_tokens) + sum(map(len, group.completion_tokens)) for group in groups]
    if is_packed:
        (row,) = pack(groups, sum(tokens))
        return row
    (padded,) = pad(groups, 2 * len(groups) * max(tokens), pad_token_id=pad_token_id)
    return padded


def by_pair(values_C: Tensor, batch: Batch) -> Tensor:
    """A batch's outputs as one row per pair, chosen first, [P, 2]."""
    places = {key: place for place, key in enumerate(batch.completion_index)}
    order = [places[pair, side] for pair in range(len(values_C) // 2) for side in (0, 1)]
    return values_C[torch.tensor(order, device=values_C.device)].view(-1, 2)


def pair_logps(model: nn.Module, groups: Sequence[EncodedGroup]) -> Tensor:
    """Log-probs of chosen and rejected, [P, 2] float64 with gradient, from one row (or padded batch) of all pairs.

    Raises:
        UserError: The model's numbers depend on what pads them, or are no log-probs.
    """
    is_packed, _ = supports_packing(model)
    if not is_packed:
        require_padding(model, partial(padded_logps, model), 0, what="a pair's log-probs")
        require_causal(model, partial(padded_logps, model))
    batch = pair_batch(groups, is_packed=is_packed).to(model_device(model))
    logps_C = packed_logps(model, batch) if isinstance(batch, PackedBatch) else padded_logps(model, batch)
    return by_pair(logps_C, batch)
