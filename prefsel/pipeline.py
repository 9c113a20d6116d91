"""The whole job, from files to a trained model and a page: ingest and eligibility, then every node of the plan.

    ingest ─▶ eligible ─▶ nodes, each after what it needs ─▶ report

Every node looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and parts of the job can as well be run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from prefsel.config import Config, EarlyStop, SelfPlay
from prefsel.config.lookup import find
from prefsel.errors import UserError
from prefsel.evaluate.intervals import Values, paired_difference
from prefsel.plan.check import check, check_budgets
from prefsel.plan.evaluations import (
    baseline_of,
    evaluation_plan,
    is_evaluated,
    models_to_evaluate,
    used_columns,
)
from prefsel.plan.made import EvolvedPrompts
from prefsel.plan.models import model_nodes
from prefsel.plan.node import Kind, Node
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.passes import in_passes
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.resources import check_resources, cluster_address
from prefsel.plan.rounds import generation_plan, last_node, round_plans
from prefsel.progress import Progress
from prefsel.report.evaluated import reward_measures
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.evaluate import evaluate
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
    "evaluate": lambda node: node.kind in ("model", "scratch", "selection"),
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
    if kind == "evaluation":
        return [evaluate(plan, node, progress)]
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
    if until == "evaluate" and config.evaluate is None:
        raise UserError("evaluate: the configuration asks for no evaluation; give it `evaluate`, with judges")
    check(config, storage)
    _start_ray(config, progress)
    _keep_config(config, storage)
    done = Done(progress)
    with progress.at("ingest"):
        done.add(ingest(config, storage, progress))
    plan = make_plan(config, storage)
    made, evaluations = list[MadeCorpus](), Evaluations(plan, progress)
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
        if until in (None, "evaluate"):
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


class Evaluations:
    """The evaluations of a run, as far as they are made: what is compared with the same model shares its answers."""

    def __init__(self, root: Plan, progress: Progress) -> None:
        """Begin with none.

        Args:
            root: The plan of the corpus that was read from files.
            progress: Where it is told.
        """
        self.root, self.progress, self.reports = root, progress, list[StageReport]()
        self._plans = dict[str, Plan]()

    def of_trainings(self) -> None:
        """Evaluate the policies that no round trains, as the configuration says."""
        if self.root.config.evaluate is None:
            return
        for name in models_to_evaluate(self.root.config):
            self.of(self.root, name, baseline_of(self.root.config, name))

    def of(self, outer: Plan, model: str, baseline: str | None, *, round_plan: Plan | None = None) -> StageReport:
        """Evaluate a model, and what it is compared with, unless that is done.

        Args:
            outer: Whose models may be named.
            model: Its name.
            baseline: What it is compared with, a model that no round trains; None: with nothing.
            round_plan: Of the round that trained it; None: a training of the configuration did, or none.
        """
        other = None
        if baseline is not None and baseline != model:
            self.of(self.root, baseline, None)
            other = self._plans[baseline]
        plan = evaluation_plan(outer, model, other, partial(self._chosen_by, model, round_plan))
        if other is None:
            if model in self._plans:
                return self._reported(self._plans[model], model)
            self._plans[model] = plan
        done = Done(self.progress, f"evaluation of {model}")
        make_all(plan, [plan.node("evaluation", model)], done)
        self.reports += done.reports
        return self._reported(plan, model)

    def _reported(self, plan: Plan, model: str) -> StageReport:
        path = plan.node("evaluation", model).path
        return next(report for report in self.reports if report.artifact == path)

    def _chosen_by(self, model: str, round_plan: Plan | None) -> Mapping[str, str]:
        """What chose, and where rounds made them labelled, the pairs that a model was trained on."""
        if round_plan is not None:
            return used_columns(round_plan, [model])
        training = find(self.root.config.train, model)
        if training is None:
            return {}
        return used_columns(self.root, [training.selection, getattr(training, "mixed_with", None)])


def play(plan: Plan, arm: SelfPlay, progress: Progress, evaluations: Evaluations) -> list[MadeCorpus]:
    """Play the rounds of self-play: each answers with the model of the one before, until none is left or none helps.

    Returns:
        The corpora that were made, two of a round that evolves its prompts.
    """
    compared_with = arm.policy
    if plan.config.evaluate is not None:
        compared_with = plan.config.evaluate.baseline or arm.policy
    before = None
    if arm.stop is not None:
        before = evaluations.of(plan, arm.policy, None if compared_with == arm.policy else compared_with)
    outer, played = plan, list[MadeCorpus]()
    for number in range(1, arm.rounds + 1):
        for one in round_plans(outer, arm, number):
            played.append(make_corpus(one, last_node(one), progress, arm=arm.name, number=number))
        outer, model = played[-1].plan, arm.trained_in(number)
        if arm.train is None or (arm.stop is None and not is_evaluated(plan.config, model)):
            continue
        after = evaluations.of(outer, model, compared_with, round_plan=outer)
        if arm.stop is not None and before is not None:
            rewards = reward_measures(plan.storage, [before, after])[f"reward by {arm.stop.judge}"]
            why = why_ended(arm.stop, rewards[before.name], rewards[after.name])
            if why and number < arm.rounds:
                progress.line(f"selfplay  {arm.name}: ended after round {number} of {arm.rounds}: {why}")
                break
            before = after
    return played


def why_ended(stop: EarlyStop, before: Values, after: Values) -> str:
    """Why no further round is begun, in words; empty where one is.

    Rewards are compared over the prompts of which both models have one, prompts counting alike: each over its own would
    rise when answers to hard prompts are of no use any more.

    Args:
        stop: When to end.
        before: The mean reward of every prompt, of the model that the round began with.
        after: That of the model it trained.
    """
    change = paired_difference(after, before)
    if change is None:
        return f"no prompt has a reward by {stop.judge} of the model before and of this one"
    if change.mean > stop.min_gain:
        return ""
    told = f"the mean reward by {stop.judge} changed by {change.mean:+.3g} over {change.num_prompts:,} prompts"
    return f"{told}; another round needs a rise of more than {stop.min_gain:g}"


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
