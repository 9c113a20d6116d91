"""The whole job, from files to a trained model and a page: ingest and eligibility, then every node of the plan.

    ingest ─▶ eligible ─▶ nodes, each after what it needs ─▶ report

Every node looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and parts of the job can as well be run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from prefsel.config import Config, SelfPlay
from prefsel.errors import UserError
from prefsel.plan.check import check, check_budgets
from prefsel.plan.made import EvolvedPrompts
from prefsel.plan.models import model_nodes
from prefsel.plan.node import Kind, Node
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.passes import in_passes
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.resources import check_resources, cluster_address
from prefsel.plan.rounds import generation_plan, last_node, round_plans
from prefsel.progress import Progress
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.evolve import evolve_prompts
from prefsel.stages.generate import generate
from prefsel.stages.ingest import ingest
from prefsel.stages.metric import score_metric
from prefsel.stages.pairing import pair_answers
from prefsel.stages.prompts import seed_prompts
from prefsel.stages.report import MadeCorpus, last_report, write_report
from prefsel.stages.score import require_imported, score
from prefsel.stages.scratch import make_scratch_models
from prefsel.stages.select import select, write_holdout
from prefsel.stages.session import connect, is_own
from prefsel.stages.tangent import make_tangent
from prefsel.stages.train import train
from prefsel.workspace.manifest import StageReport, config_text
from prefsel.workspace.storage import Storage, redact

UNTIL: dict[str, Callable[[Node], bool]] = {
    "train-reward": lambda node: node.kind == "model" and node.spec.role == "reward",
    "score": lambda node: node.kind == "columns",
    "select": lambda node: node.kind in ("scores", "selection"),
    "train": lambda node: node.kind == "model",
}
"""What a command that does a part of the job makes, besides what that needs."""


def make(plan: Plan, nodes: Sequence[Node], progress: Progress) -> list[StageReport]:
    """Make nodes that stand together in `passes.in_passes`, as far as they are not there; all that they need is."""
    kind: Kind = nodes[0].kind
    if kind == "columns":
        return score(plan, nodes, progress)
    (node, *_) = nodes
    if kind == "prompts":
        evolves = isinstance(node.spec, EvolvedPrompts)
        return [evolve_prompts(plan, node, progress) if evolves else seed_prompts(plan, node, progress)]
    if kind == "groups":
        return [generate(plan, node, progress)]
    if kind == "pairs":
        return [pair_answers(plan, node, progress)]
    if kind == "eligible":
        return [resolve_eligible(plan, progress)]
    if kind == "tangent":
        return [make_tangent(plan, node, progress)]
    if kind == "scores":
        return [score_metric(plan, node, progress)]
    if kind == "selection":
        return select(plan, node, progress)
    if kind == "model":
        return [train(plan, node, progress)]
    if kind == "scratch":
        return make_scratch_models(plan, nodes, progress)
    return write_holdout(plan, progress)


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
) -> Outcome:
    """Run the job, or the part of it that `until` names.

    Args:
        config: the run.
        workspace: directory or URI.
        progress: where it is told.
        until: only `ingest`, or `generate` or a key of `UNTIL`, and what that needs.
        tables: more tables for the report.
        always_report: write the page again although nothing was computed.

    Raises:
        UserError: the configuration cannot work; found before anything is started or written.
    """
    started = time.monotonic()
    storage = Storage(workspace)
    check(config, storage)
    _start_ray(config, progress)
    _keep_config(config, storage)
    done = Done(progress)
    with progress.at("ingest"):
        done.add(ingest(config, storage, progress))
    plan = make_plan(config, storage)
    made: list[MadeCorpus] = []
    if until != "ingest":
        with progress.at("eligible"):
            done.add([resolve_eligible(plan, progress)])
        check_budgets(config, done.reports[-1].rows_out)
        require_imported(plan)
        answering = [node for spec in config.generate for node in model_nodes(plan, spec.model)]
        asked = [node for node in all_nodes(plan) if until is None or (until in UNTIL and UNTIL[until](node))]
        make_all(plan, [*asked, *answering] if until in (None, "generate") else asked, done)
        if until in (None, "generate"):
            plans = [generation_plan(plan, spec) for spec in config.generate]
            made += [make_corpus(one, one.node("groups", one.made.policy), progress) for one in plans if one.made]
        if until is None:
            made += [one for arm in config.selfplay for one in play(plan, arm, progress)]
    reports = done.reports
    is_new = any(report.computed_shards for report in [*reports, *(r for one in made for r in one.reports)])
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


class Done:
    """What was made of one corpus, told as it is made."""

    def __init__(self, progress: Progress, label: str = "") -> None:
        """Begin with nothing.

        Args:
            progress: Where it is told.
            label: Of the corpus, where there are several.
        """
        self.progress, self.reports = progress, list[StageReport]()
        self._label = f"{label}: " if label else ""

    def add(self, stage: Sequence[StageReport]) -> None:
        """Keep and tell what a stage did, each artifact once: a score that a control shares is that of what made it."""
        known = {report.artifact for report in self.reports}
        for report in stage:
            if report.artifact not in known:
                self.reports.append(report)
                self.progress.line(f"{self._label}{report.sentence()}")
                self.progress.finished(f"{self._label}{report.stage} {report.name}")


def make_all(plan: Plan, wanted: Sequence[Node], done: Done) -> None:
    """Make nodes and all that they need, in passes; of a corpus read from files, eligibility was made before."""
    is_read = plan.made is None
    nodes = [node for node in in_order(wanted) if not (is_read and node.kind == "eligible")]
    for together in in_passes([node for node in nodes if plan.makes(node)]):
        with done.progress.at(", ".join(map(str, together))):
            done.add(make(plan, together, done.progress))


def play(plan: Plan, arm: SelfPlay, progress: Progress) -> list[MadeCorpus]:
    """Play the rounds of self-play: each answers with the model of the one before.

    Returns:
        The corpora that were made, two of a round that evolves its prompts.
    """
    outer, played = plan, list[MadeCorpus]()
    for number in range(1, arm.rounds + 1):
        for one in round_plans(outer, arm, number):
            played.append(make_corpus(one, last_node(one), progress, arm=arm.name, number=number))
        outer = played[-1].plan
    return played


def make_corpus(plan: Plan, last: Node, progress: Progress, *, arm: str = "", number: int = 0) -> MadeCorpus:
    """Make a corpus that a model answers, and what is done with it up to a node.

    Args:
        plan: Of the corpus.
        last: The node.
        progress: Where it is told.
        arm: The self-play it is a round of.
        number: Which round, from 1.
    """
    assert plan.made is not None, "it is made, not read"
    done = Done(progress, plan.made.name)
    make_all(plan, [last], done)
    return MadeCorpus(plan, done.reports, arm, number)


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
        storage.write("config.yaml", config_text(config).encode())
    except OSError as error:
        raise UserError(f"workspace: cannot write {redact(storage.uri)!r}: {redact(str(error))}") from error
