"""Rejected length: how long the worse completion is."""

from __future__ import annotations

import numpy as np

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric


class RejectedLength(Options):
    """Parameters of `rejected_length`."""

    length: str = "num_tokens"
    """Prefix of the length column `<length>_rejected`; `num_tokens_<model>` counts with one model's tokenizer."""


def columns(params: RejectedLength) -> tuple[str, ...]:
    """Flat columns that are read."""
    return (f"{params.length}_rejected",)


def score(columns: Columns, params: RejectedLength, fitted: Fitted) -> np.ndarray:
    r"""$|y_l|$ in tokens; float64 [N]. Source: RIP (arXiv:2501.18578); see `rejected_reward`."""
    return np.array(columns[f"{params.length}_rejected"])


METRIC = Metric("rejected_length", RejectedLength, columns, score, paper="RIP, arXiv:2501.18578")
