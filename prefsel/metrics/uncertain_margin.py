"""Uncertain margin: the margin that several reward models agree on, less what they disagree by.

R: reward models; N: pairs of a shard.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class UncertainMargin(Options):
    """Parameters of `uncertain_margin`."""

    rms: tuple[str, ...]
    """Names of the reward models or heads, at least two: reads `rm_<rm>_chosen|rejected` of each. Their margins are
    averaged as they are, so they should be in one unit."""
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How many standard deviations are taken off the mean; 0 scores the mean alone. OPEN: we know no value of the
    paper's."""

    @model_validator(mode="after")
    def _several(self) -> UncertainMargin:
        if len(self.rms) < 2 or len(set(self.rms)) < len(self.rms):
            raise ValueError(f"rms: got {list(self.rms)}; needs at least two different ones")
        return self


def columns(params: UncertainMargin) -> tuple[str, ...]:
    """Flat columns that are read."""
    return tuple(f"rm_{rm}_{side}" for rm in params.rms for side in ("chosen", "rejected"))


def score(columns: Columns, params: UncertainMargin, fitted: Fitted) -> np.ndarray:
    r"""$\bar m - \beta\,s$ with the mean and the population deviation of the R margins $m_r$ of a pair; float64 [N].

    Source: arXiv:2603.09692, a lower confidence bound of the margin.
    """
    margin_RN = np.stack([columns[f"rm_{rm}_chosen"] - columns[f"rm_{rm}_rejected"] for rm in params.rms])
    # Equal margins have no deviation; their rounded mean would give them one of 1e-17, and break ties by noise.
    deviation_N = np.where(np.ptp(margin_RN, axis=0) == 0, 0.0, margin_RN.std(axis=0))
    return np.asarray(margin_RN.mean(axis=0) - params.beta * deviation_N)


METRIC = Metric("uncertain_margin", UncertainMargin, columns, score, paper="arXiv:2603.09692")
