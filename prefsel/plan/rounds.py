"""Rounds of self-play as plans: each is a corpus that a policy makes, and what a configuration would do with it.

round k:  answers of the policy ─▶ pairs ─▶ metric ─▶ selection ─▶ training `<name>-k`
evolve:   answers to seed prompts ─▶ pairs ─▶ metric ─▶ the best prompts ─▶ new prompts ─▶ their answers ─▶ …
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefsel.config import CausalLogps, Config, Generation, MetricSpec, Selection, SelfPlay, TrainDpo
from prefsel.errors import UserError, invalid
from prefsel.metrics import METRICS
from prefsel.metrics.table import find_metric
from prefsel.plan.columns import scorers_for
from prefsel.plan.made import EvolvedPrompts, Made, SeedPrompts
from prefsel.plan.models import head_names
from prefsel.plan.node import Node
from prefsel.plan.nodes import made_plan
from prefsel.plan.plan import Plan


def round_plans(outer: Plan, arm: SelfPlay, number: int) -> list[Plan]:
    """The plans of a round, in the order they are made: the last one trains.

    Args:
        outer: The plan of the round before, or of the corpus.
        arm: The rounds.
        number: Of the round, from 1.

    Raises:
        UserError: a judge, a metric or a parameter that there is not.
    """
    label, policy = arm.trained_in(number), arm.model_of(number)
    config = round_config(outer, arm, number)
    judges = tuple(one.label for judge in arm.judges for one in judge.expanded(config))
    rewards = judge_rewards(outer, arm)
    seeds = SeedPrompts(
        part=arm.prompts.part,
        count=arm.prompts.count,
        seed=arm.prompts.seed,
        skip=(number - 1) * (arm.prompts.count or 0),
        later=0 if arm.stop is not None else (arm.rounds - number) * (arm.prompts.count or 0),
        per_shard=arm.generation.prompts_per_shard,
    )
    shared: dict[str, Any] = {"policy": policy, "generation": arm.generation, "judges": judges, "rewards": rewards}
    shared |= {"pairing": _pairing(arm, policy), "beside": tuple(one for one in arm.beside if one != policy)}
    if arm.evolve is None:
        return [made_plan(outer, config, Made(label, prompts=seeds, **shared))]
    first = made_plan(outer, _without_training(config, arm, number), Made(f"{label}-seeds", prompts=seeds, **shared))
    models = tuple(name for judge in arm.judges for name in judge.models(config))
    evolved = EvolvedPrompts(first, f"{label}-seeds", arm.evolve, models, arm.generation.prompts_per_shard)
    return [first, made_plan(outer, config, Made(label, prompts=evolved, **shared))]


def _without_training(config: Config, arm: SelfPlay, number: int) -> Config:
    """What is done with the answers to seed prompts: they are scored by what the metric reads, and nothing is trained.

    So the reference of the training has nothing to say of them, unless it answered them itself.
    """
    label, reference = arm.trained_in(number), arm.reference_of(number)
    (metric,) = config.metrics
    is_read = reference is None or reference == arm.model_of(number) or reference in _texts(metric.params)
    scorers = [one for one in config.scorers if is_read or one.reference_model != reference]
    return config.model_copy(update={"scorers": scorers, "train": [one for one in config.train if one.name != label]})


def _texts(value: Any) -> set[str]:
    """Every text in a metric's parameters: among them the models whose columns it reads."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        value = list(value.values())
    return {text for one in value for text in _texts(one)} if isinstance(value, list) else set()


def _pairing(arm: SelfPlay, policy: str) -> Any:
    """How pairs are made in a round, with the policy that answers in place of `$policy`."""
    names = {key: policy for key, value in arm.pairs if value == "$policy"}
    return arm.pairs.model_copy(update=names) if names else arm.pairs


def last_node(plan: Plan) -> Node:
    """What a plan of a round is made for: its model, or where it trains nothing its subset."""
    assert plan.made is not None, "a plan of a round is that of a corpus that is made"
    label = plan.made.name
    is_trained = any(spec.name == label for spec in plan.config.train)
    return plan.node("model" if is_trained else "selection", label)


def generation_plan(outer: Plan, spec: Generation) -> Plan:
    """The plan of answers that nothing is done with."""
    seeds = SeedPrompts(spec.prompts.part, spec.prompts.count, spec.prompts.seed, per_shard=spec.prompts_per_shard)
    return made_plan(outer, outer.config, Made(spec.name, policy=spec.model, prompts=seeds, generation=spec))


