"""LESS with the DPO loss: cosine of the pair's Adam update with the validation gradient."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.errors import UserError
from prefsel.metrics.influence import Tangents, tangent_names
from prefsel.metrics.statistics import Columns, Fitted, Metric


class Checkpoint(Options):
    """A checkpoint of the warm-up."""

    tangents: Tangents
    """Names of the tangents at this checkpoint, one per validation subtask."""
    learning_rate: float = Field(gt=0)
    """Weight of the checkpoint: the mean learning rate of the epoch that ended there."""


class Less(Options):
    """Parameters of `less`: either `tangent`, or `checkpoints`."""

    tangent: Tangents | None = None
    """Name of a tangent, or of several: reads `gamma_dot_<tangent>`, the inner product of the pair's Adam feature with
    the unit validation gradient, and `gamma_norm_<tangent>`, the feature's norm. Several are validation subtasks, of
    which the largest cosine counts."""
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(min_length=1)] | None = None
    """Several checkpoints of the warm-up, whose cosines are averaged, weighted by learning rate; instead of
    `tangent`."""

    @model_validator(mode="after")
    def _one_form(self) -> Less:
        if (self.tangent is None) == (self.checkpoints is None):
            raise ValueError("exactly one of tangent and checkpoints")
        return self


def _weighted_tangents(params: Less) -> list[tuple[tuple[str, ...], float]]:
    """The subtasks' tangents of each checkpoint, with its share of the weight."""
    if params.checkpoints is None:
        assert params.tangent is not None
        return [(tangent_names(params.tangent), 1.0)]
    total = sum(checkpoint.learning_rate for checkpoint in params.checkpoints)
    return [(tangent_names(one.tangents), one.learning_rate / total) for one in params.checkpoints]


def columns(params: Less) -> tuple[str, ...]:
    """Flat columns that are read; they belong to pairs, not to completions."""
    names = dict.fromkeys(name for tangents, _ in _weighted_tangents(params) for name in tangents)
    return tuple(f"gamma_{what}_{name}" for name in names for what in ("dot", "norm"))


def cosine(columns: Columns, tangent: str) -> np.ndarray:
    """Cosine of the pair's Adam feature with the validation gradient; float64 [N].

    Raises:
        UserError: a feature of norm zero, or less, has no direction.
    """
    norm_N = columns[f"gamma_norm_{tangent}"]
    if count := int(np.count_nonzero(norm_N <= 0)):
        raise UserError(
            f"gamma_norm_{tangent}: {count} of {len(norm_N)} pairs have a norm of {norm_N.min():g}; "
            "valid: above 0, as an Adam feature without a direction has no cosine"
        )
    return columns[f"gamma_dot_{tangent}"] / norm_N


def score(columns: Columns, params: Less, fitted: Fitted) -> np.ndarray:
    r"""$\sum_c \frac{\eta_c}{\sum\eta} \max_t \cos(\Gamma_c(d), \nabla\ell_{val,c,t})$; float64 [N].

    Source: arXiv:2402.04333, section 3, with the DPO loss. Deviations: no random projection (the inner product is
    exact), and learning rates divided by their sum, which changes no order. The paper keeps the first 5 %.
    """
    total_N: np.ndarray | float = 0.0
    for tangents, weight in _weighted_tangents(params):
        total_N = total_N + weight * np.max([cosine(columns, name) for name in tangents], axis=0)
    return np.asarray(total_N)


def adam_feature(
    m: np.ndarray,
    v: np.ndarray,
    gradient: np.ndarray,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> np.ndarray:
    r"""$\Gamma = m'/\sqrt{v' + \epsilon}$, $m' = \beta_1 m + (1-\beta_1)g$, $v' = \beta_2 v + (1-\beta_2)g^2$.

    The update Adam would make for this gradient, as LESS computes it: epsilon inside the root, no bias correction. What
    `gamma_dot_…` and `gamma_norm_…` are made of, here for one vector.

    Args:
        m: first moment of the warm-up's Adam, any shape.
        v: second moment, the same shape.
        gradient: of the pair's loss, the same shape.
        betas: moment decays.
        eps: inside the root.
    """
    first = betas[0] * m + (1 - betas[0]) * gradient
    second = betas[1] * v + (1 - betas[1]) * np.square(gradient)
    return np.asarray(first / np.sqrt(second + eps))


METRIC = Metric("less", Less, columns, score, paper="LESS, arXiv:2402.04333")
