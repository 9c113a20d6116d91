"""Influence: by how much a training step on the pair lowers the validation loss, to first order."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prefsel.config import Options
from prefsel.metrics.implicit_margin import SIDES, logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric

Tangents = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""One direction, or several; of a tangent with strata they are called `<tangent>-<stratum>`."""


def tangent_names(tangents: Tangents) -> tuple[str, ...]:
    """The directions as a tuple."""
    return (tangents,) if isinstance(tangents, str) else tangents


class Influence(Options):
    """Parameters of `influence`."""

    policy: str
    """Name of the warm-up θ at which the derivatives are taken: reads `logps_<policy>_chosen|rejected`."""
    reference: str
    """Name of the reference: reads `logps_<reference>_chosen|rejected`."""
    tangent: Tangents
    """Name of a tangent, or of several: reads `dlogps_<tangent>_chosen|rejected`, the derivative of the log-probs along
    the mean validation gradient."""
    beta: float = Field(default=0.1, gt=0)
    """β of the pair's loss. The tangent has a β of its own, and the two must agree."""
    combine: Literal["mean", "max"] = "mean"
    """What is made of the influences along several tangents."""
    any_beta: bool = False
    """Accept a `beta` other than that of the tangent, which a pipeline refuses otherwise: the gradients of two
    different losses are multiplied then. It changes no number."""


def columns(params: Influence) -> tuple[str, ...]:
    """Flat columns that are read."""
    derivatives = tuple(f"dlogps_{name}_{side}" for name in tangent_names(params.tangent) for side in SIDES)
    return logps_columns(params.policy, "sum") + logps_columns(params.reference, "sum") + derivatives


def score(columns: Columns, params: Influence, fitted: Fitted) -> np.ndarray:
    r"""$IF(d) = \langle\nabla\ell(d), v\rangle = -\beta\,\sigma(-IRM)\,(D_v\log\pi(y_w) - D_v\log\pi(y_l))$, [N].

    v is the mean gradient of the validation *loss*, so a pair that raises the margin along −v has positive influence.
    Source: "Towards Understanding Valuable Preference Data for LLM Alignment", with the identity as Hessian and all
    parameters (OPEN there); as a directional derivative, by the chain rule through the pair's log-probs.
    """
    margin_N = reward_margin(columns, params.policy, params.reference, params.beta)
    slope_N = -params.beta * np.exp(-np.logaddexp(0.0, margin_N))  # -beta sigmoid(-margin), without overflow
    names = tangent_names(params.tangent)
    found_TN = [slope_N * (columns[f"dlogps_{name}_chosen"] - columns[f"dlogps_{name}_rejected"]) for name in names]
    return np.asarray(np.mean(found_TN, axis=0) if params.combine == "mean" else np.max(found_TN, axis=0))


METRIC = Metric(
    "influence",
    Influence,
    columns,
    score,
    paper="Towards Understanding Valuable Preference Data for LLM Alignment",
)
