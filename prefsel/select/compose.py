"""Compound rules: the scores they are made of, and what is kept by them.

    compile_rule  ->  CompiledRule: derived scores, in order, then a leaf or an intersection of leaves

A fusion, an agreement, an intersection with a budget and a dedupe are each a score made from other scores, then a leaf
on it. All derived scores of a rule are made over one population, the pairs that have every score the rule reads; a
dedupe then takes pairs away from what its rule is applied to. `fuse.py` makes the scores, `dedupe.py` finds the pairs
that stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prefsel.rules import (
    Above,
    Agree,
    Band,
    Between,
    Budget,
    Dedupe,
    Fuse,
    Intersect,
    Leaf,
    Quota,
    Random,
    Rule,
    Top,
)


@dataclass(frozen=True)
class Derived:
    """A score made from other scores."""

    label: str
    """Unique within its rule."""
    how: Literal["zscore", "rank", "middle", "random", "agree", "best"]
    """`zscore`: Σ w z(score). `rank`: Σ w rank / N. `middle`: −max |pct − 50|. `random`: a hash of the pair_id.
    `agree`: of scores that are all above 0, or all below, the one nearest to 0; else 0. `best`: the one score it is
    made of, where the pair is the best of its prompt or pair. Ranks are exact, and what is made of them is made in
    whole numbers (`ranks.py`)."""
    scores: tuple[str, ...]
    """Columns it is made of."""
    population: tuple[str, ...]
    """Columns of the scores a pair must have; statistics are taken over these pairs."""
    weights: tuple[float, ...] = ()
    seed: int = 0
    by: str = ""
    """Of `best`: what one pair is kept of, `prompt` or `pair`."""
    descending: bool = True
    """Of `best`: whether the larger score is better."""

    @property
    def is_by_rank(self) -> bool:
        """Whether exact ranks decide, which all shards find together."""
        return self.how in ("rank", "middle")

    @property
    def column(self) -> str:
        """Where the score stands among the others; no metric's name begins like this."""
        return f"@{self.label}"

    def params(self) -> dict[str, Any]:
        """What makes it this score and no other, for recipes and reports."""
        params: dict[str, Any] = {"scores": list(self.scores), "population": list(self.population)}
        if self.how in ("zscore", "rank"):
            params["weights"] = list(self.weights)
        elif self.how == "random":
            params["seed"] = self.seed
        elif self.how == "best":
            params |= {"by": self.by, "first": "largest" if self.descending else "smallest"}
        return params


@dataclass(frozen=True)
class Keep:
    """A leaf of a plan: rows of one column, decided over the pairs that have all of `population`."""

    number: int
    """Position among the leaves of the plan."""
    rule: Leaf
    population: tuple[str, ...]
    is_complement: bool = False
    """Keep what the rule does not keep."""

    @property
    def column(self) -> str:
        """The score the rule is about."""
        return self.rule.score

    @property
    def by(self) -> tuple[str, ...]:
        """Columns of its strata."""
        return self.rule.by or () if isinstance(self.rule, Quota | Between) else ()

    @property
    def has_own_scores(self) -> bool:
        """Whether its population is that of its column alone."""
        return self.population == (self.column,)


@dataclass(frozen=True)
class KeepAll:
    """An intersection: what all parts keep, or the rest of the population."""

    parts: tuple[Node, ...]
    population: tuple[str, ...]
    is_complement: bool


Node: TypeAlias = Keep | KeepAll


@dataclass(frozen=True)
class CompiledRule:
    """A rule, ready to be applied."""

    inputs: tuple[str, ...]
    """Columns the rule reads."""
    derived: tuple[Derived, ...]
    """Scores to be made, each from those before it."""
    keep: Node
    score: str
    """The column that stands for the whole rule: attached to kept pairs, shown in reports."""
    descending: bool
    """Whether larger values of `score` are selected first."""
    flips: str | None = None
    """The score below 0 of which a kept pair has its label turned; None: every label stays."""

    @property
    def leaves(self) -> list[Keep]:
        """Every leaf, by number."""
        return list(leaves(self.keep))

    @property
    def keys(self) -> list[str]:
        """What its dedupes keep one pair of."""
        return list(dict.fromkeys(step.by for step in self.derived if step.by))


def leaves(node: Node) -> Iterator[Keep]:
    """The leaves of a node, in order."""
    if isinstance(node, Keep):
        yield node
    else:
        for part in node.parts:
            yield from leaves(part)


def columns_of(node: Node) -> list[str]:
    """Every column that is read to apply a node."""
    populations = node.population if isinstance(node, KeepAll) else ()
    found = [*populations, *(column for leaf in leaves(node) for column in (leaf.column, *leaf.population))]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------- compilation


