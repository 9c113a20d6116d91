"""What a run says when it is done: what was made and kept, how long each stage took, where the report is, what next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prefsel.progress import clock
from prefsel.workspace.manifest import StageReport

WORDS = {
    **{"ingest": "source", "scratch": "small model", "score": "column set", "tangent": "tangent"},
    **{"metric": "pair score", "fuse": "fused score", "select": "selection", "reward": "reward model"},
    **{"train": "training", "generate": "generation", "pair": "pairing"},
}
"""What a stage makes, one each time."""
MAX_STAGES = 8
"""Stages whose seconds are named, the longest ones; the report has all."""


def closing(
    reports: Sequence[StageReport], *, seconds: float, workspace: str, page: str | None, then: Sequence[str]
) -> Iterator[str]:
    """Lines about a run that computed something.

    Args:
        reports: What its stages did.
        seconds: How long it took, models and Ray started.
        workspace: Where its artifacts lie, as the user may name it in a next command.
        page: Where the report lies; None for a part of the job.
        then: Commands that make sense now.
    """
    yield ""
    computed = [report for report in reports if report.computed_shards]
    there = len(reports) - len(computed)
    yield f"done in {clock(seconds)}; workspace {workspace}" + (f"; {there} stages were there already" if there else "")
    made = Counter(WORDS[report.stage] for report in computed if report.stage in WORDS)
    if made:
        parts = (f"{count} {what}{'s' if count > 1 else ''}" for what, count in made.items())
        yield f"  {'made':<9} {', '.join(parts)}"
    for stage, told in (("eligible", "eligible"), ("select", "kept"), ("train", "trained"), ("reward", "trained")):
        for report in (report for report in reports if report.stage == stage and report.rows_in):
            name = "" if stage == "eligible" else f" {report.name}:"
            share = f" ({report.rows_out / report.rows_in:.1%})" if report.rows_in and stage != "train" else ""
            flow = f"{report.rows_out:,} of {report.rows_in:,} {report.unit}{share}"
            yield f"  {told:<9}{name} {flow}" + ("" if stage == "eligible" else f"  {_place(report)}")
    if computed:
        slow = sorted(computed, key=lambda report: -report.seconds)[:MAX_STAGES]
        stages = ", ".join(f"{report.stage} {report.name} {report.seconds:,.1f}" for report in slow)
        yield f"  {'seconds':<9} {stages}"
    if page:
        yield f"  {'report':<9} {page}"
    for number, command in enumerate(then):
        yield f"  {'next' if not number else '':<9} {command}"


def _place(report: StageReport) -> str:
    return str(report.details.get("dataset") or report.artifact)
