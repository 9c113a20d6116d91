"""How many pairs a rule will keep, as far as its text and the number of eligible pairs say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefsel.plan.survey import Estimate


def kept_pairs(rule: Mapping[str, Any], eligible: Estimate) -> tuple[Estimate, str]:
    """The pairs that a rule keeps, and a sentence where its text does not decide that.

    A ratio and a count decide; a band keeps what lies between its percentiles; a threshold, judges that agree and an
    intersection without a budget depend on scores: they keep something between nothing and all that they are given.

    Args:
        rule: As the configuration writes it.
        eligible: Pairs it is given.
    """
    kind, budget = rule.get("kind"), rule.get("budget") or rule
    if kind == "dedupe":
        inner, note = kept_pairs(rule["rule"], eligible)
        return Estimate(
            inner.value, 0.0, inner.high
        ), note or "an upper end: repeated prompts or pairs are dropped first"
    if (count := budget.get("count")) is not None:
        return Estimate.exact(float(count)), ""
    if (ratio := budget.get("ratio")) is not None:
        return Estimate(*(math.floor(float(ratio) * one) for one in (eligible.value, eligible.low, eligible.high))), ""
    if kind == "band":
        share = (float(rule["high"]) - float(rule["low"])) / 100
        return eligible.times(1 - share if rule.get("reverse") else share), ""
    if kind == "intersect":
        most = min((kept_pairs(one, eligible)[0] for one in rule["rules"]), key=lambda one: one.value)
        return Estimate(most.value, 0.0, most.high), "an upper end: how far the rules agree is known only from scores"
    return Estimate(eligible.value, 0.0, eligible.high), "an upper end: how many it keeps is known only from scores"