def compile_rule(rule: Rule) -> CompiledRule:
    """The plan of a rule."""
    inside = list(_walk(rule))
    inputs = tuple(dict.fromkeys(name for one in inside for name in _inputs(one)))
    scores: dict[Rule, str] = {}
    made: list[Derived] = []
    for one in inside:
        if (step := _derived(one, inputs, made)) is not None and one not in scores:
            made.append(step)
            scores[one] = step.column
    numbers = itertools.count()

    def own(column: str, there: tuple[str, ...]) -> tuple[str, ...]:
        # A score that was made over these very pairs says itself which pairs they are.
        is_made = any(step.column == column for step in made)
        return (column,) if is_made and there == inputs else there

    def build(one: Rule, there: tuple[str, ...], best: Mapping[str, str]) -> Node:
        if isinstance(one, Dedupe):
            column = _score(one, scores)
            source, label = best.get(column, column), _unique("dedupe", made)
            population = own(source, there)
            step = Derived(label, "best", (source,), population, by=one.by, descending=_descending(one))
            made.append(step)
            return build(one.rule, (step.column,), {**best, column: step.column})
        if isinstance(one, Intersect) and one.budget is None:
            return KeepAll(tuple(build(part, there, best) for part in one.rules), there, one.reverse)
        column = _score(one, scores)
        column = best.get(column, column)
        is_complement = isinstance(one, Intersect) and one.reverse
        return Keep(next(numbers), _leaf(one, column), own(column, there), is_complement)

    keep = build(rule, inputs, {})
    score = _score(rule, scores)
    if isinstance(rule, Dedupe):  # the outermost is the first one made
        score = next(step.column for step in made if step.how == "best")
    flipping = _flipping(rule)
    return CompiledRule(
        inputs, tuple(made), keep, score, _descending(rule), None if flipping is None else scores[flipping]
    )


def _flipping(rule: Rule) -> Agree | None:
    """The rule inside of `rule` whose action is `flip`, if what it turns can be kept: not in a complement."""
    if isinstance(rule, Agree):
        return rule if rule.action == "flip" and not rule.reverse else None
    if isinstance(rule, Dedupe):
        return _flipping(rule.rule)
    if isinstance(rule, Intersect) and not rule.reverse:
        return next((found for one in rule.rules if (found := _flipping(one)) is not None), None)
    return None


def _walk(rule: Rule) -> Iterator[Rule]:
    """A rule and all inside it."""
    yield rule
    if isinstance(rule, Intersect):
        for one in rule.rules:
            yield from _walk(one)
    elif isinstance(rule, Dedupe):
        yield from _walk(rule.rule)


def _inputs(rule: Rule) -> tuple[str, ...]:
    """The columns that a rule itself names."""
    if isinstance(rule, Fuse | Random | Agree):
        return rule.scores
    return () if isinstance(rule, Intersect | Dedupe) else (rule.score,)


def _derived(rule: Rule, inputs: tuple[str, ...], made: Sequence[Derived]) -> Derived | None:
    """The score that a rule makes of others; None for one that makes none (a dedupe's depends on where it stands)."""
    if isinstance(rule, Fuse):
        weights = rule.weights or (1 / len(rule.scores),) * len(rule.scores)
        return Derived(_unique("fuse", made), rule.how, rule.scores, inputs, weights=weights)
    if isinstance(rule, Random):
        return Derived(_unique("random", made), "random", rule.scores, inputs, seed=rule.seed)
    if isinstance(rule, Agree):
        return Derived(_unique("agree", made), "agree", rule.scores, inputs)
    if isinstance(rule, Intersect) and rule.budget is not None:
        bands = tuple(dict.fromkeys(name for band in rule.rules for name in _inputs(band)))
        return Derived(_unique("middle", made), "middle", bands, inputs)
    return None


def _unique(label: str, made: Sequence[Derived]) -> str:
    number = 1 + sum(step.label.rstrip("0123456789") == label for step in made)
    return label if number == 1 else f"{label}{number}"


def _score(rule: Rule, scores: Mapping[Rule, str]) -> str:
    """The column whose order is that of a rule; of an intersection without a budget that of its first rule."""
    if isinstance(rule, Dedupe):
        return _score(rule.rule, scores)
    if isinstance(rule, Intersect) and rule.budget is None:
        return _score(rule.rules[0], scores)
    return scores[rule] if isinstance(rule, Fuse | Random | Agree | Intersect) else rule.score


def _descending(rule: Rule) -> bool:
    """Whether a rule selects larger values of its score first."""
    if isinstance(rule, Dedupe):
        return _descending(rule.rule)
    if isinstance(rule, Random):
        return True
    if isinstance(rule, Agree):
        return not rule.reverse
    is_first_descending = isinstance(rule, Intersect) and rule.budget is None and not _descending(rule.rules[0])
    return rule.reverse == is_first_descending


def _leaf(rule: Rule, column: str) -> Leaf:
    """The leaf that a rule is on the score `column`."""
    if isinstance(rule, Top | Band | Quota | Above | Between):
        return rule.model_copy(update={"score": column})
    if isinstance(rule, Agree):
        if rule.action == "keep":
            return Above(kind="above", score=column, threshold=0.0, reverse=rule.reverse)
        return Between(kind="threshold", score=column, low=0.0, high=0.0, reverse=not rule.reverse)
    budget = rule.budget if isinstance(rule, Intersect) else rule
    assert isinstance(budget, Budget), "an intersection without a budget is no leaf"
    kept = {"score": column, "ratio": budget.ratio, "count": budget.count}
    if isinstance(rule, Fuse):
        kept["reverse"] = rule.reverse
        if rule.by is not None:
            bins = {"length_bins": rule.length_bins} if "length_bin" in rule.by else {}
            return Quota(kind="quota", by=rule.by, **kept, **bins)
    return Top(kind="top", **kept)
