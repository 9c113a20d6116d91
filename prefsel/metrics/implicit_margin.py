"""Implicit margin: the difference of two implicit rewards of a policy."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prefsel.config import Options
from prefsel.errors import UserError
from prefsel.metrics.statistics import Columns, Fitted, Metric

Reduction = Literal["sum", "mean"]
SIDES = ("chosen", "rejected")


class ImplicitMargin(Options):
    """Parameters of `implicit_margin`."""

    policy: str
    """Name of the policy: reads `logps_<policy>_chosen|rejected`."""
    reference: str | None = None
    """Name of the reference: reads `logps_<reference>_chosen|rejected`. Null means none, which compares the policy's
    own log-probs."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of the implicit reward. It scales all margins alike and changes no order."""
    reduction: Reduction = "sum"
    """Which log-probs are compared: summed over the response, or the `mean` per token, which also reads
    `num_tokens_<model>_chosen|rejected`. The mean without a reference is SimPO's reward."""
    absolute: bool = False
    """Score the absolute margin instead, which says how decided the policy is whichever way."""
    order: Literal["largest", "smallest"] = "largest"
    """Which margins come first; `smallest` negates the score."""


def logps_columns(model: str, reduction: Reduction) -> tuple[str, ...]:
    """Flat columns that `logps` reads."""
    prefixes = ("logps", "num_tokens") if reduction == "mean" else ("logps",)
    return tuple(f"{prefix}_{model}_{side}" for prefix in prefixes for side in SIDES)


def logps(columns: Columns, model: str, side: str, reduction: Reduction) -> np.ndarray:
    """Log-probability of one side in nats, summed over response tokens or averaged over them; float64 [N].

    Raises:
        UserError: a completion of no tokens cannot be averaged.
    """
    sum_N = columns[f"logps_{model}_{side}"]
    if reduction == "sum":
        return sum_N
    tokens_N = columns[f"num_tokens_{model}_{side}"]
    if len(tokens_N) and tokens_N.min() <= 0:
        raise UserError(f"num_tokens_{model}_{side}: got {tokens_N.min():g}; valid: at least 1 response token")
    return sum_N / tokens_N


def reward_margin(
    columns: Columns, policy: str, reference: str | None, beta: float, reduction: Reduction = "sum"
) -> np.ndarray:
    r"""$\hat r(y_w) - \hat r(y_l)$ with $\hat r(y) = \beta(\log\pi_\theta(y|x) - \log\pi_{ref}(y|x))$; float64 [N]."""
    reward_N = []
    for side in SIDES:
        policy_N = logps(columns, policy, side, reduction)
        reward_N.append(policy_N if reference is None else policy_N - logps(columns, reference, side, reduction))
    return beta * (reward_N[0] - reward_N[1])


def columns(params: ImplicitMargin) -> tuple[str, ...]:
    """Flat columns that are read."""
    models = [params.policy] if params.reference is None else [params.policy, params.reference]
    return tuple(name for model in models for name in logps_columns(model, params.reduction))


def score(columns: Columns, params: ImplicitMargin, fitted: Fitted) -> np.ndarray:
    """The implicit reward margin (IRM), signed or absolute, negated for `order="smallest"`; float64 [N]."""
    margin_N = reward_margin(columns, params.policy, params.reference, params.beta, params.reduction)
    margin_N = np.abs(margin_N) if params.absolute else margin_N
    return -margin_N if params.order == "smallest" else margin_N


METRIC = Metric(
    "implicit_margin", ImplicitMargin, columns, score, paper="DPO, arXiv:2305.18290; SimPO, arXiv:2405.14734"
)
