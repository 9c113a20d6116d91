"""Rounds of self-play and the evaluations of their models: a round answers with the model of the one before.

corpus of round k ─▶ model k ─▶ evaluation ─▶ corpus of round k + 1, or the end
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from prefsel.config import EarlyStop, SelfPlay
from prefsel.config.lookup import find
from prefsel.evaluate.intervals import Values, paired_difference
from prefsel.making import Done, make_all, make_corpus
from prefsel.plan.evaluations import (
    baseline_of,
    evaluation_plan,
    is_evaluated,
    models_to_evaluate,
    used_columns,
)
from prefsel.plan.plan import Plan
from prefsel.plan.rounds import last_node, round_plans
from prefsel.progress import Progress
from prefsel.report.evaluated import reward_measures
from prefsel.stages.report import MadeCorpus
from prefsel.workspace.manifest import StageReport


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
