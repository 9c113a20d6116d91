"""Difficulty gap: pairs that a DPO-tuned policy can hardly tell apart come first."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prefsel.config import Options
from prefsel.metrics.implicit_margin import logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric


class DifficultyGap(Options):
    """Parameters of `difficulty_gap`."""

    policy: str
    """Name of a DPO-tuned policy: reads `logps_<policy>_chosen|rejected`."""
    reference: str
    """Name of what it was tuned from: reads `logps_<reference>_chosen|rejected`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of the implicit reward. It scales all margins alike and changes no order."""
    absolute: bool = False
    """Smallest |IRM| first instead of smallest IRM: undecided pairs before those that the policy has the other way
    round."""


def columns(params: DifficultyGap) -> tuple[str, ...]:
    """Flat columns that are read."""
    return logps_columns(params.policy, "sum") + logps_columns(params.reference, "sum")


def score(columns: Columns, params: DifficultyGap, fitted: Fitted) -> np.ndarray:
    r"""$-IRM$ or $-|IRM|$; float64 [N]. Source: arXiv:2508.04149, which keeps the first 10 %."""
    margin_N = reward_margin(columns, params.policy, params.reference, params.beta)
    return -np.abs(margin_N) if params.absolute else -margin_N


METRIC = Metric("difficulty_gap", DifficultyGap, columns, score, paper="arXiv:2508.04149")
