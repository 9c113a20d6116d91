"""Length difference: how much longer the chosen completion is than the rejected one."""

from __future__ import annotations

from typing import Literal

import numpy as np

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class LengthDifference(Options):
    """Parameters of `length_difference`."""

    length: str = "num_tokens"
    """Prefix of the length columns `<length>_chosen|rejected`; `num_tokens_<model>` counts with one model's
    tokenizer."""
    absolute: bool = False
    """Score | |y_w| − |y_l| | instead, so that a longer rejected completion counts as much as a longer chosen one."""
    order: Literal["largest", "smallest"] = "largest"
    """Which differences come first; `smallest` negates the score. With `absolute` it puts pairs of similar length
    first, and a `threshold` from −100 keeps those that differ by at most 100 tokens."""


def columns(params: LengthDifference) -> tuple[str, ...]:
    """Flat columns that are read."""
    return tuple(f"{params.length}_{side}" for side in ("chosen", "rejected"))


def score(columns: Columns, params: LengthDifference, fitted: Fitted) -> np.ndarray:
    r"""$|y_w| - |y_l|$ in tokens, or its absolute value, negated for `order="smallest"`; float64 [N].

    Source: delta learning (arXiv:2507.06187; OLMo 3) limits chat pairs to a difference of 100 tokens either way.
    """
    difference_N = columns[f"{params.length}_chosen"] - columns[f"{params.length}_rejected"]
    difference_N = np.abs(difference_N) if params.absolute else difference_N
    return -difference_N if params.order == "smallest" else difference_N


METRIC = Metric("length_difference", LengthDifference, columns, score, paper="delta learning, arXiv:2507.06187")
