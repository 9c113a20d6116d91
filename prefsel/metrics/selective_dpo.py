"""SelectiveDPO: pairs that a policy which never saw them already gets right come first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.errors import UserError
from prefsel.metrics.implicit_margin import logps_columns
from prefsel.metrics.lossdiff import dpo_loss
from prefsel.metrics.statistics import Columns, Fitted, Metric


class SelectiveDpo(Options):
    """Parameters of `selective_dpo`: either `losses`, or `policies` with their `reference`."""

    losses: str | None = None
    """Prefix of the columns `<losses>_0`, `<losses>_1`, … with the held-out DPO loss of the pair, one per seed. Either
    this or `policies`."""
    seeds: int | None = Field(default=None, ge=1)
    """How many columns of losses there are; null means all that the table has."""
    policies: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of cross-fitted policies, one per seed, which score every prompt by the fold that never saw it: reads
    `logps_<policy>_chosen|rejected` and computes the losses."""
    reference: str | None = None
    """Name of the reference of `policies`: reads `logps_<reference>_chosen|rejected`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of the losses of `policies`."""

    @model_validator(mode="after")
    def _one_form(self) -> SelectiveDpo:
        if (self.losses is None) == (self.policies is None):
            raise ValueError(f"exactly one of losses and policies: got losses={self.losses}, policies={self.policies}")
        foreign = {"seeds"} if self.losses is None else {"reference", "beta"}
        if given := sorted(foreign & self.model_fields_set):
            raise ValueError(f"{' and '.join(given)}: belong to {'losses' if self.losses is None else 'policies'}")
        if self.policies is not None and self.reference is None:
            raise ValueError("reference: policies need one")
        return self


def resolve(params: SelectiveDpo, available: Iterable[str]) -> SelectiveDpo:
    """`seeds` filled in from the columns of a table.

    Raises:
        UserError: the table has no column of losses, or its numbers have a gap.
    """
    if params.losses is None or params.seeds is not None:
        return params
    pattern = re.compile(re.escape(params.losses) + r"_(0|[1-9][0-9]*)")
    numbers = sorted(int(match[1]) for name in available if (match := pattern.fullmatch(name)))
    if numbers != list(range(max(1, len(numbers)))):
        got = ", ".join(f"{params.losses}_{number}" for number in numbers) or "none"
        raise UserError(
            f"selective_dpo: losses: got the columns {got}; valid: {params.losses}_0, {params.losses}_1, … with no gap"
        )
    return params.model_copy(update={"seeds": len(numbers)})


def columns(params: SelectiveDpo) -> tuple[str, ...]:
    """Flat columns that are read.

    Raises:
        UserError: `losses` without `seeds` where no table is at hand to count them in.
    """
    if params.policies is not None:
        assert params.reference is not None
        models = dict.fromkeys([*params.policies, params.reference])
        return tuple(name for model in models for name in logps_columns(model, "sum"))
    return _loss_names(params)


def _loss_names(params: SelectiveDpo) -> tuple[str, ...]:
    if params.seeds is None:
        raise UserError("selective_dpo: seeds: how many columns of losses are there? Or give policies and reference")
    return tuple(f"{params.losses}_{seed}" for seed in range(params.seeds))


def score(columns: Columns, params: SelectiveDpo, fitted: Fitted) -> np.ndarray:
    """Minus the mean held-out loss over seeds: easy pairs first, in which order they are then trained on; float64 [N].

    Source: arXiv:2502.09650, which keeps the easiest half.
    """
    if params.policies is None:
        losses = [columns[name] for name in _loss_names(params)]
    else:
        assert params.reference is not None
        losses = [dpo_loss(columns, policy, params.reference, params.beta) for policy in params.policies]
    return np.asarray(-np.mean(losses, axis=0))


METRIC = Metric("selective_dpo", SelectiveDpo, columns, score, paper="arXiv:2502.09650", resolve=resolve)
