"""Metrics of a configuration, and the random ones that its controls draw by."""

from __future__ import annotations

from prefsel.config import MetricSpec
from prefsel.errors import invalid
from prefsel.metrics.table import find_metric
from prefsel.plan.plan import Plan
from prefsel.rules import LEAVES, rule_scores


def control_metrics(plan: Plan) -> dict[str, str]:
    """Random metric made for a control → the metric whose scored pairs it draws from.

    Drawn from all eligible pairs, a selection and its control would stand for different populations wherever a number
    is missing. The control of a compound rule is a rule of its own (`rules.random_rule`) and needs no metric.
    """
    names = {spec.name for spec in plan.config.metrics}
    rules = [s.rule for s in plan.config.selections if "random" in s.controls and s.rule.get("kind") in LEAVES]
    return {f"random-{base}": base for rule in rules for base in rule_scores(rule) if base in names}


def metric_specs(plan: Plan) -> dict[str, MetricSpec]:
    """Every metric by name, with the random ones that controls need."""
    found = {spec.name: spec for spec in plan.config.metrics}
    return found | {name: MetricSpec(name=name, metric="random") for name in control_metrics(plan) if name not in found}


def metric_columns(plan: Plan, name: str) -> list[str]:
    """The flat columns that metric `name` reads.

    Raises:
        UserError: no such metric, or parameters that it does not have.
    """
    specs = metric_specs(plan)
    if name not in specs:
        raise invalid("score", f"score_{name}", [f"score_{metric}" for metric in specs])
    metric, params = find_metric(specs[name].metric, specs[name].params)
    return list(metric.columns(params))
