"""Filtered DPO: is the chosen completion better than what the policy writes itself?"""

from __future__ import annotations

import numpy as np

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class FilteredDpo(Options):
    """Parameters of `filtered_dpo`."""

    rm: str
    """Name of the reward model: reads `rm_<rm>_chosen` and `rm_<rm>_generated`, the reward of one response of the
    policy to the same prompt."""
    generated: str | None = None
    """Reads `rm_<generated>_generated` instead, of a `generated_reward` with this `name`: where several policies
    answer."""


def columns(params: FilteredDpo) -> tuple[str, ...]:
    """Flat columns that are read."""
    return (f"rm_{params.rm}_chosen", _generated(params))


def _generated(params: FilteredDpo) -> str:
    return f"rm_{params.generated or params.rm}_generated"


def score(columns: Columns, params: FilteredDpo, fitted: Fitted) -> np.ndarray:
    r"""$r(x, y_w) - r(x, y_{gen})$; float64 [N].

    Source: arXiv:2404.13846, which keeps a pair iff $r(x, y_{gen}) - r(x, y_w) < 0$: the scores strictly above 0.
    """
    return columns[f"rm_{params.rm}_chosen"] - columns[_generated(params)]


METRIC = Metric("filtered_dpo", FilteredDpo, columns, score, paper="arXiv:2404.13846")
