"""Explicit margin: the difference of two rewards."""

from __future__ import annotations

import numpy as np

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class ExplicitMargin(Options):
    """Parameters of `explicit_margin`."""

    rm: str
    """Name of the reward model: reads `rm_<rm>_chosen|rejected`."""
    absolute: bool = False
    """Score |r(y_w) − r(y_l)| instead, so that a margin against the label counts as much as one with it."""


def columns(params: ExplicitMargin) -> tuple[str, ...]:
    """Flat columns that are read."""
    return tuple(f"rm_{params.rm}_{side}" for side in ("chosen", "rejected"))


def score(columns: Columns, params: ExplicitMargin, fitted: Fitted) -> np.ndarray:
    r"""$m_{ex} = r(x, y_w) - r(x, y_l)$, or its absolute value; float64 [N]."""
    margin_N = columns[f"rm_{params.rm}_chosen"] - columns[f"rm_{params.rm}_rejected"]
    return np.abs(margin_N) if params.absolute else margin_N


METRIC = Metric(
    "explicit_margin", ExplicitMargin, columns, score, paper="reward margin of the label, the common baseline"
)
