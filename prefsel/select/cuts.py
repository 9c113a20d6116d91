"""Cuts: which rows of a score a leaf keeps, decided from histograms and a few counting rounds.

    decide (driver)  -- queries -->  reply (each shard)  ->  Cut  ->  keep (each shard)

A *label* names a stratum: the values of the quota's columns; `()` is the whole corpus. Scores, pair_ids and strata of
a shard travel together as `ShardScores`. N: rows of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.rules import (
    Above,
    Band,
    Label,
    Leaf,
    interpolate,
    largest_remainder,
    quantile_position,
    rule_budget,
)
from prefsel.select import radix
from prefsel.select.brackets import (
    NO_IDS,
    NO_SCORES,
    IdBracket,
    QueryKey,
    ScoreBracket,
    arounds,
    limits,
    locate_ids,
    locate_scores,
    scan,
    split_ids,
    tied,
)
from prefsel.select.fences import Bounds

Question = radix.Query | ScoreBracket | IdBracket
Ask = Callable[[dict[QueryKey, Any]], Sequence[Mapping[QueryKey, Any]]]


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
    """Of `band` and `above`: kept are the rows strictly between them."""
    reverse: bool = False
    """Of `band` and `above`: keep the complement. (A reversed top has ascending thresholds.)"""
    length_edges: tuple[float, ...] | None = None
    """Of strata by `length_bin`: the inner edges."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to apply the cut: only where a threshold score ties."""
        return any(cut is not None and cut.needs_ids for cut in self.thresholds.values())

    def to_json(self) -> dict[str, Any]:
        """For a manifest: edges, or per stratum the threshold score and pair_id (null: all ties kept)."""
        if self.edges is not None:
            low, high = self.edges
            named = {"above": low} if math.isinf(high) else {"low": low, "high": high}
            return named | {"reverse": self.reverse}
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
    rule: Leaf,
    histograms: Mapping[Label, radix.Histogram],
    ask: Ask,
    *,
    bounds: Mapping[Label, Bounds] | None = None,
    max_candidates: int = radix.MAX_CANDIDATES,
) -> Cut:
    """The cut of `rule` over a corpus.

    Args:
        rule: what to keep.
        histograms: of the scores of the whole corpus, by stratum: by the quota's columns, else one, of label `()`.
        ask: sends queries to every shard (`reply`) and returns the answers, one mapping per shard, in any order.
        bounds: of the same scores by the same strata; how many rows a stratum has is taken from them, and one without
            them takes more rounds.
        max_candidates: rows a boundary bin may have before it is collected rather than refined.

    Raises:
        UserError: a count above the eligible corpus; pair_ids that are not unique where a score ties.
    """
    if isinstance(rule, Above):
        return Cut({}, edges=(rule.threshold, math.inf), reverse=rule.reverse)
    if isinstance(rule, Band):
        histogram = histograms[()]
        shares = (rule.low / 100, rule.high / 100)
        low, high = 0.0, 0.0
        if histogram.total:
            low, high = quantiles(histogram, shares, ask, bounds=bounds, max_candidates=max_candidates)
        return Cut({}, edges=(low, high), reverse=rule.reverse)
    labels = sorted(histograms, key=lambda label: [(value is not None, value or "") for value in label])
    known = bounds or {}
    sizes = [known[label].num_rows if label in known else histograms[label].total for label in labels]
    seats = largest_remainder(sizes, rule_budget(rule, sum(sizes)))
    searches = {
        (label, 0): radix.top(k, descending=not rule.reverse, max_candidates=max_candidates)
        for label, k in zip(labels, seats)
        if k
    }
    found = solve(searches, histograms, known, ask)
    cuts = {label: threshold(found[label, 0]) if (label, 0) in found else None for label in labels}
    return Cut(cuts)


def quantiles(
    histogram: radix.Histogram,
    shares: Sequence[float],
    ask: Ask,
    *,
    label: Label = (),
    bounds: Mapping[Label, Bounds] | None = None,
    max_candidates: int = radix.MAX_CANDIDATES,
) -> list[float]:
    """Exact quantiles (numpy's `linear`) of all rows of `label`, of which there is at least one.

    Args:
        histogram: of the rows.
        shares: from 0 to 1.
        ask: as of `decide`.
        label: of the rows.
        bounds: as of `decide`.
        max_candidates: as of `decide`.
    """
    positions = [quantile_position(histogram.total, share) for share in shares]
    ranks = {rank for below, above, _ in positions for rank in (below, above)}
    searches = {(label, rank): radix.order_statistic(rank, max_candidates=max_candidates) for rank in sorted(ranks)}
    solved = solve(searches, {label: histogram}, bounds or {}, ask)
    found = {key: radix.found_score(search) for key, search in solved.items()}
    return [interpolate(found[label, b], found[label, a], fraction) for b, a, fraction in positions]


