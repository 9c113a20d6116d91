"""Rules: which rows a selection keeps, decided from histograms and a few counting rounds.

    parse_rule  ->  decide (driver)  -- queries -->  reply (each shard)  ->  Cut  ->  keep (each shard)

A *label* names a stratum: the values of the quota's columns; `()` is the whole corpus. Scores, pair_ids and strata of
a shard travel together as `ShardScores`. N: rows of a shard.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prefsel.config import Record
from prefsel.errors import UserError, invalid
from prefsel.select import radix

Label = tuple[str | None, ...]
QueryKey = tuple[Label, int]
"""A stratum, and which of its searches: a band asks up to four."""
Ask = Callable[[dict[QueryKey, radix.Query]], Sequence[Mapping[QueryKey, radix.Answer]]]


def _decimal(value: object) -> object:
    return value if isinstance(value, bool) else Decimal(str(value)) if isinstance(value, int | float) else value


Ratio = Annotated[Decimal, BeforeValidator(_decimal), Field(gt=0, le=1)]
"""Read as it is written: 0.29 is 29/100, not the nearest binary fraction."""


class _Budgeted(Record):
    score: str
    """Column of the score; larger is selected first."""
    ratio: Ratio | None = None
    """Share of the eligible pairs."""
    count: int | None = Field(default=None, ge=1)
    """Number of pairs; exactly one of `ratio` and `count` is given."""
    reverse: bool = False
    """Keep the last rows instead: (score, pair_id), both ascending."""

    @model_validator(mode="after")
    def _one_budget(self) -> _Budgeted:
        if (self.ratio is None) == (self.count is None):
            raise ValueError(f"exactly one of ratio and count: got ratio={self.ratio}, count={self.count}")
        return self


class Top(_Budgeted):
    """The first rows under (score descending, pair_id ascending)."""

    kind: Literal["top"]


class Quota(_Budgeted):
    """The first rows of every stratum; the budget is shared by size, with largest remainders."""

    kind: Literal["quota"]
    by: Annotated[
        tuple[Literal["source", "aspect"], ...],
        BeforeValidator(lambda by: (by,) if isinstance(by, str) else by),
        Field(min_length=1),
    ]
    """Columns that make the strata. A null is a stratum of its own."""


class Band(Record):
    """The rows strictly between two percentiles of the score (numpy's `linear` definition)."""

    kind: Literal["band"]
    score: str
    low: float = Field(ge=0, le=100)
    high: float = Field(ge=0, le=100)
    reverse: bool = False
    """Keep the complement instead: the rows on and outside the edges."""

    @model_validator(mode="after")
    def _not_empty(self) -> Band:
        if self.low >= self.high:
            raise ValueError(f"low must be below high: got low={self.low}, high={self.high}")
        return self


Rule = Annotated[Top | Band | Quota, Field(discriminator="kind")]
RULES: dict[str, type[Top] | type[Band] | type[Quota]] = {"top": Top, "band": Band, "quota": Quota}


def parse_rule(rule: Mapping[str, Any]) -> Top | Band | Quota:
    """`rule` as a checked record.

    Raises:
        UserError: an unknown kind or key (the nearest valid one is named) or an invalid value, one line per problem.
    """
    kind = rule.get("kind") if isinstance(rule, Mapping) else None
    if not isinstance(kind, str) or kind not in RULES:
        raise invalid("rule.kind", kind, RULES)
    try:
        return RULES[kind].model_validate(dict(rule))
    except ValidationError as error:
        raise readable(f"rule {kind}", error, RULES[kind].model_fields) from None


def readable(title: str, error: ValidationError, valid: Iterable[str]) -> UserError:
    """A pydantic error as one `UserError`, one line per problem: field, value, valid values, nearest key."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or title
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, list(valid), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{field}: unknown; {hint}valid: {', '.join(valid)}")
        elif problem["type"] == "missing":
            lines.append(f"{field}: required, but missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if problem["type"] == "value_error" else f"got {problem['input']!r}; "
            lines.append(f"{field}: {shown}{message[0].lower()}{message[1:]}")
    return UserError(f"{title}: " + "\n  ".join(lines))


def budget(ratio: Decimal | str | float, num_eligible: int) -> int:
    """`floor(ratio * num_eligible)`, exact in the decimal digits of `ratio`."""
    return int(Fraction(Decimal(str(ratio))) * num_eligible)


def rule_budget(rule: Top | Quota, num_eligible: int) -> int:
    """How many of `num_eligible` pairs the rule keeps.

    Raises:
        UserError: `count` is larger than the eligible corpus.
    """
    if rule.ratio is not None:
        return budget(rule.ratio, num_eligible)
    assert rule.count is not None
    if rule.count > num_eligible:
        raise invalid(f"rule {rule.kind}: count", rule.count, f"at most the {num_eligible} eligible pairs")
    return rule.count


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


def quantile_position(num_rows: int, q: float) -> tuple[int, int, float]:
    """Ranks below and above the quantile `q` (0 to 1) and the way between them (numpy's `linear`)."""
    position = (num_rows - 1) * q
    below = int(position)
    return below, min(below + 1, num_rows - 1), position - below


def interpolate(below: float, above: float, fraction: float) -> float:
    """The point `fraction` of the way from `below` to `above`, rounded as numpy's quantiles are."""
    step = above - below
    return above - step * (1 - fraction) if fraction >= 0.5 else below + step * fraction


@dataclass(frozen=True)
class Threshold:
    """The last row of a cut: rows at or before it in the total order are kept."""

    score: float
    pair_id: int | None
    """The last pair_id kept among those with exactly `score` (128 bits), or None: all of them."""
    descending: bool

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to apply the cut."""
        return self.pair_id is not None

    def to_json(self) -> dict[str, float | str | None]:
        """For a manifest, the pair_id as hex."""
        return {"score": self.score, "pair_id": None if self.pair_id is None else f"{self.pair_id:032x}"}


def threshold(search: radix.Search) -> Threshold:
    """The cut a finished `top` search found."""
    unknown = 3 * radix.WORD_BITS - search.known
    id_bits = (search.prefix & ((1 << (search.known - radix.WORD_BITS)) - 1)) << unknown | ((1 << unknown) - 1)
    return Threshold(radix.found_score(search), id_bits if search.known > radix.WORD_BITS else None, search.descending)


@dataclass(frozen=True)
class Cut:
    """What a rule decided about the corpus; enough for a shard to keep its own rows."""

    thresholds: Mapping[Label, Threshold | None]
    """Of `top` and `quota`: the last row kept per stratum; None keeps nothing of it."""
    edges: tuple[float, float] | None = None
    """Of `band`."""
    reverse: bool = False
    """Of `band`: keep the complement. (A reversed top has ascending thresholds.)"""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to apply the cut: only where a threshold score ties."""
        return any(cut is not None and cut.needs_ids for cut in self.thresholds.values())

    def to_json(self) -> dict[str, Any]:
        """For a manifest: edges, or per stratum the threshold score and pair_id (null: all ties kept)."""
        if self.edges is not None:
            return {"low": self.edges[0], "high": self.edges[1], "reverse": self.reverse}
        return {label_text(label): cut and cut.to_json() for label, cut in self.thresholds.items()}


@dataclass(frozen=True)
class ShardScores:
    """The eligible rows of one shard."""

    score_N: np.ndarray
    """float64, finite."""
    ids_NW: np.ndarray | None = None
    """pair_ids as two big-endian words; may be None while neither queries nor the cut need them."""
    code_N: np.ndarray | None = None
    """Stratum of each row as a position in `labels`; None: all rows are in the one stratum of `labels`."""
    labels: Sequence[Label] = ((),)

    def histograms(self) -> dict[Label, radix.Histogram]:
        """The first round, which needs no query."""
        if self.code_N is None:
            return {self.labels[0]: radix.histogram(self.score_N)}
        return dict(zip(self.labels, radix.stratum_histograms(self.score_N, self.code_N, len(self.labels))))


def label_text(label: Label) -> str:
    """A stratum's name as written in selections and manifests: its values joined by `/`, null as `null`."""
    return "/".join("null" if value is None else value for value in label) or "all"


def merge_histograms(many: Iterable[Mapping[Label, radix.Histogram]]) -> dict[Label, radix.Histogram]:
    """The corpus's histograms from those of its shards."""
    by_label: dict[Label, list[radix.Histogram]] = {}
    for histograms in many:
        for label, histogram in histograms.items():
            by_label.setdefault(label, []).append(histogram)
    return {label: radix.Histogram.merge(parts) for label, parts in by_label.items()}


def decide(
    rule: Top | Band | Quota,
    histograms: Mapping[Label, radix.Histogram],
    ask: Ask,
    *,
    max_candidates: int = radix.MAX_CANDIDATES,
) -> Cut:
    """The cut of `rule` over a corpus.

    Args:
        rule: what to keep.
        histograms: of the scores of the whole corpus, by stratum: by the quota's columns, else one, of label `()`.
        ask: sends queries to every shard (`reply`) and returns the answers, one mapping per shard, in any order.
        max_candidates: rows a boundary bin may have before it is collected rather than refined.

    Raises:
        UserError: a count above the eligible corpus; pair_ids that are not unique where a score ties.
    """
    if isinstance(rule, Band):
        return _decide_band(rule, histograms[()], ask, max_candidates)
    labels = sorted(histograms, key=lambda label: [(value is not None, value or "") for value in label])
    sizes = [histograms[label].total for label in labels]
    seats = largest_remainder(sizes, rule_budget(rule, sum(sizes)))
    searches = {
        (label, 0): radix.begin(
            radix.top(k, descending=not rule.reverse, max_candidates=max_candidates), histograms[label]
        )
        for label, k in zip(labels, seats)
        if k
    }
    found = radix.solve(searches, ask)
    cuts = {label: threshold(found[label, 0]) if (label, 0) in found else None for label in labels}
    return Cut(cuts)


def _decide_band(rule: Band, histogram: radix.Histogram, ask: Ask, max_candidates: int) -> Cut:
    if histogram.total == 0:
        return Cut({}, edges=(0.0, 0.0), reverse=rule.reverse)
    positions = [quantile_position(histogram.total, edge / 100) for edge in (rule.low, rule.high)]
    label: Label = ()
    searches = {
        (label, rank): radix.begin(radix.order_statistic(rank, max_candidates=max_candidates), histogram)
        for below, above, _ in positions
        for rank in (below, above)
    }
    found = {key: radix.found_score(search) for key, search in radix.solve(searches, ask).items()}
    low, high = (interpolate(found[label, b], found[label, a], fraction) for b, a, fraction in positions)
    return Cut({}, edges=(low, high), reverse=rule.reverse)


def reply(queries: Mapping[QueryKey, radix.Query], rows: ShardScores) -> dict[QueryKey, radix.Answer]:
    """A shard's answers; strata it does not have answer for no rows."""
    if rows.code_N is None:
        present = {key: query for key, query in queries.items() if key[0] == rows.labels[0]}
        answers = {key: radix.answer(query, rows.score_N, rows.ids_NW) for key, query in present.items()}
    else:
        answers = _reply_strata(queries, rows, rows.code_N)
    none = np.empty(0, np.float64)
    ids_none = np.empty((0, 2), ">u8")
    return {
        key: answers[key] if key in answers else radix.answer(query, none, ids_none) for key, query in queries.items()
    }


def _reply_strata(
    queries: Mapping[QueryKey, radix.Query], rows: ShardScores, code_N: np.ndarray
) -> dict[QueryKey, radix.Answer]:
    """One pass over the rows per search number: each row is held against the range of its own stratum."""
    answers = {}
    for number in {number for _, number in queries}:
        asked = {c: queries[label, number] for c, label in enumerate(rows.labels) if (label, number) in queries}
        # Strata that are not asked about, and code -1, get an empty range (-1 is also Python's last element).
        low_S, high_S = np.full(len(rows.labels) + 1, np.inf), np.full(len(rows.labels) + 1, -np.inf)
        for code, query in asked.items():
            low_S[code], high_S[code] = radix.score_range(query)
        row_M = radix.rows_between(rows.score_N, low_S, high_S, code_N)
        code_M = code_N[row_M]
        for code, query in asked.items():
            answers[rows.labels[code], number] = radix.answer(query, rows.score_N, rows.ids_NW, row_M[code_M == code])
    return answers


def keep(cut: Cut, rows: ShardScores) -> np.ndarray:
    """Which rows of a shard the cut keeps, bool."""
    if cut.edges is not None:
        is_inside_N = (rows.score_N > cut.edges[0]) & (rows.score_N < cut.edges[1])
        return ~is_inside_N if cut.reverse else is_inside_N
    cuts = [cut.thresholds.get(label) for label in rows.labels]
    return keep_mask(rows.score_N, rows.ids_NW, cuts, rows.code_N)


def keep_mask(
    score_N: np.ndarray, ids_NW: np.ndarray | None, cuts: Sequence[Threshold | None], code_N: np.ndarray | None = None
) -> np.ndarray:
    """Which rows are at or before the cut of their stratum.

    Args:
        score_N: float64, finite.
        ids_NW: may be None when no cut `needs_ids`.
        cuts: one per stratum, all of one direction; None keeps nothing of it.
        code_N: position in `cuts` of each row, -1 for rows that are never kept; None: all rows are in the first.
    """
    is_kept_N = np.zeros(len(score_N), bool)
    given = [cut for cut in cuts if cut is not None]
    if not given:
        return is_kept_N
    never = math.inf if given[0].descending else -math.inf
    limit_S = np.array([never if cut is None else cut.score for cut in [*cuts, None]])
    for block in radix.blocks(len(score_N)):
        score_B, limit_B = score_N[block], limit_S[0 if code_N is None else code_N[block]]
        is_kept_N[block] = score_B >= limit_B if given[0].descending else score_B <= limit_B
        if any(cut.needs_ids for cut in given):
            tie_M = np.flatnonzero(score_B == limit_B) + block.start
            is_kept_N[tie_M] = _ids_up_to(ids_NW, tie_M, cuts, 0 if code_N is None else code_N[tie_M])
    return is_kept_N


def _ids_up_to(
    ids_NW: np.ndarray | None, row_M: np.ndarray, cuts: Sequence[Threshold | None], code_M: np.ndarray | int
) -> np.ndarray:
    """Whether the pair_id of each row is at or before that of its stratum's cut."""
    if ids_NW is None:
        raise ValueError("this cut needs the pair_ids")
    last = [(1 << 128) - 1 if cut is None or cut.pair_id is None else cut.pair_id for cut in cuts]
    last_SW = np.array([divmod(pair_id, 1 << radix.WORD_BITS) for pair_id in last], np.uint64)
    ids_MW, last_MW = ids_NW[row_M], last_SW[code_M]
    first_M, last_M = ids_MW[:, 0], last_MW[..., 0]
    return (first_M < last_M) | ((first_M == last_M) & (ids_MW[:, 1] <= last_MW[..., 1]))
