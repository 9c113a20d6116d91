"""DualMargin (BeeS): explicit and implicit margins that must agree, fused as probabilities.

S: sources of margins, the explicit ones first; N: pairs of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from prefsel.config import Options
from prefsel.errors import UserError
from prefsel.metrics.implicit_margin import SIDES, logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric, Need, Statistic

# The authors' search for U: it starts at the largest margin divided by this, and ends where fewer than 30 are left.
EXPLICIT_DIVISOR, IMPLICIT_DIVISOR = 1.5, 2.0
MIN_ABOVE = 30
# Beyond this share at the bounds a source no longer tells most pairs apart.
MAX_SATURATED = 0.5


class ImplicitSource(Options):
    """One implicit margin: a small policy and what it was tuned from."""

    policy: str
    """Name of a small policy: reads `logps_<policy>_chosen|rejected`."""
    reference: str
    """Name of what it was tuned from: reads `logps_<reference>_chosen|rejected`."""


class DualMargin(Options):
    """Parameters of `dual_margin`."""

    explicit: tuple[str, ...] = ()
    """Names of reward models: reads `rm_<rm>_chosen|rejected` of each."""
    implicit: tuple[ImplicitSource, ...] = ()
    """Pairs of a policy and its reference, each of which gives one implicit margin."""
    mode: Literal["mul", "add"] = "mul"
    """`mul` turns the margins into probabilities and multiplies them (BeeS). `add` takes their plain sum, which has no
    bounds."""
    lower: FiniteFloat = -2.0
    """Lower bound L of every source, in nats or rewards; with `upper: quantile` each source has its own."""
    upper: Literal["search", "quantile"] | FiniteFloat | tuple[FiniteFloat, ...] = "search"
    """Upper bound U. `search` is the authors' search, for margins of several units; `quantile` takes both bounds as
    quantiles of each source's margins; a number is U of all sources; a list has one for each, the explicit ones
    first."""
    lower_quantile: float = Field(default=0.05, ge=0, lt=1)
    """Quantile that is L with `upper: quantile`. The value is ours."""
    upper_quantile: float = Field(default=0.95, gt=0, le=1)
    """Quantile that is U with `upper: quantile`. The value is ours."""
    epsilon: float = Field(default=1e-6, gt=0, lt=0.5)
    """Probabilities are kept within [epsilon, 1 − epsilon], so that full agreement against full conflict is no 0/0."""

    @model_validator(mode="after")
    def _sources_fit(self) -> DualMargin:
        names = _source_names(self)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"explicit, implicit: got {names or 'none'}; needs one source or more, each once")
        if isinstance(self.upper, tuple) and len(self.upper) != len(names):
            raise ValueError(f"upper: got {len(self.upper)} numbers for {len(names)} sources: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _bounds_fit(self) -> DualMargin:
        bounds = {"lower", "upper", "lower_quantile", "upper_quantile", "epsilon"}
        if self.mode == "add":
            foreign = bounds
        else:
            foreign = {"lower"} if self.upper == "quantile" else {"lower_quantile", "upper_quantile"}
        if given := sorted(foreign & self.model_fields_set):
            raise ValueError(f"{', '.join(given)}: not used with mode={self.mode!r}, upper={self.upper!r}")
        if self.lower_quantile >= self.upper_quantile:
            raise ValueError(f"lower_quantile {self.lower_quantile:g} must be below upper_quantile")
        numbers = self.upper if isinstance(self.upper, tuple) else (self.upper,)
        for number in numbers:
            if not isinstance(number, str) and number <= self.lower:
                raise ValueError(f"upper: got {number:g}; must be above lower, {self.lower:g}")
        return self


def _source_names(params: DualMargin) -> list[str]:
    """What the sources are called in errors and fitted numbers."""
    return [f"rm_{rm}" for rm in params.explicit] + [f"{one.policy}/{one.reference}" for one in params.implicit]


def columns(params: DualMargin) -> tuple[str, ...]:
    """Flat columns that are read."""
    rewards = [f"rm_{rm}_{side}" for rm in params.explicit for side in SIDES]
    models = dict.fromkeys(model for one in params.implicit for model in (one.policy, one.reference))
    return (*rewards, *(name for model in models for name in logps_columns(model, "sum")))


def margins(columns: Columns, params: DualMargin) -> list[np.ndarray]:
    r"""$r(y_w) - r(y_l)$ of every source, with $r = \log\pi_\theta - \log\pi_{ref}$ (no β) if implicit; [S][N]."""
    explicit = [columns[f"rm_{rm}_chosen"] - columns[f"rm_{rm}_rejected"] for rm in params.explicit]
    return explicit + [reward_margin(columns, one.policy, one.reference, beta=1.0) for one in params.implicit]


def _edges(columns: Columns, params: DualMargin, fitted: Fitted) -> dict[str, Need]:
    """What the bounds are made from."""
    needs = {}
    for place, (name, margin_N) in enumerate(zip(_source_names(params), margins(columns, params))):
        what = f"dual_margin: the margin of {name}"
        if params.upper == "search":
            divisor = EXPLICIT_DIVISOR if place < len(params.explicit) else IMPLICIT_DIVISOR
            needs[f"upper {name}"] = Need(
                Statistic("upper_bound", what, divisor=divisor, min_above=MIN_ABOVE), margin_N
            )
        else:
            for end, q in (("lower", params.lower_quantile), ("upper", params.upper_quantile)):
                needs[f"{end} {name}"] = Need(Statistic("quantile", what, q, may_be_zero=True), margin_N)
    return needs


def bounds(params: DualMargin, fitted: Fitted) -> list[tuple[float, float]]:
    """(L, U) of every source.

    Raises:
        UserError: U is not above L.
    """
    names = _source_names(params)
    if params.upper == "search":
        found = [(params.lower, fitted[f"upper {name}"]["upper"]) for name in names]
    elif params.upper == "quantile":
        found = [(fitted[f"lower {name}"]["quantile"], fitted[f"upper {name}"]["quantile"]) for name in names]
    else:
        numbers = params.upper if isinstance(params.upper, tuple) else (params.upper,) * len(names)
        return [(params.lower, number) for number in numbers]
    for name, (lower, upper) in zip(names, found):
        if upper <= lower:
            valid = "two quantiles that differ" if params.upper == "quantile" else "a smaller lower, or upper: quantile"
            raise UserError(
                f"dual_margin: {name}: upper bound {upper:g} is not above lower bound {lower:g}; use {valid}"
            )
    return found


def _saturation(columns: Columns, params: DualMargin, fitted: Fitted) -> dict[str, Need]:
    """The shares of the pairs on and beyond each bound."""
    needs = {}
    for name, margin_N, (lower, upper) in zip(_source_names(params), margins(columns, params), bounds(params, fitted)):
        what = f"dual_margin: the margin of {name}"
        needs[f"saturated low {name}"] = Need(Statistic("share", what), margin_N <= lower)
        needs[f"saturated high {name}"] = Need(Statistic("share", what), margin_N >= upper)
    return needs


def rounds(params: DualMargin) -> tuple:
    """Bounds first, unless they are given, then how many pairs they hold fast; a sum needs neither."""
    if params.mode == "add":
        return ()
    return (_edges, _saturation) if params.upper in ("search", "quantile") else (_saturation,)


def warnings(params: DualMargin, fitted: Fitted) -> list[str]:
    """One line per source with more than half of the pairs at its bounds."""
    found = []
    for name in _source_names(params) if params.mode == "mul" else []:
        low, high = (fitted[f"saturated {end} {name}"]["share"] for end in ("low", "high"))
        if low + high > MAX_SATURATED:
            found.append(
                f"dual_margin: {name}: {low:.0%} of the pairs are at or below the lower bound and {high:.0%} at "
                "or above the upper one, where the source tells pairs apart no longer; consider upper: quantile"
            )
    return found


def probability(margin_N: np.ndarray, lower: float, upper: float, epsilon: float) -> np.ndarray:
    r"""$p(m) = (\mathrm{clip}(m, L, U) - L)/(U - L)$ within $[\epsilon, 1-\epsilon]$; float64 [N]."""
    return np.clip((np.clip(margin_N, lower, upper) - lower) / (upper - lower), epsilon, 1 - epsilon)


def agreement(probability_SN: Sequence[np.ndarray]) -> np.ndarray:
    r"""$P = \prod p_i / (\prod p_i + \prod(1 - p_i))$, as the sigmoid of the summed log-odds; float64 [N]."""
    log_odds_N = np.sum([np.log(p_N) - np.log1p(-p_N) for p_N in probability_SN], axis=0)
    return np.asarray(np.exp(-np.logaddexp(0.0, -log_odds_N)))


def score(columns: Columns, params: DualMargin, fitted: Fitted) -> np.ndarray:
    r"""P (`mul`) or $s = \sum_i m_i$ (`add`); float64 [N].

    Source: "Less is More: Improving LLM Alignment via Preference Data Selection", and the code of a fork. Deviations:
    probabilities stay off 0 and 1, where a conflict would be 0/0, and bounds may be quantiles.
    """
    if params.mode == "add":
        return np.asarray(np.sum(margins(columns, params), axis=0))
    pairs = zip(margins(columns, params), bounds(params, fitted))
    return agreement([probability(margin_N, *edges, params.epsilon) for margin_N, edges in pairs])


METRIC = Metric(
    "dual_margin",
    DualMargin,
    columns,
    score,
    paper="Less is More: Improving LLM Alignment via Preference Data Selection",
    rounds=rounds,
    warnings=warnings,
)
