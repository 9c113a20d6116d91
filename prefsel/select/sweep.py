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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from prefsel.pairs.score_shards import ScoreReader
from prefsel.rules import Quota, Top
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
from prefsel.select.rows import Rows
from prefsel.select.scored import CorpusHistograms, corpus_bounds
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Entry

Found = TypeVar("Found")
RUN = 4
"""Shards that a thread reads at a time."""
FEW = 64
"""One row of so many is kept in mind by its number and score: 1.5 bits a row of the shard."""
NONE, BIT = np.empty(0, np.uint8), np.array([128 >> place for place in range(8)], np.uint8)


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
        rounds = _Rounds(leaf, reader, shards, partial(_ahead, pool, num_threads, range(len(shards))))
        histograms = bounds = None
        if isinstance(leaf.rule, Top | Quota) and leaf.has_own_scores and "length_bin" not in leaf.by:
            histograms, bounds = CorpusHistograms(entries, leaf.by), corpus_bounds(entries, leaf.by)
        cut = cut_leaf(leaf, rounds.ask, committed=histograms, bounds=bounds)
        if rounds.is_one_pass and not leaf.is_complement:
            bitmaps = [rounds.settle(shard, cut) for shard in range(len(shards))]
        else:
            rounds.count([leaf.column, *leaf.by, *(["pair_id"] if cut.needs_ids else [])])
            read = rounds.read(lambda shard: rounds.rows(shard, ids=cut.needs_ids))
            bitmaps = [np.packbits(kept(leaf, [cut], rows)) for rows in read]
    return Swept(bitmaps, cut, rounds.reads)


def _ahead(
    pool: ThreadPoolExecutor, num_threads: int, items: Sequence[int], read: Callable[[int], Found]
) -> Iterator[Found]:
    """What `read` gives of every item, in order, while threads read the next ones.

    Threads that read and compute wait for each other's interpreter lock: 34 ms for 10⁷ scores, so 25. Runs of shards,
    because handing one over costs 0.05 ms, a fourth of reading 100 000 scores.
    """
    pending: deque[Future[list[Found]]] = deque()
    for first in range(0, len(items), RUN):
        pending.append(pool.submit(lambda run: [read(item) for item in run], items[first : first + RUN]))
        if len(pending) > num_threads:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


