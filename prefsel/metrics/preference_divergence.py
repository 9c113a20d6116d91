"""Preference divergence: do the other aspects agree with the label of this one?

K: aspects; N: pairs of a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric, Need, Statistic


class PreferenceDivergence(Options):
    """Parameters of `preference_divergence`."""

    aspects: tuple[str, ...]
    """All aspects of the corpus, at least two."""
    source: Literal["rm", "ratings"] = "rm"
    """Where the margins come from: `rm` reads `rm_<aspect>_chosen|rejected` of proxy reward models, `ratings` reads
    `ratings_<aspect>_chosen|rejected` of the data."""
    gamma: float = Field(default=0.9, gt=0, le=1)
    """Margins are scaled by this quantile of their absolute value. OPEN in the paper, which says that 1 (no scaling by
    quantile) hurts."""
    rho: float | Literal["fit"] = 0.0
    """Reward per token of extra length, which is taken off every margin; `fit` takes the least-squares slope of each
    aspect. OPEN in the paper."""
    own_aspect: str | None = "aspect"
    """Column that says which aspect a pair was labelled for, and is left out of its divergence; null means that no pair
    has one, and all aspects count."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """One weight per aspect, our extension; null means equal ones."""
    length: str = "num_tokens"
    """Prefix of the length columns `<length>_chosen|rejected`, which are read unless `rho` is 0. OPEN in the paper."""

    @model_validator(mode="after")
    def _aspects_fit(self) -> PreferenceDivergence:
        if len(self.aspects) < 2 or len(set(self.aspects)) < len(self.aspects):
            raise ValueError(f"aspects: got {list(self.aspects)}; needs at least two different ones")
        if self.weights is not None and len(self.weights) != len(self.aspects):
            raise ValueError(f"weights: got {len(self.weights)} for {len(self.aspects)} aspects")
        return self


def columns(params: PreferenceDivergence) -> tuple[str, ...]:
    """Flat columns that are read."""
    own = () if params.own_aspect is None else (params.own_aspect,)
    prefixes = [f"{params.source}_{aspect}" for aspect in params.aspects] + ([params.length] if params.rho else [])
    return own + tuple(f"{prefix}_{side}" for prefix in prefixes for side in ("chosen", "rejected"))


def labels(params: PreferenceDivergence) -> dict[str, tuple[str, ...]]:
    """The own aspect is read as its position in `aspects`."""
    return {} if params.own_aspect is None else {params.own_aspect: params.aspects}


def unused(columns: Columns, params: PreferenceDivergence) -> dict[str, np.ndarray]:
    """A pair's own aspect is left out, so its reward may be absent."""
    return {
        f"{params.source}_{aspect}_{side}": _is_own(columns, params, place)
        for place, aspect in enumerate(params.aspects)
        for side in ("chosen", "rejected")
    }


def _is_own(columns: Columns, params: PreferenceDivergence, place: int) -> np.ndarray:
    if params.own_aspect is None:
        return np.zeros(len(columns[f"{params.source}_{params.aspects[place]}_chosen"]), bool)
    return columns[params.own_aspect] == place


def _length_difference(columns: Columns, params: PreferenceDivergence) -> np.ndarray:
    return columns[f"{params.length}_chosen"] - columns[f"{params.length}_rejected"]


def _reward_margin(columns: Columns, params: PreferenceDivergence, aspect: str) -> np.ndarray:
    return columns[f"{params.source}_{aspect}_chosen"] - columns[f"{params.source}_{aspect}_rejected"]


def debiased_margin(columns: Columns, params: PreferenceDivergence, aspect: str, fitted: Fitted) -> np.ndarray:
    r"""$\Delta\hat r_k - \rho_k\,\Delta len$ (notes, eq. 17), float64 [N]; NaN where the reward is absent."""
    margin_N = _reward_margin(columns, params, aspect)
    if not params.rho:
        return margin_N
    rho = fitted[f"rho_{aspect}"]["slope"] if params.rho == "fit" else params.rho
    return margin_N - rho * _length_difference(columns, params)


def _slopes(columns: Columns, params: PreferenceDivergence, fitted: Fitted) -> dict[str, Need]:
    """rho per aspect, over the pairs of other aspects."""
    needs = {}
    for place, aspect in enumerate(params.aspects):
        is_other_N = ~_is_own(columns, params, place)
        statistic = Statistic("slope", f"preference_divergence: rho of {aspect!r} over the pairs of other aspects")
        margin_N, length_N = _reward_margin(columns, params, aspect), _length_difference(columns, params)
        needs[f"rho_{aspect}"] = Need(statistic, margin_N[is_other_N], length_N[is_other_N])
    return needs


def _scales(columns: Columns, params: PreferenceDivergence, fitted: Fitted) -> dict[str, Need]:
    """The gamma quantile of every aspect's absolute margin, over the pairs of other aspects."""
    needs = {}
    for place, aspect in enumerate(params.aspects):
        is_other_N = ~_is_own(columns, params, place)
        what = f"preference_divergence: the absolute margin of {aspect!r} over the pairs of other aspects"
        margin_N = debiased_margin(columns, params, aspect, fitted)[is_other_N]
        needs[f"scale_{aspect}"] = Need(Statistic("quantile", what, params.gamma), np.abs(margin_N))
    return needs


def rounds(params: PreferenceDivergence) -> tuple:
    """Slopes first when they are fitted, as the scales are those of the margins without length."""
    return (_slopes, _scales) if params.rho == "fit" else (_scales,)


def divergence(
    normalised_KN: Iterable[np.ndarray], own_N: np.ndarray | None, weights: Sequence[float] | None = None
) -> np.ndarray:
    r"""$PD = -\frac{1}{w_k} \sum_{k' \ne k} w_{k'} \Delta\tilde r_{k'}$, k the own aspect; float64 [N].

    Args:
        normalised_KN: normalised margins, one array per aspect.
        own_N: own aspect of each pair, or None: all aspects count and nothing is divided by.
        weights: default 1 each, which is the paper's form.
    """
    total_N: np.ndarray | float = 0.0
    for place, margin_N in enumerate(normalised_KN):
        weighted_N = margin_N if weights is None else weights[place] * margin_N
        total_N = total_N - (weighted_N if own_N is None else np.where(own_N == place, 0.0, weighted_N))
    if weights is not None and own_N is not None:
        total_N = total_N / np.asarray(weights)[own_N.astype(np.intp)]
    return np.asarray(total_N)


def score(columns: Columns, params: PreferenceDivergence, fitted: Fitted) -> np.ndarray:
    r"""$-PD(z)$ with $\Delta\tilde r_k = \mathrm{clip}(\Delta\hat r_k / q_k, -1, 1)$; float64 [N].

    Source: "Data Selection for LLM Alignment Using Fine-Grained Preferences", eqs. 11-17. The pairs with the most
    negative PD, on which the other aspects agree with the label, come first.
    """
    normalised_KN = (
        np.clip(debiased_margin(columns, params, aspect, fitted) / fitted[f"scale_{aspect}"]["quantile"], -1.0, 1.0)
        for aspect in params.aspects
    )
    own_N = None if params.own_aspect is None else columns[params.own_aspect]
    return -divergence(normalised_KN, own_N, params.weights)


METRIC = Metric(
    "preference_divergence",
    PreferenceDivergence,
    columns,
    score,
    paper="Data Selection for LLM Alignment Using Fine-Grained Preferences",
    rounds=rounds,
    labels=labels,
    unused=unused,
)
