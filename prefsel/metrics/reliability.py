r"""Reliability (RE-PO): how probable it is that a pair's label is right, given its margin and who labelled it.

N: pairs of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, model_validator

from prefsel.config import Options
from prefsel.metrics.implicit_margin import logps_columns, reward_margin
from prefsel.metrics.statistics import Columns, Fitted, Metric, Need, Statistic

NAMED = 5
"""So many groups are named in a warning."""


class Reliability(Options):
    """Parameters of `reliability`."""

    policy: str
    """Name of the policy: reads `logps_<policy>_chosen|rejected`."""
    reference: str
    """Name of the reference: reads `logps_<reference>_chosen|rejected`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature β of the implicit reward: how sure a margin makes. That of the training whose loss is to be
    weighed."""
    by: str = "source"
    """Column that says who labelled a pair: `source`, `aspect`, or a field of the data such as `annotator`, which a
    source must `carry`. A pair without one has no score."""

    @model_validator(mode="after")
    def _two_models(self) -> Reliability:
        if self.policy == self.reference:
            raise ValueError(f"reference: got {self.reference!r}, the policy itself, whose margins are all 0")
        return self


def columns(params: Reliability) -> tuple[str, ...]:
    """Flat columns that are read."""
    return (params.by, *(name for one in (params.policy, params.reference) for name in logps_columns(one, "sum")))


def labels(params: Reliability) -> dict[str, None]:
    """A group may have any name."""
    return {params.by: None}


def _margin(columns: Columns, params: Reliability) -> np.ndarray:
    return reward_margin(columns, params.policy, params.reference, params.beta)


def _shares(columns: Columns, params: Reliability, fitted: Fitted) -> dict[str, Need]:
    """η of every group, over all its pairs."""
    statistic = Statistic("label_share", f"reliability: the margins by {params.by}")
    return {"eta": Need(statistic, _margin(columns, params), group_N=columns[params.by])}


def rounds(params: Reliability) -> tuple:
    """One search for η, of as many passes as it takes."""
    return (_shares,)


def score(columns: Columns, params: Reliability, fitted: Fitted) -> np.ndarray:
    r"""$w = p\eta_s / (p\eta_s + (1-p)(1-\eta_s))$ with $p = \sigma(IRM)$, s the pair's group; float64 [N], 0 to 1.

    Computed as $\sigma(IRM + \log\eta_s - \log(1-\eta_s))$, which neither overflows nor divides 0 by 0.

    Source: RE-PO (ICLR 2026). There η_s follows the mean of w over the batches of a training (an exponential moving
    average with weight 0.1, from 0.9), as the policy moves. Deviation: here the policy is a fixed one, and η_s is the
    fixed point itself, mean of w over the group = η_s, of the whole corpus (`numbers.label_share`).
    """
    groups, place_N = np.unique(columns[params.by].astype(str), return_inverse=True)
    with np.errstate(divide="ignore"):  # η of 0 or 1 decides by itself
        right_G, wrong_G = (np.log([fitted[name][group] for group in groups]) for name in ("eta", "eta_wrong"))
    logit_N = _margin(columns, params) + (right_G - wrong_G)[place_N]
    return np.asarray(np.exp(-np.logaddexp(0.0, -logit_N)))


def warnings(params: Reliability, fitted: Fitted) -> Sequence[str]:
    """Groups more of whose labels count as wrong than as right; and whether no label of any group counts as wrong."""
    shares = fitted["eta"]
    if min(shares.values()) == 1.0:
        return (
            f"reliability: every label counts as right with certainty, as η is 1 for every {params.by}: the margins "
            "contradict too few labels, or too weakly, and these weights weigh nothing; a policy that was trained "
            "longer, on other pairs than it scores, has larger margins",
        )
    turned = [f"{name} ({share:.3g})" for name, share in shares.items() if share < 0.5]
    if not turned:
        return ()
    shown = ", ".join(turned[:NAMED]) + (", …" if len(turned) > NAMED else "")
    return (
        f"reliability: of {len(turned):,} of {len(shares):,} values of {params.by} more labels count as wrong "
        f"than as right: {shown}; margins near 0 leave this open, see the policy's margins before it weighs anything",
    )


METRIC = Metric(
    "reliability",
    Reliability,
    columns,
    score,
    paper="RE-PO, ICLR 2026",
    rounds=rounds,
    labels=labels,
    warnings=warnings,
)
