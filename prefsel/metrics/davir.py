"""DavIR: how much of its own surprise a policy has lost on the chosen completion, beyond the rejected one."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.metrics.implicit_margin import SIDES, logps_columns
from prefsel.metrics.statistics import Columns, Fitted, Metric


class DavIR(Options):
    """Parameters of `davir`."""

    policy: str
    """Name of the trained policy θ: reads `logps_<policy>_chosen|rejected`."""
    base: str
    """Name of the base θ_0 that it was trained from: reads `logps_<base>_chosen|rejected`. Both count the same tokens,
    so that per-token log-probs would give the same ratio."""
    floor: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Smallest |lp_0| that is divided by, in nats. A base that is certain of a completion has lp_0 = 0, and the ratio
    would be 0/0: then it is lp_θ over this."""

    @model_validator(mode="after")
    def _two_models(self) -> DavIR:
        if self.policy == self.base:
            raise ValueError(f"base: got {self.base!r}, the policy itself; valid: another model")
        return self


def columns(params: DavIR) -> tuple[str, ...]:
    """Flat columns that are read."""
    return tuple(name for model in (params.policy, params.base) for name in logps_columns(model, "sum"))


def score(columns: Columns, params: DavIR, fitted: Fitted) -> np.ndarray:
    r"""$g(y_w) - g(y_l)$ with $g(y) = (\log\pi_\theta(y|x) - \log\pi_0(y|x)) / |\log\pi_0(y|x)|$; float64 [N].

    Source: DavIR (arXiv:2310.13008), whose score of one response this is the difference of.
    """
    gains = []
    for side in SIDES:
        policy_N, base_N = columns[f"logps_{params.policy}_{side}"], columns[f"logps_{params.base}_{side}"]
        gains.append((policy_N - base_N) / np.maximum(np.abs(base_N), params.floor))
    return np.asarray(gains[0] - gains[1])


METRIC = Metric("davir", DavIR, columns, score, paper="DavIR, arXiv:2310.13008")
