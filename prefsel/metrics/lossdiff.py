"""LossDiff: how much lower the loss of a pair becomes when the policy has seen the validation set."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prefsel.config import Options
from prefsel.metrics.implicit_margin import logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric


class LossDiff(Options):
    """Parameters of `lossdiff`."""

    policy: str
    """Name of the warm-up θ: reads `logps_<policy>_chosen|rejected`."""
    validation_policy: str
    """Name of θ_val, which was trained on the validation pairs: reads `logps_<validation_policy>_chosen|rejected`."""
    reference: str
    """Name of the reference of both losses: reads `logps_<reference>_chosen|rejected`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of both losses."""


def dpo_loss(columns: Columns, policy: str, reference: str, beta: float) -> np.ndarray:
    r"""$\ell = -\log\sigma(IRM) = \mathrm{softplus}(-IRM)$, finite for any finite margin; float64 [N], nats."""
    return np.asarray(np.logaddexp(0.0, -reward_margin(columns, policy, reference, beta)))


def columns(params: LossDiff) -> tuple[str, ...]:
    """Flat columns that are read."""
    models = (params.policy, params.validation_policy, params.reference)
    return tuple(dict.fromkeys(name for model in models for name in logps_columns(model, "sum")))


def score(columns: Columns, params: LossDiff, fitted: Fitted) -> np.ndarray:
    r"""$LossDiff(d) = \ell(\theta; d) - \ell(\theta_{val}; d)$; float64 [N].

    To first order in the step that leads from θ to θ_val it is proportional to the influence of the pair. Source:
    "Towards Understanding Valuable Preference Data for LLM Alignment". The paper keeps a middle band of it.
    """
    losses = [
        dpo_loss(columns, model, params.reference, params.beta) for model in (params.policy, params.validation_policy)
    ]
    return losses[0] - losses[1]


METRIC = Metric(
    "lossdiff",
    LossDiff,
    columns,
    score,
    paper="Towards Understanding Valuable Preference Data for LLM Alignment",
)
