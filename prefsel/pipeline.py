"""Which stage needs which: the whole job, from files to a trained model and a page.

    ingest ─▶ eligible ─▶ scratch models ─▶ score ─▶ metrics ─▶ select ─▶ train ─▶ report

Every stage looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and the stages can as well be run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.check import check, check_budgets
from prefsel.config import Config
from prefsel.ingest.stage import ingest
from prefsel.lineage import Lineage
from prefsel.metrics.stage import score_metrics
from prefsel.progress import Progress
from prefsel.report.stage import last_report, write_report
from prefsel.score.stage import score
from prefsel.select.stage import resolve_eligible, select
from prefsel.session import connect
from prefsel.train.stage import make_scratch_models, train
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

STAGES: dict[str, Callable[[Lineage, Progress], list[StageReport]]] = {
    "eligible": resolve_eligible,
    "scratch": make_scratch_models,
    "score": score,
    "metrics": score_metrics,
    "select": select,
    "train": train,
}
"""What follows ingest, in order; each reads what the ones before it committed."""


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    reports: list[StageReport]
    page: str | None
    """Path of the report in the workspace; None when this run stopped before the end."""
    is_new: bool
    """Whether anything was computed."""


Tables = Callable[[Lineage, Sequence[StageReport]], Sequence[dict[str, Any]]]
"""More tables for the report, made when the stages are done."""


def run(
    config: Config,
    workspace: str,
    progress: Progress,
    *,
    until: str | None = None,
    tables: Tables | None = None,
    always_report: bool = False,
) -> Outcome:
    """Run every stage up to and including `until` (default: all, then the report).

    Args:
        config: the run.
        workspace: directory or URI.
        progress: where it is told.
        until: last stage: `ingest` or a key of `STAGES`.
        tables: more tables for the report.
        always_report: write the page again although nothing was computed.

    Raises:
        UserError: the configuration cannot work; found before anything is started or written.
    """
    started = time.monotonic()
    storage = Storage(workspace)
    storage.require_folder()
    check(config, storage)
    connect(config.ray, quiet=True)
    reports: list[StageReport] = []

    def done(stage: list[StageReport]) -> None:
        reports.extend(stage)
        for report in stage:
            progress.line(report.sentence())

    done(ingest(config, storage, progress))
    lineage = Lineage(config, storage)
    for name, stage in STAGES.items():
        if until == "ingest":
            break
        done(stage(lineage, progress))
        if name == "eligible":
            check_budgets(config, reports[-1].rows_out)
        if name == until:
            break
    is_new = any(report.computed_shards for report in reports)
    if until is not None:
        return Outcome(reports, None, is_new)
    page = last_report(lineage)
    if is_new or page is None or always_report:
        more = tables(lineage, reports) if tables else []
        page = write_report(lineage, reports, seconds=time.monotonic() - started, tables=more)
        is_new = True
    return Outcome(reports, page, is_new)
