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

import ray

from prefsel.check import check, check_budgets
from prefsel.config import Config
from prefsel.configfile import resolved
from prefsel.errors import UserError
from prefsel.graph import Node, all_nodes, in_passes, ordered
from prefsel.ingest.stage import ingest
from prefsel.lineage import Lineage
from prefsel.metrics.stage import score_metric
from prefsel.progress import Progress
from prefsel.report.stage import last_report, write_report
from prefsel.resources import check_resources, cluster_address
from prefsel.score.stage import require_imported, score_together
from prefsel.score.tangents import make_tangent
from prefsel.select.stage import resolve_eligible, select_node, write_holdout
from prefsel.session import connect, is_own
from prefsel.train.stage import make_scratch_models, train_node
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage, redact

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
    check(config, storage)
    start_ray(config, progress)
    keep_config(config, storage)
    reports: list[StageReport] = []

    def done(stage: list[StageReport]) -> None:
        reports.extend(stage)
        for report in stage:
            progress.line(report.sentence())
            progress.finished(f"{report.stage} {report.name}")

    with progress.at("ingest"):
        done(ingest(config, storage, progress))
    lineage = Lineage(config, storage)
    if until != "ingest":
        with progress.at("eligible"):
            done(resolve_eligible(lineage, progress))
        check_budgets(config, reports[-1].rows_out)
        require_imported(lineage)
        nodes = [node for node in all_nodes(lineage) if until is None or UNTIL[until](lineage, node)]
        for together in in_passes(lineage, ordered(lineage, nodes)):
            columns = together[0].kind == "columns"
            with progress.at(", ".join(map(str, together))):
                done(build_columns(lineage, together, progress) if columns else build(lineage, together[0], progress))
    is_new = any(report.computed_shards for report in reports)
    if until is not None:
        return Outcome(reports, None, is_new)
    page = last_report(lineage)
    if is_new or page is None or always_report:
        more = tables(lineage, reports) if tables else []
        with progress.phase("writing the report"):
            page = write_report(lineage, reports, seconds=time.monotonic() - started, tables=more)
        is_new = True
    return Outcome(reports, page, is_new)


def start_ray(config: Config, progress: Progress) -> None:
    """Join or start a Ray that can hold every pool and every training; a cluster may still grow.

    Raises:
        UserError: no cluster answers, or one of them can never fit.
    """
    address = cluster_address(config.ray)
    with progress.phase(f"joining Ray at {redact(address)}" if address else "starting Ray"):
        connect(config.ray, quiet=True)
    if is_own():
        have = ray.cluster_resources()
        check_resources(config, {name: have.get(name, 0.0) for name in ("CPU", "GPU")})


def keep_config(config: Config, storage: Storage) -> None:
    """Write the resolved configuration into the workspace, before anything else.

    Raises:
        UserError: the workspace cannot be written.
    """
    try:
        storage.write("config.yaml", resolved(config).encode())
    except OSError as error:
        raise UserError(f"workspace: cannot write {redact(storage.uri)!r}: {redact(str(error))}") from error
