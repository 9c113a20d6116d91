"""The whole job, from files to a trained model and a page: ingest and eligibility, then every node of the plan.

    ingest ─▶ eligible ─▶ nodes, each after what it needs ─▶ report

Every node looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and parts of the job can as well be run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from prefsel.config import Config
from prefsel.damage import until_whole
from prefsel.display import redact
from prefsel.errors import DamagedError, UserError
from prefsel.making import Done, make_all, make_corpus
from prefsel.plan.check import check, check_budgets
from prefsel.plan.models import model_nodes
from prefsel.plan.node import Node
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.pinned import Former
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.resources import check_resources, cluster_address
from prefsel.plan.rounds import generation_plan
from prefsel.play import Evaluations, play
from prefsel.progress import Progress
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.ingest import ingest
from prefsel.stages.report import MadeCorpus, last_report, write_report
from prefsel.stages.score import require_imported
from prefsel.stages.session import connect, is_own
from prefsel.withdraw.removal import finish_withdrawals
from prefsel.workspace.lease import hold, require_no_writer
from prefsel.workspace.manifest import StageReport, config_text
from prefsel.workspace.patience import as_input
from prefsel.workspace.storage import Storage

UNTIL: dict[str, Callable[[Node], bool]] = {
    "train-reward": lambda node: node.kind == "model" and node.spec.role == "reward",
    "score": lambda node: node.kind == "columns",
    "select": lambda node: node.kind in ("scores", "selection"),
    "train": lambda node: node.kind == "model",
    "evaluate": lambda node: node.kind in ("model", "scratch", "selection"),
}
"""What a command that does a part of the job makes, besides what that needs."""


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    reports: list[StageReport]
    page: str | None
    """Path of the report in the workspace; None when this run stopped before the end."""
    is_new: bool
    """Whether anything was computed."""
    made: list[MadeCorpus] = field(default_factory=list)
    """The corpora that models answered."""


Tables = Callable[[Plan, Sequence[StageReport]], Sequence[dict[str, Any]]]
"""More tables for the report, made when the stages are done."""


def run(
    config: Config,
    workspace: str,
    progress: Progress,
    *,
    until: str | None = None,
    tables: Tables | None = None,
    always_report: bool = False,
    former: Former | None = None,
    trains: bool = True,
    wait: bool = False,
) -> Outcome:
    """Run the job, or the part of it that `until` names, as the only writer of the workspace.

    Args:
        config: the run.
        workspace: directory or URI.
        progress: where it is told.
        until: only `ingest`, or `generate` or a key of `UNTIL`, and what that needs.
        tables: more tables for the report.
        always_report: write the page again although nothing was computed.
        former: what an earlier run made and this one goes by.
        trains: also train what nothing is scored with, answer and evaluate; otherwise end with the selections.
        wait: wait for the end of another run that writes to the workspace.

    Raises:
        UserError: the configuration cannot work; found before anything is started or written.
        RefusedError: another run writes to the workspace.
    """
    storage = Storage(workspace)
    if until == "evaluate" and config.evaluate is None:
        raise UserError("evaluate: the configuration asks for no evaluation; give it `evaluate`, with judges")
    is_checked = False
    with suppress(DamagedError):  # checked again where it may be set aside
        check(config, storage)
        is_checked = True
    started = time.monotonic()
    if not wait:
        require_no_writer(storage)
    _start_ray(config, progress)

    def once() -> Outcome:
        nonlocal is_checked
        if not is_checked:
            check(config, held)
        is_checked = False
        return _run(config, held, progress, until, tables, always_report, started, former, trains)

    with hold(storage, wait=wait, tell=progress.line) as held:
        return until_whole(held, progress, once)


def _run(
    config: Config,
    storage: Storage,
    progress: Progress,
    until: str | None,
    tables: Tables | None,
    always_report: bool,
    started: float,
    former: Former | None,
    trains: bool,
) -> Outcome:
    """One pass over the job, on a workspace that is held: everything that is not there."""
    _keep_config(config, storage)
    done = Done(progress)
    for record in finish_withdrawals(storage):
        progress.line(f"withdraw  {record.id}, begun {record.when}, is finished now")
    with progress.at("ingest"):
        done.add(ingest(config, storage, progress))
    plan = make_plan(config, storage, former)
    made, evaluations = list[MadeCorpus](), Evaluations(plan, progress)
    if until != "ingest":
        with progress.at("eligible"):
            done.add([resolve_eligible(plan, progress)])
        check_budgets(config, done.reports[-1].rows_out)
        require_imported(plan)
        answering = [node for spec in config.generate for node in model_nodes(plan, spec.model)]
        asked = [node for node in all_nodes(plan) if until is None or (until in UNTIL and UNTIL[until](node))]
        if not trains:
            asked = in_order(node for node in asked if node.kind in ("columns", "scores", "selection", "dataset"))
        make_all(plan, [*asked, *answering] if until in (None, "generate") and trains else asked, done)
        if until in (None, "generate") and trains:
            plans = [generation_plan(plan, spec) for spec in config.generate]
            made += [make_corpus(one, one.node("groups", one.made.policy), progress) for one in plans if one.made]
        if until in (None, "evaluate") and trains:
            evaluations.of_trainings()
            made += [one for arm in config.selfplay for one in play(plan, arm, progress, evaluations)]
    reports = done.reports
    everything = [*reports, *evaluations.reports, *(report for one in made for report in one.reports)]
    is_new = any(report.computed_shards for report in everything)
    reports += [report for report in evaluations.reports if report.stage == "evaluate"]
    if until is not None:
        return Outcome(reports, None, is_new, made)
    page = last_report(plan)
    if is_new or page is None or always_report:
        more = tables(plan, reports) if tables else []
        with progress.phase("writing the report"):
            seconds = time.monotonic() - started
            page = write_report(plan, reports, seconds=seconds, made=made, tables=more)
        is_new = True
    return Outcome(reports, page, is_new, made)


def _start_ray(config: Config, progress: Progress) -> None:
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


def _keep_config(config: Config, storage: Storage) -> None:
    """Write the resolved configuration into the workspace, before anything else.

    Raises:
        UserError: the workspace cannot be written.
    """
    try:
        with as_input("workspace"):
            storage.write("config.yaml", config_text(config).encode())
    except OSError as error:
        raise UserError(f"workspace: cannot write {redact(storage.uri)!r}: {redact(str(error))}") from error
