"""Evaluations as plans: a model and what it is compared with answer the same prompts, and the same judges read both.

    prompts ─┬─▶ answers of the model ─▶ columns of the judges, divergence ─┐
             └─▶ answers of the baseline ─▶ columns of the judges ──────────┴─▶ evaluation

Both are corpora that a model makes, so that models with one baseline share its answers and its columns, and a second
evaluation of what was answered before costs its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefsel.config import Config, ModelDivergence
from prefsel.config.lookup import find
from prefsel.plan.columns import scorers_for
from prefsel.plan.evaluated import judge_identity
from prefsel.plan.made import Evaluated, Made, SeedPrompts
from prefsel.plan.nodes import made_plan
from prefsel.plan.plan import Plan
from prefsel.plan.scores import metric_columns
from prefsel.rules import rule_scores

MODEL_KEYS = ("model", "policy", "reference")
"""Where records name a model that they use."""


def finals(config: Config) -> list[Any]:
    """The trainings that nothing else of the configuration uses: what it is all done for."""
    users = (*config.scorers, *config.tangents, *config.train, *config.selfplay)
    used = {getattr(spec, key, None) for spec in users for key in MODEL_KEYS}
    return [spec for spec in config.train if spec.role == "policy" and spec.name not in used and not spec.cross_fit]


def models_to_evaluate(config: Config) -> list[str]:
    """The models that are evaluated, those of rounds left out: as `evaluate.models` says, or the final policies."""
    assert config.evaluate is not None, "asked of configurations that evaluate"
    if config.evaluate.models is None:
        return [spec.name for spec in finals(config)]
    return [name for name in config.evaluate.models if name not in config.round_models]


def is_evaluated(config: Config, model: str) -> bool:
    """Whether the model of a round is evaluated."""
    return config.evaluate is not None and (config.evaluate.models is None or model in config.evaluate.models)


def baseline_of(config: Config, model: str) -> str | None:
    """What a model that is not of a round is compared with; None: with none, as it is the baseline itself."""
    assert config.evaluate is not None, "asked of configurations that evaluate"
    training = find(config.train, model)
    found: str | None = config.evaluate.baseline or (training.model if training else None)
    return None if found == model else found


def evaluation_plan(
    outer: Plan, model: str, baseline: Plan | None, used: Callable[[], Mapping[str, str]] | None = None
) -> Plan:
    """The plan of a model's evaluation; its last node is `evaluation <model>`.

    Args:
        outer: Whose models, and the models of whose own outer plans, may be named.
        model: Its name.
        baseline: The plan of what it is compared with, as this function gives it; None: it is compared with none.
        used: See `made.Evaluated`.
    """
    options = outer.root.config.evaluate
    assert options is not None, "asked of configurations that evaluate"
    scorers = list(options.judges)
    if options.divergence and baseline is not None and baseline.made is not None:
        scorers.append(ModelDivergence(kind="divergence", model=model, reference=baseline.made.policy))
    changes: dict[str, Any] = {"scorers": scorers, "tangents": [], "metrics": [], "selections": []}
    prompts = SeedPrompts(
        part=options.prompts.part,
        count=options.prompts.count,
        seed=options.prompts.seed,
        per_shard=options.generation.prompts_per_shard,
    )
    made = Made(
        name=f"evaluation of {model}",
        policy=model,
        prompts=prompts,
        generation=options.generation,
        evaluation=Evaluated(options, baseline, used),
    )
    return made_plan(outer, outer.config.model_copy(update=changes), made)


def used_columns(plan: Plan, selections: Iterable[str | None]) -> dict[str, str]:
    """What chose the pairs of some selections, and labelled them where a model made them: label → identity.

    Args:
        plan: Of the corpus.
        selections: Their names; parts of the corpus, which nothing chose, may be among them.
    """
    labels = list(plan.made.judges if plan.made else ())
    for spec in plan.config.selections:
        if any(name in selections for name in spec.names):
            for metric in rule_scores(spec.rule):
                scorers = scorers_for(plan, metric_columns(plan, metric), field=f"metrics.{metric}")
                labels += [scorer.label for scorer in scorers]
    return {label: judge_identity(plan, label) for label in labels}
