"""Which weights AdamW's decay pulls towards zero: matrices, not norms and biases, as `transformers.Trainer` does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def in_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[list[nn.Parameter]]:
    """Weights by how they decay: matrices and larger first, then vectors, the scales and offsets of norms and layers.

    Without decay there is one group, in the given order.
    """
    every = list(parameters)
    if weight_decay == 0:
        return [every]
    groups = [[one for one in every if _rank(one) > 1], [one for one in every if _rank(one) <= 1]]
    return [group for group in groups if group]


def optimizer_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[Any]:
    """What an optimizer takes: the parameters, or where some of them decay, groups with a decay of their own."""
    groups = in_groups(parameters, weight_decay)
    if weight_decay == 0:
        return groups[0]
    return [{"params": group, "weight_decay": weight_decay if _rank(group[0]) > 1 else 0.0} for group in groups]


def _rank(parameter: Tensor) -> int:
    """Dimensions of a whole weight; under ZeRO-3 a worker holds a flat part of it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