def solve(
    searches: Mapping[QueryKey, radix.Search],
    histograms: Mapping[Label, radix.Histogram],
    bounds: Mapping[Label, Bounds],
    ask: Ask,
) -> dict[QueryKey, radix.Search]:
    """Run searches to their end: one round each for scores and ids where that is enough, else digit by digit."""
    located = locate_scores(searches, bounds, ask)
    begun = {
        key: located[key] if key in located else radix.begin(search, histograms[key[0]])
        for key, search in searches.items()
    }
    return radix.solve(locate_ids(begun, ask), ask)


def reply(queries: Mapping[QueryKey, Question], rows: ShardScores) -> dict[QueryKey, Any]:
    """A shard's answers; strata it does not have answer for no rows."""
    of_digits = {key: query for key, query in queries.items() if isinstance(query, radix.Query)}
    of_scores = {key: query for key, query in queries.items() if isinstance(query, ScoreBracket)}
    of_ids = {key: query for key, query in queries.items() if isinstance(query, IdBracket)}
    return _reply_digits(of_digits, rows) | _reply_scores(of_scores, rows) | _reply_ids(of_ids, rows)


def _reply_scores(brackets: Mapping[QueryKey, ScoreBracket], rows: ShardScores) -> dict[QueryKey, Any]:
    answers: dict[QueryKey, Any] = {key: NO_SCORES for key in brackets}
    for number in {number for _, number in brackets}:
        found = scan(rows.score_N, *limits(brackets, number, rows.labels), rows.code_N)
        by_label = arounds(found, rows.code_N, rows.labels)
        answers |= {(label, number): one for label, one in by_label.items() if (label, number) in brackets}
    return answers


def _reply_ids(brackets: Mapping[QueryKey, IdBracket], rows: ShardScores) -> dict[QueryKey, Any]:
    answers: dict[QueryKey, Any] = {key: NO_IDS for key in brackets}
    for code, label in enumerate(rows.labels):
        for key, bracket in brackets.items():
            if key[0] == label:
                assert rows.ids_NW is not None, "whoever asks for ids has read them"
                is_tied_N = rows.score_N == bracket.score
                if rows.code_N is not None:
                    is_tied_N &= rows.code_N == code
                row_M = np.flatnonzero(is_tied_N)
                is_below_M, is_inside_M = split_ids(rows.ids_NW, row_M, np.uint64(bracket.low), np.uint64(bracket.high))
                inside_MW = rows.ids_NW[row_M[is_inside_M]]
                answers[key] = tied(bracket, int(np.count_nonzero(is_below_M)), inside_MW)
    return answers


def _reply_digits(queries: Mapping[QueryKey, radix.Query], rows: ShardScores) -> dict[QueryKey, Any]:
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
            is_kept_N[tie_M] = ids_up_to(ids_NW, tie_M, cuts, 0 if code_N is None else code_N[tie_M])
    return is_kept_N


def ids_up_to(
    ids_NW: np.ndarray | None, row_M: np.ndarray, cuts: Sequence[Threshold | None], code_M: np.ndarray | int
) -> np.ndarray:
    """Whether the pair_id of each row is at or before that of its stratum's cut."""
    if ids_NW is None:
        raise ValueError("this cut needs the pair_ids")
    last = [(1 << 128) - 1 if cut is None or cut.pair_id is None else cut.pair_id for cut in cuts]
    words = [divmod(pair_id, 1 << radix.WORD_BITS) for pair_id in last]
    last_SW = np.array(words, np.uint64).reshape(-1, 2)  # also of no cut: a shard may lack every stratum that ties
    ids_MW, last_MW = ids_NW[row_M], last_SW[code_M]
    first_M, last_M = ids_MW[:, 0], last_MW[..., 0]
    return (first_M < last_M) | ((first_M == last_M) & (ids_MW[:, 1] <= last_MW[..., 1]))
