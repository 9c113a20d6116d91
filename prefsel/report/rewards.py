"""Reward models of a run: how often they agree with held-out labels, and how far to believe their confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prefsel.workspace.manifest import StageReport


def reward_table(reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """One row per reward model; None when none was trained."""
    rows = [reward_row(report) for report in reports if report.stage == "reward"]
    if not rows:
        return None
    return {
        "title": "Reward models on held-out prompts",
        "note": "Agreement with the label before and after training, and by whether the longer completion is chosen; "
        "expected calibration error (10 bins of confidence); correlation of the margin with the length difference; and "
        "the share of pairs with the longer completion chosen, in the data and as drawn.",
        "columns": [
            *("model", "pairs", "held out", "before", "after", "longer chosen", "shorter chosen", "ECE", "r(length)"),
            *("longer in data", "longer drawn"),
        ],
        "rows": rows,
    }


def reward_row(report: StageReport) -> list[Any]:
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


def warnings_table(reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """What the stages warned of; None when nothing."""
    rows = [[report.stage, report.name, text] for report in reports for text in warnings_of(report)]
    return {"title": "Warnings", "note": "", "columns": ["stage", "name", "warning"], "rows": rows} if rows else None


def warnings_of(report: StageReport) -> Iterator[str]:
    """Warnings that a stage kept in its details."""
    yield from report.details.get("warnings") or ()
    yield from (report.details.get("sampling") or {}).get("warnings") or ()
    if padded := report.details.get("padded_because"):
        yield f"rows are padded, not packed: {padded}"
