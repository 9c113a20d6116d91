"""IFD margin: how much harder to follow from the prompt the chosen completion is than the rejected one."""

from __future__ import annotations

import numpy as np

from prefsel.config import Options
from prefsel.metrics.implicit_margin import logps, logps_columns
from prefsel.metrics.statistics import Columns, Fitted, Metric


class IfdMargin(Options):
    """Parameters of `ifd_margin`."""

    policy: str
    """Name of the policy: reads `logps_<policy>_chosen|rejected` and `logps_<policy>_uncond_chosen|rejected` (without
    the prompt), with `num_tokens_<policy>_…` and `num_tokens_<policy>_uncond_…`, where the former stand in for the
    latter."""


def columns(params: IfdMargin) -> tuple[str, ...]:
    """Flat columns that are read."""
    return logps_columns(params.policy, "mean") + logps_columns(f"{params.policy}_uncond", "mean")


def difficulty(columns: Columns, policy: str, side: str) -> np.ndarray:
    r"""$IFD(y) = \mathrm{ppl}(y|x) / \mathrm{ppl}(y)$, from log-probs averaged over the response's tokens; float64 [N].

    Below 1 where the prompt helps.
    """
    return np.exp(logps(columns, f"{policy}_uncond", side, "mean") - logps(columns, policy, side, "mean"))


def score(columns: Columns, params: IfdMargin, fitted: Fitted) -> np.ndarray:
    r"""$IFD(y_w) - IFD(y_l)$; float64 [N].

    Source: the instruction-following difficulty of arXiv:2308.12032, as a difference of the two completions.
    """
    return difficulty(columns, params.policy, "chosen") - difficulty(columns, params.policy, "rejected")


METRIC = Metric("ifd_margin", IfdMargin, columns, score, paper="instruction-following difficulty, arXiv:2308.12032")
