"""Derived scores: what the scores that a compound rule makes are called, where they lie, and how they are reported.

They lie beside the metrics' scores and look like them, named after the selection they were made for; a control that
needs the same score shares its selection's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.pairs.score_shards import ScoreReader
from prefsel.plan.columns import pair_reader
from prefsel.plan.plan import Plan
from prefsel.rules import RANKS, parse_rule
from prefsel.select.compose import CompiledRule, Derived, Keep, compile_rule
from prefsel.select.thresholds import Thresholds
from prefsel.workspace.recipes import fingerprint, recipe


@dataclass(frozen=True)
class DerivedScore:
    """A score made for a selection, and where it lies."""

    step: Derived
    name: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Without the source."""
        return f"scores/{self.name}@{self.fingerprint}"

    @property
    def columns(self) -> list[str]:
        """What it is made from."""
        return list(dict.fromkeys((*self.step.population, *self.step.scores)))


def derived_scores(plan: Plan, name: str, compiled: CompiledRule) -> list[DerivedScore]:
    """The scores that selection, or control, `name` is made by, each after those it needs."""
    base, known = plan.node("selection", name).member, {}
    if base is not None:
        rule = compile_rule(parse_rule(plan.node("selection", base).spec.rule))
        known = {one.fingerprint: one.name for one in derived_scores(plan, base, rule)}
    return [
        DerivedScore(step, known.get(fp, f"{name}.{step.label}"), fp)
        for step, fp in zip(compiled.derived, _fingerprints(plan, compiled))
    ]


def _fingerprints(plan: Plan, compiled: CompiledRule) -> Iterator[str]:
    """A step is what it does with which scores: those of metrics stand upstream, derived ones by their fingerprint."""
    metrics = [metric_of(column) for column in compiled.inputs]
    upstream = {metric: plan.node("scores", metric).fingerprint for metric in metrics}
    found: dict[str, str] = {}
    for step in compiled.derived:
        params = {
            key: [found.get(one, one) for one in value] if isinstance(value, list) else value
            for key, value in step.params().items()
        }
        settings = {"how": step.how, "params": params} | (RANKS if step.is_by_rank else {})
        found[step.column] = fingerprint(recipe("selection", settings, upstream=upstream, corpus=plan.corpus))
        yield found[step.column]


def metric_of(column: str) -> str:
    """The metric whose score a rule's column is."""
    return column.removeprefix("score_")


def score_reader(plan: Plan, compiled: CompiledRule, made: Sequence[DerivedScore]) -> ScoreReader:
    """A reader of every score of a rule."""
    folders = {column: plan.node("scores", metric_of(column)).path for column in compiled.inputs}
    return ScoreReader(pair_reader(plan, []), folders | {one.step.column: one.folder for one in made})


def score_name(column: str, made: Sequence[DerivedScore]) -> str:
    """What a column of a rule is called in reports: its metric, or the derived score."""
    return next((one.name for one in made if one.step.column == column), metric_of(column))


def facts(one: DerivedScore, reader: ScoreReader, made: Sequence[DerivedScore], fitted: Any) -> dict[str, Any]:
    """What a report says about how a score was made."""
    step = one.step
    kinds = {"best": f"dedupe by {step.by}", "middle": "nearest to the medians", "random": "random"}
    kinds["agree"] = "agreement of judges"
    params = {
        key: [score_name(column, made) for column in value] if key in ("scores", "population") else value
        for key, value in step.params().items()
    }
    kind = kinds.get(step.how, f"fuse by {step.how}")
    return {"kind": kind, "params": params, "fitted": fitted, "warnings": [], "length_unit": reader.reader.length_unit}


def thresholds(compiled: CompiledRule, decided: Sequence[Thresholds], made: Sequence[DerivedScore]) -> dict[str, Any]:
    """The thresholds for a manifest: of one leaf as they are, of an intersection with the name of each leaf's score."""
    if isinstance(compiled.keep, Keep):
        return decided[0].to_json()
    names = [score_name(leaf.column, made) for leaf in compiled.leaves]
    shown = [name if names.count(name) == 1 else f"{place + 1}: {name}" for place, name in enumerate(names)]
    return {f"{name} {key}": value for name, one in zip(shown, decided) for key, value in one.to_json().items()}


def marks(compiled: CompiledRule, decided: Sequence[Thresholds]) -> list[float]:
    """Values of the rule's own score where it is cut: one of a top, two of a band; none for the many of a quota."""
    found: list[float] = []
    for leaf, one in zip(compiled.leaves, decided):
        if leaf.column != compiled.score:
            continue
        if one.edges is not None:
            found += [edge for edge in one.edges if math.isfinite(edge)]
        elif one.limits is not None:
            found += [edge for both in one.limits.values() for edge in both if math.isfinite(edge) and not leaf.by]
        elif not leaf.by:
            found += [last.score for last in one.last.values() if last is not None]
    return found
