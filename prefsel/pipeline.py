"""The whole job, from files to a trained model and a page: ingest and eligibility, then every node of the graph.

    ingest ─▶ eligible ─▶ nodes in the order of `graph.ordered` ─▶ report

Every node looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and parts of the job can as well be run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.config import Config
from prefsel.plan.check import check, check_budgets
from prefsel.plan.graph import Node, all_nodes, in_passes, ordered
from prefsel.plan.lineage import Lineage
from prefsel.progress import Progress
from prefsel.stages.ingest import ingest
from prefsel.stages.metric import score_metric
from prefsel.stages.report import last_report, write_report
from prefsel.stages.score import score_together
from prefsel.stages.scratch import make_scratch_models
from prefsel.stages.select import resolve_eligible, select_node, write_holdout
from prefsel.stages.session import connect
from prefsel.stages.tangent import make_tangent
from prefsel.stages.train import train_node
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

UNTIL: dict[str, Callable[[Lineage, Node], bool]] = {
    "train-reward": lambda lineage, node: node.kind == "train" and lineage.training(node.name).kind == "reward",
    "score": lambda lineage, node: node.kind == "columns",
    "select": lambda lineage, node: node.kind in ("metric", "select"),
    "train": lambda lineage, node: node.kind == "train",
}
"""What a command that does a part of the job makes, besides what that needs."""


def build(lineage: Lineage, node: Node, progress: Progress) -> list[StageReport]:
    """Make one node, if it is not there; everything it needs is."""
    if node.kind == "columns":
        return build_columns(lineage, [node], progress)
    if node.kind == "tangent":
        return [make_tangent(lineage, node.name, progress)]
    if node.kind == "metric":
        return [score_metric(lineage, node.name, progress)]
    if node.kind == "select":
        return select_node(lineage, node.name, progress)
    if node.kind == "train":
        return train_node(lineage, node.name, progress)
    return make_scratch_models(lineage, progress) if node.kind == "scratch" else write_holdout(lineage, progress)


def build_columns(lineage: Lineage, nodes: Sequence[Node], progress: Progress) -> list[StageReport]:
    """Make columns that stand together in `graph.in_passes`."""
    return score_together(lineage, [lineage.scorer(node.name) for node in nodes], progress)


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
    """Run the job, or the part of it that `until` names.

    Args:
        config: the run.
        workspace: directory or URI.
        progress: where it is told.
        until: only `ingest`, or a key of `UNTIL` and what it needs.
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
    if until != "ingest":
        done(resolve_eligible(lineage, progress))
        check_budgets(config, reports[-1].rows_out)
        nodes = [node for node in all_nodes(lineage) if until is None or UNTIL[until](lineage, node)]
        for together in in_passes(lineage, ordered(lineage, nodes)):
            columns = together[0].kind == "columns"
            done(build_columns(lineage, together, progress) if columns else build(lineage, together[0], progress))
    is_new = any(report.computed_shards for report in reports)
    if until is not None:
        return Outcome(reports, None, is_new)
    page = last_report(lineage)
    if is_new or page is None or always_report:
        more = tables(lineage, reports) if tables else []
        page = write_report(lineage, reports, seconds=time.monotonic() - started, tables=more)
        is_new = True
    return Outcome(reports, page, is_new)
