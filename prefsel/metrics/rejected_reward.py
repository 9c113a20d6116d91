"""Rejected reward: how good the worse completion still is."""

from __future__ import annotations

import numpy as np

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class RejectedReward(Options):
    """Parameters of `rejected_reward`."""

    rm: str
    """Name of the reward model: reads `rm_<rm>_rejected`."""


def columns(params: RejectedReward) -> tuple[str, ...]:
    """Flat columns that are read."""
    return (f"rm_{params.rm}_rejected",)


def score(columns: Columns, params: RejectedReward, fitted: Fitted) -> np.ndarray:
    r"""$r(x, y_l)$; float64 [N].

    Source: RIP (arXiv:2501.18578), which keeps a pair iff $r(x, y_l) \ge a$, $|y_l| \ge b$ and
    $r(x, y_w) - r(x, y_l) \le c$.
    """
    return np.array(columns[f"rm_{params.rm}_rejected"])


METRIC = Metric("rejected_reward", RejectedReward, columns, score, paper="RIP, arXiv:2501.18578")
