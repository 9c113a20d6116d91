"""Two selections of one name, before and after a refresh → what entered, what left, and how numbers moved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from prefsel.progress import Progress
from prefsel.select.changes import CHANGES, ChangesPass, Side
from prefsel.stages.shuffle import hash_shuffle
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import finished


@dataclass(frozen=True)
class Selected:
    """A selection at one time."""

    selection: StageReport
    scores: StageReport
    """Of the metric that it goes by."""


def compare_selections(storage: Storage, before: Selected, now: Selected, progress: Progress) -> StageReport:
    """Compare them; the changed pairs lie in `diffs/<name>@<before>-<now>`, with a summary.

    Returns:
        Rows in: pairs that either keeps; out: those that both keep; the others by why they entered or left.
    """
    started = time.monotonic()
    name = now.selection.name
    folder = f"diffs/{name}@{before.selection.fingerprint}-{now.selection.fingerprint}"
    if (done := finished(storage, folder)) is not None:
        return done
    then, today = _side(storage, before), _side(storage, now)
    keys = [key.rpartition("/") for key in sorted(then.shards | today.shards)]
    shards = [ShardRef(source, shard, "", number) for number, (source, _, shard) in enumerate(keys)]
    done_before: dict[str, dict[str, int]] = {}
    for source in storage.folders(folder):
        wanted = {shard.shard: folder for shard in shards if shard.source == source}
        found = Artifact(storage, f"{folder}/{source}").done(wanted)
        done_before |= {f"{source}/{name}": entry.info for name, entry in found.items() if entry.info}
    counts = hash_shuffle(ChangesPass(storage, then, today, folder), shards, progress, f"diff {name}", done=done_before)
    changed = {change: counts.get(change, 0) for change in CHANGES}
    stayed = counts.get("stayed", 0)
    report = StageReport(
        stage="diff",
        name=name,
        unit="pairs",
        rows_in=stayed + sum(changed.values()),
        rows_out=stayed,
        dropped=changed,
        shards=counts.get("shards", 0),
        computed_shards=counts.get("shards", 0),
        seconds=time.monotonic() - started,
        artifact=folder,
        details={"before": _numbers(before), "now": _numbers(now)},
    )
    save_summary(storage, report)
    return report


def _side(storage: Storage, one: Selected) -> Side:
    folder = one.selection.artifact
    shards = {
        f"{source}/{shard}"
        for source in storage.folders(folder)
        if source != "_ledger"
        for shard in Artifact(storage, f"{folder}/{source}").entries()
    }
    return Side(folder, one.scores.artifact, frozenset(shards))


def _numbers(one: Selected) -> dict[str, Any]:
    """What may drift: the scores of all that could be kept, the threshold, and the lengths of what was kept."""
    details = one.selection.details
    return {
        "selection": one.selection.artifact,
        "eligible": one.scores.rows_out,
        "kept": one.selection.rows_out,
        "scores": one.scores.details.get("moments"),
        "thresholds": details.get("thresholds"),
        "lengths": details.get("length", {}).get("kept"),
    }


def lines(report: StageReport) -> list[str]:
    """What a diff says, for people."""
    counts = report.dropped
    entered, left = (sum(counts[f"{word}_by_{why}"] for why in ("corpus", "itself")) for word in ("entered", "left"))
    told = [
        f"diff      {report.name}: {report.rows_out:,} pairs stayed, {entered:,} entered "
        f"({counts['entered_by_corpus']:,} by the corpus, {counts['entered_by_itself']:,} by themselves), "
        f"{left:,} left ({counts['left_by_corpus']:,} and {counts['left_by_itself']:,})"
    ]
    before, now = (report.details[time_] for time_ in ("before", "now"))
    drift = [
        f"{what} {_shown(_part(before, *path))} to {_shown(_part(now, *path))}"
        for what, path in (
            ("mean score of all", ("scores", "mean")),
            ("its deviation", ("scores", "std")),
            ("mean length of chosen kept", ("lengths", "chosen")),
            ("of rejected", ("lengths", "rejected")),
        )
        if _part(now, *path) is not None
    ]
    return [*told, f"diff      {report.name}: {'; '.join(drift)}"] if drift else told


def _part(table: Any, *path: str) -> float | None:
    for name in path:
        table = table.get(name) if isinstance(table, dict) else None
    return table if isinstance(table, int | float) else None


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"
