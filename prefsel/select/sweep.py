"""One process, one pass: bitmaps of the rows a top or a quota keeps, straight from committed scores, without a cluster.

    fences ─▶ bracket ─▶ every shard, read once: rows above it are kept, rows in it are open
                          └▶ threshold ─▶ open rows are kept or not; where it ties, one read of the pair_ids decides

Between the rounds a shard is a few bitmaps and the scores inside the bracket: some bits a row. Other rules, and scores
without fences, take the rounds of `evaluate` and one more read.

Suffixes: N rows of a shard, M those that have the score, U undecided rows among them.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from prefsel.select.brackets import (
    NO_IDS,
    NO_SCORES,
    IdBracket,
    QueryKey,
    Scan,
    ScoreBracket,
    arounds,
    limits,
    scan,
    split_ids,
    tied,
)
from prefsel.select.compose import Keep, Plan
from prefsel.select.cuts import Cut, ShardScores, Threshold, ids_up_to, keep
from prefsel.select.evaluate import Asked, answer, cut_leaf, kept
from prefsel.select.radix import id_words
from prefsel.select.rules import Quota, Top
from prefsel.select.score_reader import ScoreReader
from prefsel.select.scored import corpus_bounds, corpus_histograms
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Entry

Found = TypeVar("Found")


@dataclass(frozen=True)
class Swept:
    """What a rule keeps, and what it took to know."""

    bitmaps: list[np.ndarray]
    """Kept rows of each shard, as `np.packbits` makes them."""
    cut: Cut
    reads: Counter[str]
    """How often each column was read."""


def sweep(
    plan: Plan, reader: ScoreReader, shards: Sequence[ShardRef], entries: Sequence[Entry], *, num_threads: int = 0
) -> Swept:
    """What a rule of one leaf keeps of every shard.

    Args:
        plan: of the rule, without derived scores.
        reader: of its scores.
        shards: of the corpus.
        entries: their ledger entries.
        num_threads: that read shards; 0: one per core.

    Raises:
        UserError: as of `cuts.decide`.
    """
    leaf = plan.keep
    assert isinstance(leaf, Keep), "an intersection has several leaves"
    assert not plan.derived, "derived scores are committed, then swept like others"
    num_threads = num_threads or os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:

        def each(work: Callable[[int], Found]) -> list[Found]:
            # Runs of shards, not shards: handing one over costs 0.05 ms, a fourth of reading 100 000 scores.
            runs = np.array_split(np.arange(len(shards)), min(len(shards), 4 * num_threads))
            return [one for run in pool.map(lambda run: [work(int(shard)) for shard in run], runs) for one in run]

        rounds = _Rounds(leaf, reader, shards, each)
        known = isinstance(leaf.rule, Top | Quota) and leaf.has_own_scores and "length_bin" not in leaf.by
        committed = {"committed": corpus_histograms(entries, leaf.by), "bounds": corpus_bounds(entries, leaf.by)}
        cut = cut_leaf(leaf, rounds.ask, **(committed if known else {}))  # type: ignore[arg-type]
        if rounds.is_one_pass and not leaf.is_complement:
            bitmaps = each(lambda shard: rounds.settle(shard, cut))
        else:
            rounds.count([leaf.column, *leaf.by, *(["pair_id"] if cut.needs_ids else [])])
            bitmaps = each(lambda shard: np.packbits(kept(leaf, [cut], rounds.rows(shard, ids=cut.needs_ids))))
    return Swept(bitmaps, cut, rounds.reads)


@dataclass(frozen=True)
class Undecided:
    """A shard after the round over scores, or over ids."""

    num_rows: int
    """N."""
    present: np.ndarray | None
    """Bits of M among N; None: all."""
    kept: np.ndarray
    """Bits over M: rows above the bracket, or below it where the smallest scores are wanted."""
    undecided: np.ndarray
    """Bits over M: rows in it."""
    high: np.ndarray
    """Bits over M: those with exactly its higher score."""
    row: np.ndarray
    """Rows strictly inside, int32, and their scores."""
    score: np.ndarray
    labels: Sequence[Any]
    code_U: np.ndarray | None
    """Strata."""
    below: np.ndarray | None = None
    """After the round over ids. Bits over N: tied rows with an id below the bracket."""
    id_row: np.ndarray | None = None
    """Rows of N that tie and have an id in it, int32, their strata, and their ids."""
    id_code: np.ndarray | None = None
    id_words: np.ndarray | None = None

    def rows(self) -> np.ndarray:
        """The undecided rows, [U]."""
        return _rows(self.undecided)

    def scores(self, row_U: np.ndarray, low_S: np.ndarray, high_S: np.ndarray) -> np.ndarray:
        """Their scores."""
        if self.code_U is None:
            score_U = np.full(len(row_U), high_S[0])
            if self.high is not self.undecided:
                score_U[~_is_set(self.high, row_U)] = low_S[0]
        else:
            score_U = np.where(_is_set(self.high, row_U), high_S[self.code_U], low_S[self.code_U])
        score_U[np.searchsorted(row_U, self.row)] = self.score
        return score_U


def undecided(
    found: Scan, rows: ShardScores, row_M: np.ndarray | None, num_rows: int, *, descending: bool
) -> Undecided:
    """What is kept in mind of a scanned shard."""
    num_scored, inside_M = len(rows.score_N), ~(found.high_M | found.low_M)
    is_kept_M = found.is_above_N if descending else ~found.is_above_N
    if not descending:
        is_kept_M[found.row_M] = False
    bits = _bits(found.row_M, num_scored)
    return Undecided(
        num_rows=num_rows,
        present=None if row_M is None else _bits(row_M, num_rows),
        kept=np.packbits(is_kept_M),
        undecided=bits,
        high=bits if found.high_M.all() else _bits(found.row_M[found.high_M], num_scored),
        row=found.row_M[inside_M].astype(np.int32),
        score=found.score_M[inside_M],
        labels=rows.labels,
        code_U=None if found.code_M is None else found.code_M.astype(np.min_scalar_type(len(rows.labels))),
    )


class _Rounds:
    """The rounds about one leaf and what they leave undecided; `ask` is what `cut_leaf` wants."""

    def __init__(self, leaf: Keep, reader: ScoreReader, shards: Sequence[ShardRef], each: Callable[..., Any]) -> None:
        self.leaf, self.reader, self.shards, self.each = leaf, reader, shards, each
        self.reads: Counter[str] = Counter()
        self.left: dict[int, Undecided] = {}
        self.brackets: dict[QueryKey, ScoreBracket] = {}
        self.is_one_pass = False
        """Whether the shards need not be read again to be settled."""

    def count(self, columns: Sequence[str]) -> None:
        """Columns that every shard is about to be read for."""
        self.reads.update(columns)

    def rows(self, shard: int, *, ids: bool = False) -> Any:
        """The rows of a shard."""
        columns = list(dict.fromkeys((self.leaf.column, *self.leaf.population)))
        return self.reader.rows(self.shards[shard], columns, ids=ids, by=self.leaf.by)

    def ask(self, asked: Asked) -> Sequence[Mapping[Any, Any]]:
        """Answers of all shards."""
        queries = asked.queries or {}
        if queries and all(isinstance(one, ScoreBracket) for one in queries.values()):
            self.brackets, self.is_one_pass = dict(queries), True  # type: ignore[arg-type]
            self.count([self.leaf.column, *self.leaf.by])
            return self.each(self._scan)
        if self.is_one_pass and queries and all(isinstance(one, IdBracket) for one in queries.values()):
            self.count(["pair_id"])
            return self.each(lambda shard: self._ids(shard, queries))
        self.is_one_pass = False
        self.count([self.leaf.column, *self.leaf.by, *(["pair_id"] if asked.needs_ids else [])])
        return self.each(lambda shard: answer(asked, self.rows(shard, ids=asked.needs_ids)))

    def _scan(self, shard: int) -> Mapping[QueryKey, Any]:
        rows = self.rows(shard)
        scores, row_M = rows.select(self.leaf.column, self.leaf.population, by=self.leaf.by)
        descending = not self.leaf.rule.reverse
        low_S, high_S = limits(self.brackets, 0, scores.labels)
        if not descending:  # strata without seats are put above every row: where the smallest are kept, below
            low_S[np.isinf(low_S)] = high_S[np.isinf(high_S)] = -math.inf
        found = scan(scores.score_N, low_S, high_S, scores.code_N)
        self.left[shard] = undecided(found, scores, row_M, rows.num_rows, descending=descending)
        return _by_key(self.brackets, arounds(found, scores.code_N, scores.labels))

    def _ids(self, shard: int, brackets: Mapping[QueryKey, Any]) -> Mapping[QueryKey, Any]:
        left = self.left[shard]
        row_U = left.rows()
        score_U = left.scores(row_U, *limits(self.brackets, 0, left.labels))
        ids_NW = id_words(self.reader.table(self.shards[shard], self.leaf.column, ["pair_id"])["pair_id"])
        place_U = row_U if left.present is None else _rows(left.present)[row_U]
        asked = {code: brackets[label, 0] for code, label in enumerate(left.labels) if (label, 0) in brackets}
        # All strata at once; nothing equals the NaN of those that are not asked about.
        score_S, first_S2 = np.full(len(left.labels), np.nan), np.zeros((len(left.labels), 2), np.uint64)
        for code, bracket in asked.items():
            score_S[code], first_S2[code] = bracket.score, (bracket.low, bracket.high)
        code_U = np.zeros(len(row_U), np.int8) if left.code_U is None else left.code_U
        is_tied_U = score_U == (score_S[0] if left.code_U is None else score_S[code_U])
        row_T, code_T = place_U[is_tied_U], code_U[is_tied_U]
        first_2 = first_S2[0] if left.code_U is None else first_S2[code_T].T
        is_below_T, is_inside_T = split_ids(ids_NW, row_T, first_2[0], first_2[1])
        num_below_S = np.bincount(code_T[is_below_T], minlength=len(left.labels)).tolist()
        id_row, id_code = row_T[is_inside_T], code_T[is_inside_T]
        words = ids_NW[id_row]
        below = _bits(row_T[is_below_T], left.num_rows)
        self.left[shard] = replace(left, below=below, id_row=id_row.astype(np.int32), id_code=id_code, id_words=words)
        answers = {
            left.labels[code]: tied(bracket, num_below_S[code], words[id_code == code])
            for code, bracket in asked.items()
        }
        return _by_key(brackets, answers)

    def settle(self, shard: int, cut: Cut) -> np.ndarray:
        """The bitmap of a shard, over N: what is above, and the undecided rows held against the cut."""
        left = self.left[shard]
        row_U = left.rows()
        score_U = left.scores(row_U, *limits(self.brackets, 0, left.labels))
        # Where ids decide, the rows that tie are told apart below.
        by_score = replace(cut, thresholds={label: _strict(one) for label, one in cut.thresholds.items()})
        is_kept_U = keep(by_score, ShardScores(score_U, None, left.code_U, left.labels))
        bits = left.kept | _bits(row_U[is_kept_U], 8 * len(left.kept))
        if left.present is not None:
            row_M = _rows(left.present)
            bits = _bits(row_M[np.unpackbits(bits, count=len(row_M)).view(bool)], left.num_rows)
        if left.below is None or left.id_row is None or left.id_code is None or left.id_words is None:
            return bits
        last = [cut.thresholds.get(label) for label in left.labels]
        is_first_T = ids_up_to(left.id_words, np.arange(len(left.id_row)), last, left.id_code)
        return bits | left.below | _bits(left.id_row[is_first_T], left.num_rows)


def _strict(threshold: Threshold | None) -> Threshold | None:
    """The threshold that keeps no row with its very score, if ids decide about those."""
    if threshold is None or not threshold.needs_ids:
        return threshold
    beyond = math.inf if threshold.descending else -math.inf
    return Threshold(float(np.nextafter(threshold.score, beyond)), None, threshold.descending)


def _by_key(queries: Mapping[QueryKey, Any], answers: Mapping[Any, Any]) -> dict[QueryKey, Any]:
    """Answers by question, strata that the shard lacks included."""
    none = {ScoreBracket: NO_SCORES, IdBracket: NO_IDS}
    return {key: answers.get(key[0], none[type(query)]) for key, query in queries.items()}


def _bits(rows: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[rows] = True
    return np.packbits(mask)


def _rows(bits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bits).view(bool))  # ten times as fast as on integers


def _is_set(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits).view(bool)[rows]
