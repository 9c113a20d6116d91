"""Trainings → rows: what each saw, held-out numbers before and after, and what it proved about itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from prefsel.evaluate.intervals import Z_95, Values, estimate
from prefsel.evaluate.preference import agreements, margins_of
from prefsel.report.formatting import ABSENT, duration, is_number, number, percent, plain, text_of
from prefsel.report.tables import Table, table
from prefsel.workspace.manifest import StageReport

ROUNDING = 1e-3
"""Nats of margin that packing in another order can make."""


# ------------------------------------------------------------------------------------------------ held-out pairs


def accuracies(margins: pa.Table, when: str) -> Values:
    """Per held-out pair 100 where the model orders it as labelled, 50 for a tie, 0 where not; `when`: before, after."""
    found = agreements(margins_of(margins, when))
    return Values(found.items, found.prompts, 100 * found.value_N)


def held_out(training: Mapping[str, Any], margins: pa.Table | None) -> dict[str, dict[str, Any]]:
    """Accuracy before and after as `Estimate`s, in per cent: from the margins of single pairs where they were kept.

    Where they were not, the interval is that of a share, as if every pair were of a prompt of its own.
    """
    found = {}
    for when, evaluation in zip(("before", "after"), evaluated(training)):
        if margins is not None:
            values = accuracies(margins, when)
            one = estimate(values.value_N, values.prompts)
            found[when] = {} if one is None else _as_share(asdict(one))
        else:
            found[when] = share_estimate(evaluation)
    return found


def share_estimate(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    r"""An accuracy p over n pairs with a normal interval, \(p \pm 1.96\sqrt{p(1-p)/n}\), in per cent; or nothing."""
    share, pairs = evaluation.get("accuracy"), evaluation.get("num_pairs")
    if share is None or pairs is None or not (is_number(share) and is_number(pairs)) or pairs <= 0:
        return {}
    spread = 100 * Z_95 * math.sqrt(max(0.0, share * (1 - share)) / pairs)
    low, high = 100 * share - spread, 100 * share + spread
    return _as_share({"mean": 100 * share, "low": low, "high": high, "num_items": pairs})


def _as_share(found: dict[str, Any]) -> dict[str, Any]:
    """An interval of a share as far as there are shares: the normal one of few items reaches beyond."""
    inside = {side: min(100.0, max(0.0, found[side])) for side in ("low", "high") if is_number(found.get(side))}
    return {**found, **inside}


def evaluated(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out numbers before the first step and after the last one; empty where there are none."""
    found = sorted(training.get("evaluations") or [], key=lambda one: one.get("step") or 0)
    before = found[0] if found and not found[0].get("step") else {}
    after = found[-1] if found and found[-1].get("step") else {}
    return dict(before), dict(after)


def trainings(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per training: what it saw, and held-out numbers before and after."""
    rows = []
    for training in found:
        before, after = evaluated(training)
        share = training.get("held_out") or {}
        start, end = (share.get(when) or share_estimate(one) for when, one in (("before", before), ("after", after)))
        steps = max((record.get("step") or 0 for record in training.get("history") or []), default=None)
        ends = [percent(end.get(side), 100) for side in ("low", "high")]
        rows.append(
            [
                text_of(training.get("name")),
                text_of(training.get("selection")),
                number(training.get("num_pairs")),
                number(steps),
                number(after.get("num_pairs") or before.get("num_pairs")),
                percent(start.get("mean"), 100),
                percent(end.get("mean"), 100),
                " to ".join(ends) if ABSENT not in ends else ABSENT,
                number(before.get("loss")),
                number(after.get("loss")),
                number(after.get("margin")),
                duration(training.get("seconds")),
            ]
        )
    columns = {"Training": "text", "Selection": "text", "Pairs": "num", "Steps": "num", "Held-out pairs": "num"}
    columns |= {"Accuracy before": "num", "Accuracy after": "num", "95 % interval": "num"}
    columns |= {"Loss before": "num", "Loss after": "num", "Margin after": "num", "Time": "num"}
    return table(columns, rows)


def starts_at_reference(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some training began with the policy equal to its reference: held-out margins of zero up to rounding."""
    margins = [evaluated(training)[0].get("margin") for training in found]
    return any(is_number(margin) and abs(margin) < ROUNDING for margin in margins)


# --------------------------------------------------------------------------------------------------- self-checks


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


# ------------------------------------------------------------------------------------------------- reward models


def reward_table(reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """One row per reward model: how often it agrees with held-out labels, and how far to believe its confidence.

    Returns:
        None when none was trained.
    """
    rows = [_reward_row(report) for report in reports if report.stage == "reward"]
    if not rows:
        return None
    return {
        "title": "Reward models on held-out prompts",
        "note": "Agreement with the label before and after training (a tie counts half), and by whether the longer "
        "completion is chosen; calibration error: the mean gap between the model's confidence and how often it is "
        "right, over 10 bins of confidence; correlation of the margin with the length difference; and the share of "
        "pairs with the longer completion chosen, in the data and as drawn.",
        "columns": [
            *("model", "pairs", "held out", "before", "after", "longer chosen", "shorter chosen", "calibration error"),
            *("correlation with length", "longer in data", "longer drawn"),
        ],
        "rows": rows,
    }


def _reward_row(report: StageReport) -> list[Any]:
    """Cells of one reward model; None where nothing was measured."""
    before, after = (report.details.get(f"holdout_{when}") or {} for when in ("before", "after"))
    sampling = report.details.get("sampling") or {}
    return [
        report.name,
        report.rows_out,
        after.get("num_pairs"),
        before.get("accuracy"),
        after.get("accuracy"),
        after.get("accuracy_longer_chosen"),
        after.get("accuracy_shorter_chosen"),
        (after.get("calibration") or {}).get("expected_error"),
        after.get("length_correlation"),
        sampling.get("longer_chosen_share"),
        sampling.get("longer_chosen_frequency"),
    ]


def stage_warnings(report: StageReport) -> Iterator[str]:
    """Warnings that a stage kept in its details."""
    yield from report.details.get("warnings") or ()
    yield from (report.details.get("sampling") or {}).get("warnings") or ()
    if padded := report.details.get("padded_because"):
        yield f"rows are padded, not packed: {padded}"
