"""Trainings → rows: what each saw, held-out numbers before and after, and what it proved about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.report.formatting import ABSENT, duration, is_number, number, percent, plain, text_of
from prefsel.report.tables import Table, table

ROUNDING = 1e-3
"""Nats of margin that packing in another order can make."""


def evaluated(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out numbers before the first step and after the last one; empty where there are none."""
    found = sorted(training.get("evaluations") or [], key=lambda one: one.get("step") or 0)
    before = found[0] if found and not found[0].get("step") else {}
    after = found[-1] if found and found[-1].get("step") else {}
    return dict(before), dict(after)


def standard_error(evaluation: Mapping[str, Any]) -> float | None:
    r"""Standard error of an accuracy over n pairs, \(\sqrt{p(1-p)/n}\)."""
    share, pairs = evaluation.get("accuracy"), evaluation.get("num_pairs")
    if share is None or pairs is None or not (is_number(share) and is_number(pairs)) or pairs <= 0:
        return None
    return math.sqrt(max(0.0, share * (1 - share)) / pairs)


def trainings(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per training: what it saw, and held-out numbers before and after."""
    rows = []
    for training in found:
        before, after = evaluated(training)
        steps = max((record.get("step") or 0 for record in training.get("history") or []), default=None)
        error = standard_error(after)
        rows.append(
            [
                text_of(training.get("name")),
                text_of(training.get("selection")),
                number(training.get("num_pairs")),
                number(steps),
                number(after.get("num_pairs") or before.get("num_pairs")),
                number(before.get("loss")),
                number(after.get("loss")),
                percent(before.get("accuracy")),
                percent(after.get("accuracy")),
                f"± {100 * error:.1f}" if error is not None else ABSENT,
                number(after.get("margin")),
                duration(training.get("seconds")),
            ]
        )
    columns = {"Training": "text", "Selection": "text", "Pairs": "num", "Steps": "num", "Held-out pairs": "num"}
    columns |= {"Loss before": "num", "Loss after": "num", "Accuracy before": "num", "Accuracy after": "num"}
    return table(columns | {"s.e. (points)": "num", "Margin after": "num", "Time": "num"}, rows)


def starts_at_reference(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some training began with the policy equal to its reference: held-out margins of zero up to rounding."""
    margins = [evaluated(training)[0].get("margin") for training in found]
    return any(is_number(margin) and abs(margin) < ROUNDING for margin in margins)


def self_checks(training: Mapping[str, Any]) -> Table:
    """What the training proved about itself before and after."""
    rows = [
        (text_of(one.get("name")), *(plain(one.get(key)) for key in ("value", "expected", "tolerance")), _verdict(one))
        for one in training.get("self_checks") or []
    ]
    columns = {"Self-check": "text", "Value": "num", "Expected": "num", "Tolerance": "num", "Verdict": "text"}
    return table(columns, rows)


def _verdict(one: Mapping[str, Any]) -> str:
    is_ok = one.get("ok")
    return ABSENT if is_ok is None else "passed" if is_ok else "FAILED"