@dataclass(frozen=True)
class Undecided:
    """A shard after the round over scores, or over ids."""

    num_rows: int
    """N."""
    present: np.ndarray | None
    """Bits of M among N; None: all."""
    kept: np.ndarray
    """Bits over M: rows above the bracket, or below it where the smallest scores are wanted."""
    few: tuple[np.ndarray, np.ndarray] | None
    """Rows in it, int32, and their scores, where they are few; else the next four say it."""
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
        return _rows(self.undecided) if self.few is None else self.few[0]

    def scores(self, row_U: np.ndarray, low_S: np.ndarray, high_S: np.ndarray) -> np.ndarray:
        """Their scores."""
        if self.few is not None:
            return self.few[1]
        assert self.code_U is not None, "the rows of one stratum are bits"
        score_U = np.where(_is_set(self.high, row_U), high_S[self.code_U], low_S[self.code_U])
        score_U[np.searchsorted(row_U, self.row)] = self.score
        return score_U

    @property
    def are_bits(self) -> bool:
        """Whether the rows are bits of one stratum, so that those of the two scores need not be numbered."""
        return self.few is None and self.code_U is None

    def low(self) -> np.ndarray:
        """Bits over M: rows with exactly the bracket's lower score, where it has two."""
        return self.undecided & ~self.high & ~_bits(self.row, 8 * len(self.undecided))

    def tied(self, score_S: np.ndarray, low_S: np.ndarray, high_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows with exactly the score of their stratum, [T], and their strata; NaN: none."""
        if self.are_bits:
            if score_S[0] in (high_S[0], low_S[0]):
                row_T = _rows(self.high if score_S[0] == high_S[0] else self.low())
            else:
                row_T = self.row[self.score == score_S[0]]
            return row_T, np.zeros(len(row_T), np.int8)
        row_U = self.rows()
        code_U = np.zeros(len(row_U), np.int8) if self.code_U is None else self.code_U
        is_tied_U = self.scores(row_U, low_S, high_S) == score_S[code_U]
        return row_U[is_tied_U], code_U[is_tied_U]


def undecided(
    found: Scan, rows: ShardScores, row_M: np.ndarray | None, num_rows: int, *, descending: bool
) -> Undecided:
    """What is kept in mind of a scanned shard."""
    num_scored = len(rows.score_N)
    is_kept_M = found.is_above_N if descending else ~found.is_above_N
    if not descending:
        is_kept_M[found.row_M] = False
    left = Undecided(
        num_rows=num_rows,
        present=None if row_M is None else _bits(row_M, num_rows),
        kept=np.packbits(is_kept_M),
        few=(found.row_M.astype(np.int32), found.score_M),
        undecided=NONE,
        high=NONE,
        row=NONE,
        score=NONE,
        labels=rows.labels,
        code_U=None if found.code_M is None else found.code_M.astype(np.min_scalar_type(len(rows.labels))),
    )
    if FEW * len(found.row_M) <= num_scored:
        return left
    inside_M, bits = ~(found.high_M | found.low_M), _bits(found.row_M, num_scored)
    return replace(
        left,
        few=None,
        undecided=bits,
        high=bits if found.high_M.all() else _bits(found.row_M[found.high_M], num_scored),
        row=found.row_M[inside_M].astype(np.int32),
        score=found.score_M[inside_M],
    )


class _Rounds:
    """The rounds about one leaf and what they leave undecided; `ask` is what `cut_leaf` wants."""

    def __init__(self, leaf: Keep, reader: ScoreReader, shards: Sequence[ShardRef], read: Callable[..., Any]) -> None:
        self.leaf, self.reader, self.shards, self.read = leaf, reader, shards, read
        self.reads: Counter[str] = Counter()
        self.left: dict[int, Undecided] = {}
        self.brackets: dict[QueryKey, ScoreBracket] = {}
        self.is_one_pass = False
        """Whether the shards need not be read again to be settled."""

    def count(self, columns: Sequence[str]) -> None:
        """Columns that every shard is about to be read for."""
        self.reads.update(columns)

    def rows(self, shard: int, *, ids: bool = False) -> Rows:
        """The rows of a shard."""
        columns = list(dict.fromkeys((self.leaf.column, *self.leaf.population)))
        return self.reader.rows(self.shards[shard], columns, ids=ids, by=self.leaf.by)

    def ask(self, asked: Asked) -> Sequence[Mapping[Any, Any]]:
        """Answers of all shards."""
        queries = asked.queries or {}
        if queries and all(isinstance(one, ScoreBracket) for one in queries.values()):
            self.brackets, self.is_one_pass = dict(queries), True  # type: ignore[arg-type]
            self.count([self.leaf.column, *self.leaf.by])
            return [self._scan(shard, rows) for shard, rows in enumerate(self.read(self.rows))]
        if self.is_one_pass and queries and all(isinstance(one, IdBracket) for one in queries.values()):
            self.count(["pair_id"])
            return [self._ids(shard, words, queries) for shard, words in enumerate(self.read(self._words))]
        self.is_one_pass = False
        self.count([self.leaf.column, *self.leaf.by, *(["pair_id"] if asked.needs_ids else [])])
        return [answer(asked, rows) for rows in self.read(lambda shard: self.rows(shard, ids=asked.needs_ids))]

    def _scan(self, shard: int, rows: Rows) -> Mapping[QueryKey, Any]:
        scores, row_M = rows.select(self.leaf.column, self.leaf.population, by=self.leaf.by)
        descending = not self.leaf.rule.reverse
        low_S, high_S = limits(self.brackets, 0, scores.labels)
        if not descending:  # strata without seats are put above every row: where the smallest are kept, below
            low_S[np.isinf(low_S)] = high_S[np.isinf(high_S)] = -math.inf
        found = scan(scores.score_N, low_S, high_S, scores.code_N)
        self.left[shard] = undecided(found, scores, row_M, rows.num_rows, descending=descending)
        return _by_key(self.brackets, arounds(found, scores.code_N, scores.labels))

    def _words(self, shard: int) -> np.ndarray:
        return id_words(self.reader.table(self.shards[shard], self.leaf.column, ["pair_id"])["pair_id"])

    def _ids(self, shard: int, ids_NW: np.ndarray, brackets: Mapping[QueryKey, Any]) -> Mapping[QueryKey, Any]:
        left = self.left[shard]
        asked = {code: brackets[label, 0] for code, label in enumerate(left.labels) if (label, 0) in brackets}
        # All strata at once; nothing equals the NaN of those that are not asked about.
        score_S, first_S2 = np.full(len(left.labels), np.nan), np.zeros((len(left.labels), 2), np.uint64)
        for code, bracket in asked.items():
            score_S[code], first_S2[code] = bracket.score, (bracket.low, bracket.high)
        row_T, code_T = left.tied(score_S, *limits(self.brackets, 0, left.labels))
        row_T = row_T if left.present is None else _rows(left.present)[row_T]
        first_2 = first_S2[0] if left.code_U is None else first_S2[code_T].T
        is_below_T, is_inside_T = split_ids(ids_NW, row_T, first_2[0], first_2[1])
        if left.code_U is None:
            num_below_S = [int(np.count_nonzero(is_below_T))]
        else:
            num_below_S = np.bincount(code_T[is_below_T], minlength=len(left.labels)).tolist()
        place_I = np.flatnonzero(is_inside_T)
        id_row, id_code = row_T[place_I], code_T[place_I]
        words = ids_NW[id_row]
        below = _bits(row_T, left.num_rows, is_below_T)
        self.left[shard] = replace(left, below=below, id_row=id_row.astype(np.int32), id_code=id_code, id_words=words)
        answers = {
            left.labels[code]: tied(bracket, num_below_S[code], words[id_code == code])
            for code, bracket in asked.items()
        }
        return _by_key(brackets, answers)

    def settle(self, shard: int, cut: Cut) -> np.ndarray:
        """The bitmap of a shard, over N: what is above, and the undecided rows held against the cut."""
        left = self.left[shard]
        low_S, high_S = limits(self.brackets, 0, left.labels)
        # Where ids decide, the rows that tie are told apart below.
        by_score = replace(cut, thresholds={label: _strict(one) for label, one in cut.thresholds.items()})
        bits = left.kept
        if left.are_bits:
            ends = keep(by_score, ShardScores(np.array([high_S[0], low_S[0]]), labels=left.labels))
            bits = bits | left.high if ends[0] else bits
            bits = bits | left.low() if ends[1] else bits
            row_U, score_U = left.row, left.score
        else:
            row_U = left.rows()
            score_U = left.scores(row_U, low_S, high_S)
        bits = _with_bits(bits, row_U[keep(by_score, ShardScores(score_U, None, left.code_U, left.labels))])
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


def _bits(rows: np.ndarray, count: int, values: np.ndarray | bool = True) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[rows] = values
    return np.packbits(mask)


def _with_bits(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`bits` and those of some more rows."""
    if FEW * len(rows) > 8 * len(bits):
        return bits | _bits(rows, 8 * len(bits))
    bits = bits.copy()
    np.bitwise_or.at(bits, rows >> 3, BIT[rows & 7])
    return bits


def _rows(bits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bits).view(bool))  # ten times as fast as on integers


def _is_set(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits).view(bool)[rows]
