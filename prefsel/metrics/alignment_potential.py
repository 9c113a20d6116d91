"""Alignment potential M_AP: the gap from the policy's current margin to the margin the reward model asks for."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.metrics.implicit_margin import logps, logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric, Need, Statistic
from prefsel.numbers.moments import standardise


class AlignmentPotential(Options):
    """Parameters of `alignment_potential`."""

    rm: str
    """Name of the reward model: reads `rm_<rm>_chosen|rejected`, or `rm_<rm>_max|min` with `spread: group`."""
    policy: str
    """Name of the policy: reads `logps_<policy>_chosen|rejected`, and `num_tokens_<policy>_chosen|rejected` in the
    z-score form."""
    form: Literal["zscore", "raw"] = "zscore"
    """`zscore` is the form of the authors' code. `raw` is the paper's definition, which needs `reference`."""
    weight: float = 1.0
    """Weight of the policy's margin. 1 is the authors'; an optional mode of their generation scripts takes 2.5."""
    sign: Literal["signed", "abs"] = "signed"
    """Of the reward margin: `signed` lets a disagreement with the label count against a pair, `abs` is as printed in
    the paper."""
    spread: Literal["pair", "group"] = "pair"
    """`pair` takes the reward margin of the pair, `group` the largest minus the smallest reward over all completions of
    the prompt."""
    reference: str | None = None
    """Name of the reference of the raw form: reads `logps_<reference>_chosen|rejected`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of the implicit reward in the raw form."""

    @model_validator(mode="after")
    def _form_fits(self) -> AlignmentPotential:
        if self.form == "raw" and self.reference is None:
            raise ValueError("reference: form='raw' needs one")
        if self.form == "zscore" and (self.reference is not None or "beta" in self.model_fields_set):
            raise ValueError("reference and beta belong to form='raw', got form='zscore'")
        return self


def columns(params: AlignmentPotential) -> tuple[str, ...]:
    """Flat columns that are read."""
    ends = ("max", "min") if params.spread == "group" else ("chosen", "rejected")
    rewards = tuple(f"rm_{params.rm}_{end}" for end in ends)
    if params.form == "zscore":
        return rewards + logps_columns(params.policy, "mean")
    assert params.reference is not None
    return rewards + logps_columns(params.policy, "sum") + logps_columns(params.reference, "sum")


def explicit(columns: Columns, params: AlignmentPotential) -> np.ndarray:
    """Reward margin of the pair (signed or absolute), or the reward spread of its group; float64 [N]."""
    if params.spread == "group":
        return columns[f"rm_{params.rm}_max"] - columns[f"rm_{params.rm}_min"]
    margin_N = columns[f"rm_{params.rm}_chosen"] - columns[f"rm_{params.rm}_rejected"]
    return np.abs(margin_N) if params.sign == "abs" else margin_N


def implicit(columns: Columns, params: AlignmentPotential) -> np.ndarray:
    """Absolute margin of the policy: of mean log-probs (z-score form) or of implicit rewards (raw); float64 [N]."""
    if params.form == "raw":
        return np.abs(reward_margin(columns, params.policy, params.reference, params.beta))
    chosen_N, rejected_N = (logps(columns, params.policy, side, "mean") for side in ("chosen", "rejected"))
    return np.abs(chosen_N - rejected_N)


def _moments(columns: Columns, params: AlignmentPotential, fitted: Fitted) -> dict[str, Need]:
    what = "alignment_potential: the {} margin"
    return {
        "explicit": Need(Statistic("moments", what.format("explicit")), explicit(columns, params)),
        "implicit": Need(Statistic("moments", what.format("implicit")), implicit(columns, params)),
    }


def rounds(params: AlignmentPotential) -> tuple:
    """One round of moments for the z-score form."""
    return (_moments,) if params.form == "zscore" else ()


def score(columns: Columns, params: AlignmentPotential, fitted: Fitted) -> np.ndarray:
    r"""$M_{AP} = z(m_{ex}) - w\,z(|\Delta\,\mathrm{mean}\log\pi|)$, or $m_{ex} - w\,|\hat r(y_w) - \hat r(y_l)|$ (raw).

    z uses the population standard deviation over the whole corpus. Source: "Larger or Smaller Reward Margins to Select
    Preferences for Alignment?" and its code. Deviations: a signed margin by default, and a constant column is an error
    instead of NaN scores.
    """
    explicit_N, implicit_N = explicit(columns, params), implicit(columns, params)
    if params.form == "zscore":
        explicit_N = standardise(explicit_N, fitted["explicit"])
        implicit_N = standardise(implicit_N, fitted["implicit"])
    return explicit_N - params.weight * implicit_N


METRIC = Metric(
    "alignment_potential",
    AlignmentPotential,
    columns,
    score,
    paper="Larger or Smaller Reward Margins to Select Preferences for Alignment?",
    rounds=rounds,
)