def judge_rewards(outer: Plan, arm: SelfPlay) -> tuple[str, ...]:
    """The rewards that pairs of an arm are made by: one, or all of them where the pairing compares several.

    Raises:
        UserError: there is none that decides, or there are too few to compare.
    """
    columns = _judge_columns(outer, arm)
    if arm.pairs.kind == "by_generator":
        return ()
    if arm.pairs.kind == "confidence":
        if len(columns) < 2:
            valid = "two rewards or more, whose agreement makes the bounds of confidence"
            raise invalid(f"selfplay.{arm.name}.judges", ", ".join(columns), valid)
        return tuple(column.removeprefix("rm_") for column in columns)
    return (arm.reward(columns),)


def _judge_columns(outer: Plan, arm: SelfPlay) -> list[str]:
    """The rewards of an arm's judges, in order."""
    return [
        column
        for judge in arm.judges
        for one in judge.expanded(outer.config)
        for column in one.columns(outer.config, partial(head_names, outer))
    ]


def metric_reward(outer: Plan, arm: SelfPlay) -> str | None:
    """The reward that `$rm` stands for: that which `judge` names, else the first that pairs are made by.

    Pairs by_generator are made by none; there it is the only one. None: there is no such reward.

    Raises:
        UserError: `judge` names none.
    """
    columns = _judge_columns(outer, arm)
    if arm.judge is not None or (arm.pairs.kind == "by_generator" and len(columns) == 1):
        return arm.reward(columns)
    return next(iter(judge_rewards(outer, arm)), None)


def round_config(outer: Plan, arm: SelfPlay, number: int) -> Config:
    """What is done with the corpus of a round, as the configuration of a run says it."""
    config, label = outer.config, arm.trained_in(number)
    policy, reference = arm.model_of(number), arm.reference_of(number)
    names = {"$policy": policy, "$reference": reference or policy}
    names |= {"$rm": reward} if (reward := metric_reward(outer, arm)) is not None else {}
    metric = MetricSpec(
        name=label, metric=arm.metric.metric, params=filled_params(arm.metric.metric, arm.metric.params, names)
    )
    scorers = [*arm.judges, logps_scorer(outer, policy, arm.policy)]
    if reference is not None and reference != policy:
        scorers.append(logps_scorer(outer, reference, arm.policy))
    made = {one.label for one in scorers}
    scorers += [one for one in _for_metric(outer, metric) if one.label not in made]
    top = {"kind": "top", "score": f"score_{label}"}
    selections = [Selection(name=label, rule=top | arm.budget)]
    if arm.evolve is not None:
        selections.append(Selection(name=f"{label}-seeds", rule=top | {"ratio": arm.evolve.share}, dataset="never"))
    training = (
        []
        if arm.train is None
        else [
            TrainDpo(
                **arm.train.model_dump(),
                name=label,
                selection=label,
                model=policy if arm.start == "previous" else arm.policy,
                reference=reference,
                mixed_with=arm.mixed_with,
            )
        ]
    )
    changes: dict[str, Any] = {"scorers": scorers, "tangents": [], "metrics": [metric], "selections": selections}
    return config.model_copy(update=changes | {"train": [*config.train, *training]})


def filled_params(metric: str, params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of a metric, with what a round gives in place of `$rm` and the like, and where nothing is given.

    Args:
        metric: Its name.
        params: As the configuration gives them.
        names: `$rm`, `$policy`, `$reference` → a name.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, Mapping):
            return {key: replaced(one) for key, one in value.items()}
        return [replaced(one) for one in value] if isinstance(value, list) else value

    fields = METRICS[metric].params.model_fields if metric in METRICS else {}
    required = {key for key, field in fields.items() if field.is_required()}
    given = {key: name for mark, name in names.items() if (key := mark.removeprefix("$")) in required}
    return given | {key: replaced(value) for key, value in params.items()}


def logps_scorer(outer: Plan, model: str, like: str) -> CausalLogps:
    """The scorer of a model's log-probs, with the pool and the budget that `scorers` gives the model `like`."""
    known = next((one for one in outer.root.config.scorers if one.reference_model == like), None)
    if isinstance(known, CausalLogps):
        return known.model_copy(update={"model": model})
    return CausalLogps(kind="causal_logps", model=model)


def _for_metric(outer: Plan, spec: MetricSpec) -> list[Any]:
    """Scorers of the configuration that the metric of a round reads besides judges and policies."""
    metric, params = find_metric(spec.metric, spec.params)
    found = []
    for column in metric.columns(params):
        try:
            found += scorers_for(outer.root, [column], field=spec.name)
        except UserError:  # of the round itself, else its plan says so
            continue
    return found
