"""Every node of a configuration, made one after another as the pipeline makes them, without its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefsel.making import make
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.passes import in_passes
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.ingest import ingest
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

QUIET = Progress(quiet=True)


def run(made: Any, workspace: Path | str) -> tuple[Plan, list[StageReport]]:
    storage = Storage(str(workspace))
    reports = ingest(made, storage, QUIET)
    plan = make_plan(made, storage)
    reports.append(resolve_eligible(plan, QUIET))
    for nodes in in_passes([node for node in all_nodes(plan) if node.kind != "eligible"]):
        reports += make(plan, nodes, QUIET)
    first: dict[str, StageReport] = {}
    for report in reports:  # a score that a control shares is reported once, as what made it
        first.setdefault(report.artifact, report)
    return plan, list(first.values())
