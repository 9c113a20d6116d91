"""Rules: what a selection keeps, as checked records, and the arithmetic of budgets and quantiles.

    top, band, above,
    threshold, quota            leaves: rows of one score
    fuse, random                a new score from several, then its first rows
    agree                       what several judges say of the label; it may turn it
    intersect                   what all of its rules keep
    dedupe                      one pair per prompt (or per two completions) first, then its rule

`compose.py` says what the others are made of, `evaluate.py` decides leaves over shards. A rule's *score* is a column:
`score_<metric>` in a configuration, any column of numbers in a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prefsel.config import Options
from prefsel.config.problems import problem, wrong_kind
from prefsel.errors import UserError, invalid

MAX_DEPTH = 32
"""Rules inside each other; a dedupe of an intersection of bands is three."""
Label = tuple[str | None, ...]
"""Names a stratum: the values of the quota's columns; `()` is the whole corpus."""


def _decimal(value: object) -> object:
    if isinstance(value, str) and re.search(r"[eE][+-]?\d{4,}", value):  # exact arithmetic writes all its zeros out
        raise ValueError("has an exponent of four digits or more")
    return value if isinstance(value, bool) else Decimal(str(value)) if isinstance(value, int | float) else value


Ratio = Annotated[
    Decimal,
    BeforeValidator(_decimal, json_schema_input_type=Annotated[float, Field(gt=0, le=1)]),
    Field(gt=0, le=1),
]
"""Read as it is written: 0.29 is 29/100, not the nearest binary fraction."""
SCORED_STRATA = ("source", "aspect")
"""Columns of strata that stand beside every committed score."""
Strata = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda by: (by,) if isinstance(by, str) else by,
        json_schema_input_type=str | Annotated[tuple[str, ...], Field(min_length=1)],
    ),
    Field(min_length=1),
]
"""Columns that make strata; a null is a stratum of its own. `length_bin` is the bin of | |y_w| − |y_l| |; besides
`source` and `aspect` there are the fields that a source carries, or any column of a table."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Budget(Options):
    """How many pairs are kept: exactly one of `ratio` and `count`."""

    ratio: Ratio | None = None
    """Share of the eligible pairs; k = ⌊ratio·N⌋ in the decimal digits as written."""
    count: int | None = Field(default=None, ge=1)
    """Number of pairs, at most the eligible ones."""

    @model_validator(mode="after")
    def _one_budget(self) -> Budget:
        if (self.ratio is None) == (self.count is None):
            raise ValueError(f"exactly one of ratio and count: got ratio={self.ratio}, count={self.count}")
        return self


class Top(Budget):
    """The first rows under (score descending, pair_id ascending)."""

    kind: Literal["top"]
    """The best pairs by one score."""
    score: str
    """Column of the score; larger is selected first."""
    reverse: bool = False
    """Keep the last rows instead: (score, pair_id), both ascending."""


class Quota(Budget):
    """The first rows of every stratum; the budget is shared by size, with largest remainders."""

    kind: Literal["quota"]
    """The best pairs of every stratum."""
    score: str
    """Column of the score; larger is selected first."""
    by: Strata
    """Columns that make strata: `source`, `aspect`, `length_bin`, a field that a source carries (`sources[].carry`),
    or several of them. A null is a stratum of its own."""
    length_bins: int = Field(default=4, ge=2, le=1000)
    """Number of bins of `length_bin`, between quantiles (numpy's `linear`) of the difference in length of the two
    completions over the eligible pairs, in the length unit of the report. A pair's bin is the number of inner edges at
    or below its value; bins between equal edges stay empty. Pairs of unknown length are a stratum of their own."""
    reverse: bool = False
    """Keep the last rows of every stratum instead."""

    @model_validator(mode="after")
    def _bins_are_used(self) -> Quota:
        return _require_bins_used(self, self.by)


class Band(Options):
    """The rows strictly between two percentiles of the score (numpy's `linear` definition, without its rounding).

    Rows are compared with order statistics: kept is what lies above the value at or before the lower percentile, and
    below the value at or behind the upper one. With N scores in ascending order percentile p is place (N − 1)·p/100,
    counted from 0, in the decimal digits of p. So 0 and 100 leave out the smallest and the largest score, with all its
    ties.
    """

    kind: Literal["band"]
    """A middle part of one score."""
    score: str
    """Column of the score."""
    low: float = Field(ge=0, le=100)
    """Lower edge, a percentile from 0 to 100; the rows on it are not kept."""
    high: float = Field(ge=0, le=100)
    """Upper edge, a percentile from 0 to 100 above `low`; the rows on it are not kept."""
    reverse: bool = False
    """Keep the complement instead: the rows on and outside the edges."""

    @model_validator(mode="after")
    def _not_empty(self) -> Band:
        if self.low >= self.high:
            raise ValueError(f"low must be below high: got low={self.low}, high={self.high}")
        return self


class Above(Options):
    """The rows whose score lies strictly above a number (filtered DPO, arXiv 2404.13846: r(y_w) − r(y_gen) > 0)."""

    kind: Literal["above"]
    """The pairs above a fixed number."""
    score: str
    """Column of the score."""
    threshold: Finite
    """Rows are kept when their score is strictly above this number, which is in the unit of the score."""
    reverse: bool = False
    """Keep the rows at and below the number instead."""


Limit = Finite | dict[str, Finite]


class Between(Options):
    """The rows from one value of the score to another, both themselves kept; a value per stratum where `by` is given.

    RIP (arXiv 2501.18578) is an intersection of three of them; thresholds by source are those of UltraMix (arXiv
    2511.10985).
    """

    kind: Literal["threshold"]
    """The pairs between two fixed numbers."""
    score: str
    """Column of the score."""
    low: Limit | None = None
    """Rows are kept from this value on, the value itself included; null: from below. With `by` it may be a table from
    a stratum to its value."""
    high: Limit | None = None
    """Rows are kept up to this value, itself included; null: to above. It may be a table like `low`."""
    by: Strata | None = None
    """Columns that make strata, as of a quota but for `length_bin`. A table of values names every stratum that occurs
    by its values joined by `/`, a null as `null`."""
    reverse: bool = False
    """Keep the complement instead: the rows outside, the values themselves not kept."""

    @model_validator(mode="after")
    def _limits_fit(self) -> Between:
        if self.low is None and self.high is None:
            raise ValueError("needs low, high, or both")
        tables = [name for name in ("low", "high") if isinstance(getattr(self, name), dict)]
        if bool(tables) != (self.by is not None):
            raise ValueError(
                f"{tables[0]}: a table of values needs by" if tables else "by: needs a table as low or high"
            )
        if "length_bin" in (self.by or ()):
            raise ValueError("by: got length_bin, whose bins depend on the data; valid: source, aspect, carried fields")
        named = {name for one in (self.low, self.high) if isinstance(one, dict) for name in one}
        for stratum in sorted(named) if self.by else [""]:
            low, high = (one.get(stratum) if isinstance(one, dict) else one for one in (self.low, self.high))
            if low is not None and high is not None and low > high:
                of = f" of {stratum}" if stratum else ""
                raise ValueError(f"low must not be above high: got low={low}, high={high}{of}")
        return self

    def limits(self, stratum: str) -> tuple[float, float]:
        """The values of a stratum by name, infinite where there is none.

        Raises:
            KeyError: A table does not name it.
        """
        low, high = (one[stratum] if isinstance(one, dict) else one for one in (self.low, self.high))
        return (-math.inf if low is None else low, math.inf if high is None else high)


class Agree(Options):
    """The rows whose label several independent judges confirm; and, turned around, those that all of them contradict.

    Every score is a signed margin of one judge: above 0 it prefers the chosen completion. A pair that judges are
    divided about, or of which one has a margin of 0, is not kept (Skywork-Reward-V2, with two).
    """

    kind: Literal["agree"]
    """The pairs that several judges agree about."""
    scores: tuple[str, ...] = Field(min_length=2)
    """Columns of the judges' signed margins, at least two."""
    action: Literal["keep", "flip"] = "keep"
    """What happens where all judges say that the label is wrong. `keep` keeps only what they confirm; `flip` also keeps
    what they all contradict, with chosen and rejected exchanged. Such a pair keeps its pair_id, and `flipped` is true
    beside it in selections, datasets and exports."""
    reverse: bool = False
    """Keep the complement instead, labelled as it was: what would not be kept."""

    @model_validator(mode="after")
    def _judges_differ(self) -> Agree:
        if len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores must differ: got {', '.join(self.scores)}; one judge agrees with itself")
        return self


class Fuse(Budget):
    """The first rows under a weighted sum of several scores, over the pairs that have all of them."""

    kind: Literal["fuse"]
    """The best pairs by several scores together."""
    scores: tuple[str, ...] = Field(min_length=2)
    """Columns of the scores, at least two; a pair must have all of them."""
    weights: tuple[Finite, ...] | None = None
    """One weight per score; null means equal ones that add up to 1. A negative weight turns a score around. Of ranks
    they are read in the decimal digits that write them: 0.1 and 0.2 together weigh as much as 0.3."""
    how: Literal["zscore", "rank"]
    """What is summed: `zscore`, (score − mean) / std with the population's moments; `rank`, the share of the population
    at and below the pair by exact rank, equal scores ranked by pair_id (the smaller one is the better), the pair itself
    counted half. Ranks are summed in whole numbers, and equal sums are ordered by pair_id."""
    by: Strata | None = None
    """Share the budget out by strata, as a quota does; null means one ranking."""
    length_bins: int = Field(default=4, ge=2, le=1000)
    """Number of bins of `length_bin`, as of a quota."""
    reverse: bool = False
    """Keep the last rows instead."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Fuse:
        if len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores must differ: got {', '.join(self.scores)}")
        if self.weights is not None and len(self.weights) != len(self.scores):
            raise ValueError(f"one weight per score: got {len(self.weights)} weights for {len(self.scores)} scores")
        if self.weights is not None and not any(self.weights):
            raise ValueError("weights must not all be 0")
        return _require_bins_used(self, self.by or ())


class Random(Budget):
    """Pairs at random (a hash of the pair_id) among those that have all of `scores`: the control of compound rules."""

    kind: Literal["random"]
    """Pairs drawn at random."""
    scores: tuple[str, ...] = Field(min_length=1)
    """Pairs are drawn from those that have all of these scores, so that a control has the population of what it is the
    control of."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Another seed draws other pairs; the same seed draws the same ones from any sharding."""


class Intersect(Options):
    """The rows that every rule keeps, each over the same population: the pairs that have all scores any of them reads.

    With a budget, the k pairs nearest to the median of every score instead: the smallest
    `max_i |pct_i − 50|`, compared in whole numbers, equal distances ordered by pair_id. Percentiles are by exact rank,
    equal scores ranked by pair_id (the smaller one is the better). The rules are then bands, and the budget replaces
    their edges.
    """

    kind: Literal["intersect"]
    """What several rules keep in common."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    """The rules; with a `budget` they must be bands."""
    budget: Budget | None = None
    """Keep exactly this many pairs, those nearest to the median of every score; null keeps what all rules keep, however
    many that is."""
    reverse: bool = False
    """Keep the complement of the kept set instead."""


class Dedupe(Options):
    """Of the pairs of one prompt (or of the same two completions) the one its rule's score puts first; then the rule.

    The others are dropped as `same_prompt` or `same_pair`. The score of an intersection without a budget is that of
    its first rule; of a reversed rule the last pair is put first. Scores, fused ones too, are computed before pairs are
    dropped; budgets and percentiles of the rule are those of what is left.
    """

    kind: Literal["dedupe"]
    """One pair per prompt, or per two completions, and then another rule."""
    by: Literal["prompt", "pair"]
    """What one pair is kept of: `prompt`, or `pair`, the same two completions of a prompt, whichever was chosen and
    whatever aspect labels them."""
    rule: Rule
    """The rule for the pairs that are left; its score decides which pair is the one kept. It may not be a dedupe
    itself."""


Leaf: TypeAlias = Top | Band | Above | Between | Quota
Rule = Annotated[
    Top | Band | Quota | Above | Between | Fuse | Agree | Intersect | Dedupe | Random, Field(discriminator="kind")
]
RULES: dict[str, type[Options]] = {
    "top": Top,
    "band": Band,
    "quota": Quota,
    "above": Above,
    "threshold": Between,
    "fuse": Fuse,
    "agree": Agree,
    "intersect": Intersect,
    "dedupe": Dedupe,
    "random": Random,
}
LEAVES = ("top", "band", "quota", "above", "threshold")
"""Kinds that read one score and need no other made of it."""
Intersect.model_rebuild()
Dedupe.model_rebuild()


def _require_bins_used(rule: Any, by: Sequence[str]) -> Any:
    if "length_bins" in rule.model_fields_set and "length_bin" not in by:
        raise ValueError(f"length_bins: got {rule.length_bins}, but by is {', '.join(by) or 'none'}, not length_bin")
    return rule


# ------------------------------------------------------------------------------------------------------- reading


def parse_rule(rule: Any, path: str = "rule") -> Rule:
    """`rule`, a table, as a checked record.

    Args:
        rule: with rules inside it where its kind has any.
        path: where it stands, for errors: `rule.rules[1]`.

    Raises:
        UserError: an unknown kind or key (the nearest valid one is named) or an invalid value, one line per problem.
    """
    for _ in tables_in(rule):
        pass  # refuses what is nested without end
    kind = rule.get("kind") if isinstance(rule, Mapping) else None
    if not isinstance(kind, str) or kind not in RULES:
        raise UserError(wrong_kind(rule, path, RULES))
    table = dict(rule)
    if kind == "dedupe" and "reverse" in table:
        raise UserError(f"{path}.reverse: a dedupe has none; reverse the rule inside it: {path}.rule.reverse")
    if kind == "dedupe" and "rule" in table:
        table["rule"] = parse_rule(table["rule"], f"{path}.rule")
    if kind == "intersect" and isinstance(table.get("rules"), Sequence) and not isinstance(table["rules"], str):
        table["rules"] = [parse_rule(one, f"{path}.rules[{place}]") for place, one in enumerate(table["rules"])]
    if kind == "intersect" and isinstance(table.get("budget"), Mapping):
        table["budget"] = _checked(Budget, table["budget"], "rule intersect", f"{path}.budget")
    parsed: Any = _checked(RULES[kind], table, f"rule {kind}", path)
    _require_one_score(parsed, path)
    _require_one_flip(parsed, path)
    return parsed


def _checked(record: type[Options], table: Mapping[str, Any], title: str, path: str) -> Options:
    try:
        return record.model_validate(dict(table))
    except ValidationError as error:
        raise readable(title, error, record.model_fields, path="" if path == "rule" else path) from None


def _require_one_score(rule: Rule, path: str) -> None:
    """Refuse what has no score of its own where one is needed."""
    if isinstance(rule, Dedupe) and isinstance(rule.rule, Dedupe):
        raise invalid(f"{path}.rule.kind", "dedupe", [kind for kind in RULES if kind != "dedupe"])
    if isinstance(rule, Intersect) and rule.budget is not None:
        for place, one in enumerate(rule.rules):
            if not isinstance(one, Band):
                raise invalid(f"{path}.rules[{place}].kind", one.kind, "band, as the intersection has a budget")
            if one.reverse:
                raise UserError(f"{path}.rules[{place}].reverse: a budget keeps the middle; reverse the intersection")


def _require_one_flip(rule: Rule, path: str) -> None:
    """Two rules that turn labels could contradict each other."""
    flipping = [one for one in tables_in(rule.model_dump()) if one.get("action") == "flip"]
    if len(flipping) > 1:
        raise UserError(f"{path}: {len(flipping)} rules have the action flip; valid: one, which is given all judges")


def flips_labels(rule: Any) -> bool:
    """Whether a rule's table may keep pairs with their label turned; it need not be a valid rule."""
    return any(one.get("action") == "flip" for one in tables_in(rule))


def rule_strata(rule: Any) -> Iterator[str]:
    """The columns of strata that a rule's table names, as often as it does; the table need not be a valid rule."""
    for one in tables_in(rule):
        by = one.get("by") if one.get("kind") != "dedupe" else None
        yield from ([by] if isinstance(by, str) else (name for name in _list(by) if isinstance(name, str)))


def readable(title: str, error: ValidationError, valid: Iterable[str], *, path: str = "") -> UserError:
    """A pydantic error as one `UserError`, one line per problem: field, value, valid values, nearest key.

    Args:
        title: what was read.
        error: what is wrong with it.
        valid: its keys.
        path: where it stands, when that is not clear from the title.
    """
    lines = []
    for details in error.errors():
        name = ".".join(str(part) for part in details["loc"])
        lines.append(problem(details, ".".join(filter(None, (path, name))), valid))
    return UserError(f"{title}: " + "\n  ".join(lines))


def rule_scores(rule: Mapping[str, Any]) -> list[str]:
    """The metrics whose scores a rule's table reads, each once, in order; the table need not be a valid rule."""
    return list(dict.fromkeys(name.removeprefix("score_") for name in rule_columns(rule)))


def rule_columns(rule: Any) -> Iterator[str]:
    """The score columns a rule's table names, as often as it does; the table need not be a valid rule."""
    for one in tables_in(rule):
        named = [one.get("score"), *_list(one.get("scores"))]
        yield from (name for name in named if isinstance(name, str))


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


RANKS = {"ranks": "whole numbers"}
"""Stands in a recipe beside what ranks decide. Those of earlier versions were binned, then exact but summed in floats,
which broke ties by rounding."""


def arithmetic_of(rule: Any) -> dict[str, str]:
    """What stands in a recipe beside a rule that an earlier version decided by rounded numbers; empty for others."""
    ranks = RANKS if any(_decides_by_rank(one) for one in tables_in(rule)) else {}
    return ranks | ({"edges": "order statistics"} if any(_has_rounded_edge(one) for one in tables_in(rule)) else {})


def tables_in(rule: Any) -> Iterator[Mapping[str, Any]]:
    """A rule's table and all inside it, each before its own; it need not be a valid rule.

    Raises:
        UserError: Rules lie too deep in each other, or a rule in itself.
    """
    waiting = [(rule, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"rule: rules lie more than {MAX_DEPTH} deep in each other")
        if isinstance(one, Mapping):
            yield one
            waiting += [(inside, depth + 1) for inside in (one.get("rule"), *reversed(_list(one.get("rules"))))]


def _decides_by_rank(rule: Mapping[str, Any]) -> bool:
    return (rule.get("kind"), rule.get("how")) == ("fuse", "rank") or (
        rule.get("kind") == "intersect" and rule.get("budget") is not None
    )


def _has_rounded_edge(rule: Mapping[str, Any]) -> bool:
    """Whether (N − 1)·p/100 in floats may miss the whole number that it is, as 100 · 0.07 = 7.000000000000001 does.

    A factor that is off by at most 2^-54 is rounded back to it: no edge of 10, 20, 80 or 90 is among them.
    """
    edges = [rule.get(end) for end in ("low", "high")] if rule.get("kind") == "band" else []
    shares = [percentile(edge) for edge in edges if isinstance(edge, int | float) and 0 < edge <= 100]
    return any(abs(Fraction(float(share)) / share - 1) > Fraction(1, 1 << 54) for share in shares)


def reversed_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's opposite; of a dedupe that of the rule inside it."""
    if rule.get("kind") == "dedupe":
        return dict(rule, rule=reversed_rule(rule["rule"]))
    return dict(rule, reverse=not rule.get("reverse", False))


def random_rule(rule: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A rule that keeps `count` pairs at random from the population of `rule`, which reads metrics.

    Of a leaf by the metric `random-<metric>`; of a dedupe from one random pair per prompt, so that the two differ in
    what they rank by and in nothing else.
    """
    names = rule_scores(rule)
    if rule.get("kind") in LEAVES:
        return {"kind": "top", "score": f"score_random-{names[0]}", "count": count}
    drawn = {"kind": "random", "scores": [f"score_{name}" for name in names], "count": count}
    return dict(rule, rule=drawn) if rule.get("kind") == "dedupe" else drawn


# ------------------------------------------------------------------------------------------- budgets and quantiles


def budget(ratio: Decimal | str | float, num_eligible: int) -> int:
    """`floor(ratio * num_eligible)`, exact in the decimal digits of `ratio`."""
    return int(Fraction(Decimal(str(ratio))) * num_eligible)


def percentile(edge: float) -> Fraction:
    """A percentile as a share, 0 to 1, exact in the decimal digits that write it."""
    return Fraction(str(float(edge))) / 100


def rule_budget(rule: Budget, num_eligible: int, *, where: str = "") -> int:
    """How many of `num_eligible` pairs a budget keeps.

    Raises:
        UserError: `count` is larger than the eligible corpus; `where` names it.
    """
    if rule.ratio is not None:
        return budget(rule.ratio, num_eligible)
    assert rule.count is not None
    if rule.count > num_eligible:
        where = where or f"rule {getattr(rule, 'kind', 'intersect')}: "
        raise invalid(f"{where}count", rule.count, f"at most the {num_eligible} eligible pairs")
    return rule.count


def require_budgets(rule: Rule, num_eligible: int) -> None:
    """Refuse a budget, at any depth, that is above the eligible pairs or keeps none of them.

    Raises:
        UserError: names the budget and the number of pairs.
    """
    for path, one in _budgets(rule, "rule"):
        where = f"rule {rule.kind}: " if path == "rule" else f"{path}."
        if not rule_budget(one, num_eligible, where=where):
            field = where.rstrip(".: ")
            raise UserError(f"{field}: its budget of {num_eligible:,} eligible pairs is 0; raise it")


def _budgets(rule: Any, path: str) -> Iterator[tuple[str, Budget]]:
    if isinstance(rule, Budget):
        yield path, rule
    elif isinstance(rule, Dedupe):
        yield from _budgets(rule.rule, f"{path}.rule")
    elif isinstance(rule, Intersect):
        if rule.budget is not None:
            yield f"{path}.budget", rule.budget
        for place, one in enumerate(rule.rules):
            yield from _budgets(one, f"{path}.rules[{place}]")


def largest_remainder(sizes: Sequence[int], total: int) -> list[int]:
    """`total` seats shared in proportion to `sizes`: whole quotas, then one each to the largest remainders.

    Equal remainders go to the earlier stratum. No stratum gets more than its size while `total <= sum(sizes)`.
    """
    whole = sum(sizes)
    if whole == 0:
        return [0] * len(sizes)
    seats, remainders = zip(*(divmod(total * size, whole) for size in sizes))
    order = sorted(range(len(sizes)), key=lambda place: -remainders[place])
    extra = set(order[: total - sum(seats)])
    return [seat + (place in extra) for place, seat in enumerate(seats)]
