"""Nodes of a plan, made: each by its stage, after what it needs, told as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prefsel.errors import PrefselError
from prefsel.plan.made import EvolvedPrompts
from prefsel.plan.node import Kind, Node
from prefsel.plan.passes import in_passes
from prefsel.plan.pinned import PinnedNode
from prefsel.plan.plan import Plan, in_order
from prefsel.progress import Progress
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.evaluate import evaluate
from prefsel.stages.metric import score_metric
from prefsel.stages.pairing import pair_answers
from prefsel.stages.prompts import seed_prompts
from prefsel.stages.report import MadeCorpus
from prefsel.stages.score import score
from prefsel.stages.scratch import make_scratch_models
from prefsel.stages.select import select, write_holdout
from prefsel.stages.tangent import make_tangent
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.verify import finished


def make(plan: Plan, nodes: Sequence[Node], progress: Progress) -> list[StageReport]:
    """Make nodes that stand together in `passes.in_passes`, as far as they are not there; all that they need is.

    What answers and trains is imported where it is needed: with torch and transformers it takes seconds.
    """
    if kept := [node for node in nodes if isinstance(node, PinnedNode)]:
        made = [node for node in nodes if node not in kept]
        return [*map(partial(_kept, plan), kept), *(make(plan, made, progress) if made else [])]
    kind: Kind = nodes[0].kind
    if kind == "columns":
        return score(plan, nodes, progress)
    (node, *_) = nodes
    if kind == "prompts":
        if not isinstance(node.spec, EvolvedPrompts):
            return [seed_prompts(plan, node, progress)]
        from prefsel.stages.evolve import evolve_prompts

        return [evolve_prompts(plan, node, progress)]
    if kind == "groups":
        from prefsel.stages.generate import generate

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
        from prefsel.stages.train import train

        return [train(plan, node, progress)]
    if kind == "scratch":
        return make_scratch_models(plan, nodes, progress)
    return write_holdout(plan, progress)


def _kept(plan: Plan, node: Node) -> StageReport:
    """The report of what an earlier run made and this one keeps.

    Raises:
        PrefselError: it is gone, or was set aside because it was damaged.
    """
    if (done := finished(plan.storage, node.path)) is None:
        raise PrefselError(
            f"refresh: {node.path}, which scored the corpus before, is gone; --retrain-scorers makes it anew, and "
            "scores everything with it"
        )
    return done


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
