"""Exact order statistics and exact k-best over shards, by radix: counts travel, rows stay.

A row's place in the total order (score, then pair_id ascending) is a number of 192 bits: the order-preserving image of
the score (64), then the pair_id (128, big-endian). The row of a given rank is found from the leading bits down:

    driver                                shards
    next_query  -> prefix, known bits ->  answer: histogram of the next 16 bits of the rows with that prefix
    advance     <- merged histogram   <-    ... or, once few rows are left, the remaining words of those rows

`next_query`, `advance` and `answer` are pure, so the same code serves one process and a cluster. Memory is
O(bins + candidates). The pair_id is only looked at among rows that tie with the threshold score.

Shape suffixes: N rows of a shard, M candidates, W = 2 words of a pair_id (`>u8`: big-endian, so Arrow's bytes as
they lie).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from prefsel.errors import IntegrityError, NonFiniteError, UserError

MAX_CANDIDATES = 1_000_000
WORD_BITS, DIGIT_BITS = 64, 16
NUM_BINS = 1 << DIGIT_BITS
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
SIGN = np.uint64(1 << 63)
# Rows handled at once, so that temporaries stay in the cache: a search over 1e7 rows took 32 ms, in one piece 57 ms.
# Blocks of 2^17 and 2^18 were between 28 and 108 ms, as the allocator maps and unmaps temporaries of that size.
BLOCK = 1 << 16
# Bins of one non-finite sign: exponents of all ones are the first and the last 16 of the 65 536.
NON_FINITE_BINS = 16

Key = TypeVar("Key", bound=Hashable)


def blocks(num_rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def order_keys(score_N: np.ndarray) -> np.ndarray:
    """The order-preserving uint64 image of float64 scores: `a < b` iff `key(a) < key(b)`, and -0.0 equals 0.0.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    finite_N = np.isfinite(score_N)
    if not finite_N.all():
        raise non_finite(np.flatnonzero(~finite_N))
    bits_N = (score_N + 0.0).view(np.uint64)
    # Negative numbers: all bits flipped. Others: the sign bit set. (The signed shift copies the sign; 5 x `np.where`.)
    return bits_N ^ ((bits_N.view(np.int64) >> 63).view(np.uint64) | SIGN)


def id_words(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of 16-byte identifiers without nulls as two words each (`>u8` [N, 2]), in place when it is one chunk."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # one chunk would be copied by `combine_chunks`, too
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_fixed_size_binary(array.type) or array.type.byte_width != 16 or array.null_count:
        raise UserError(f"pair_id: got {array.type} with {array.null_count} nulls; valid: 16 bytes, none null")
    if not len(array):
        return np.empty((0, 2), ">u8")
    return np.frombuffer(array.buffers()[1], ">u8", count=2 * len(array), offset=16 * array.offset).reshape(-1, 2)


def key_score(key: int) -> float:
    """The score whose order key is `key`, the inverse of `order_keys`."""
    bits = key ^ int(SIGN) if key >> 63 else key ^ int(ALL_ONES)
    return float(np.uint64(bits).view(np.float64))


def non_finite(rows: Sequence[int] | np.ndarray) -> NonFiniteError:
    """The error for scores at `rows` that are NaN or infinite."""
    return NonFiniteError(f"score: {len(rows)} values are NaN or infinite, first at rows {[int(r) for r in rows[:5]]}")


@dataclass(frozen=True)
class Histogram:
    """Sparse counts over one digit of 16 bits."""

    bins: np.ndarray
    """uint16, ascending, without repeats."""
    counts: np.ndarray
    """int64, positive."""

    @classmethod
    def from_dense(cls, counts: np.ndarray) -> Histogram:
        """The occupied ones of 65 536 counts."""
        bins = np.flatnonzero(counts)
        return cls(bins.astype(np.uint16), counts[bins].astype(np.int64))

    @classmethod
    def merge(cls, many: Iterable[Histogram]) -> Histogram:
        """The histogram of all rows of several."""
        dense = np.zeros(NUM_BINS, np.int64)
        for histogram in many:
            dense[histogram.bins] += histogram.counts
        return cls.from_dense(dense)

    @property
    def total(self) -> int:
        """Number of rows counted."""
        return int(self.counts.sum())

    def flipped(self) -> Histogram:
        """The same rows counted in descending order of their digit."""
        return Histogram((NUM_BINS - 1 - self.bins[::-1].astype(np.int64)).astype(np.uint16), self.counts[::-1])

    def to_json(self) -> dict[str, list[int]]:
        """Plain lists for a ledger."""
        return {"bins": self.bins.tolist(), "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[int]]) -> Histogram:
        """The inverse of `to_json`."""
        return cls(np.array(data["bins"], np.uint16), np.array(data["counts"], np.int64))

    def to_text(self) -> dict[str, str]:
        """Base64 for a ledger: a tenth of the time of lists, where a thousand shards have one each."""
        arrays = {"bins": self.bins.astype("<u2"), "counts": self.counts.astype("<i8")}
        return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}

    @classmethod
    def from_text(cls, data: Mapping[str, str]) -> Histogram:
        """The inverse of `to_text`."""
        bins, counts = (base64.b64decode(data[name]) for name in ("bins", "counts"))
        return cls(np.frombuffer(bins, "<u2").astype(np.uint16), np.frombuffer(counts, "<i8").astype(np.int64))

    def percentile(self, score_N: np.ndarray) -> np.ndarray:
        """Percentile (0-100) of each score under this histogram of the top 16 bits.

        Binned: `100 · (count below the bin + half the bin) / N`. All scores of one bin share a percentile; a bin is a
        sixteenth of a power of two wide.
        """
        dense = np.zeros(NUM_BINS, np.int64)
        dense[self.bins] = self.counts
        middle = 100.0 * (np.cumsum(dense) - dense / 2) / max(self.total, 1)
        return middle[(order_keys(score_N) >> np.uint64(WORD_BITS - DIGIT_BITS)).astype(np.intp)]


def _raw_digits(score_B: np.ndarray) -> np.ndarray:
    """Top 16 bits of the floats themselves (-0.0 made 0.0); `_ordered` sorts the counts, far cheaper than the rows."""
    return (score_B + 0.0).view("<u2")[3::4]


def _ordered(raw: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Counts over raw top bits, put into the order of the keys: negative numbers reversed, then the others.

    NaN and infinities land in the outermost bins of each side, so they are found here without a pass over the rows.
    """
    dense = np.concatenate([raw[NUM_BINS // 2 :][::-1], raw[: NUM_BINS // 2]])
    if dense[:NON_FINITE_BINS].any() or dense[-NON_FINITE_BINS:].any():
        raise non_finite(np.flatnonzero(~np.isfinite(score_N)))
    return dense


def histogram(score_N: np.ndarray) -> Histogram:
    """Histogram of the top 16 bits of the order keys of `score_N`; what a score shard is committed with.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    score_N = np.ascontiguousarray(score_N, np.float64)
    raw = np.zeros(NUM_BINS, np.int64)
    for block in blocks(len(score_N)):
        raw += np.bincount(_raw_digits(score_N[block]), minlength=NUM_BINS)
    return Histogram.from_dense(_ordered(raw, score_N))


def stratum_histograms(score_N: np.ndarray, code_N: np.ndarray, num_strata: int) -> list[Histogram]:
    """One `histogram` per stratum; `code_N` is in [0, num_strata), or -1 for rows of no stratum.

    Raises:
        NonFiniteError: a score of some stratum is NaN or infinite.
    """
    score_N = np.ascontiguousarray(score_N, np.float64)
    # 64 strata of dense counts are 34 MB; more strata cost one more pass per 64.
    found = []
    for first in range(0, num_strata, 64):
        width = min(64, num_strata - first)
        raw = np.zeros((width + 2, NUM_BINS), np.int64)
        for block in blocks(len(score_N), 8 * BLOCK):  # larger blocks: `raw` is added once per block
            # Slot 0 takes the rows before this group of strata, the last slot those behind it.
            slot_B = np.clip(code_N[block].astype(np.int64) - (first - 1), 0, width + 1)
            digit_B = (slot_B << DIGIT_BITS) | _raw_digits(score_N[block])
            raw += np.bincount(digit_B, minlength=raw.size).reshape(raw.shape)
        found += [Histogram.from_dense(_ordered(raw[slot], score_N)) for slot in range(1, width + 1)]
    return found


@dataclass(frozen=True)
class Query:
    """A question about the rows whose place starts with the `known` leading bits of `prefix`."""

    descending: bool
    """Larger scores come first."""
    known: int
    """Number of known bits, 0 to 191: below 64 of the score, then of the pair_id."""
    prefix: int
    is_collect: bool
    """Whether the current word of each such row is wanted, rather than a histogram of its next 16 bits."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to answer."""
        return self.known >= WORD_BITS


Answer = Histogram | np.ndarray


@dataclass(frozen=True)
class Search:
    """The state of a search for the row of one rank; advanced by `advance`, never changed."""

    rank: int
    """Rank (0 is first) among the rows that have the prefix."""
    num_words: int
    """1: the score alone decides (an order statistic). 3: score, then pair_id (a cut)."""
    descending: bool = False
    max_candidates: int = MAX_CANDIDATES
    known: int = 0
    prefix: int = 0
    size: int | None = None
    """Rows that have the prefix; None before the first answer."""

    @property
    def is_done(self) -> bool:
        """Whether the row is known, or all rows that tie with it so far come before the cut."""
        at_word = self.known > 0 and self.known % WORD_BITS == 0
        return at_word and (self.known == WORD_BITS * self.num_words or self.rank + 1 == self.size)


def top(k: int, *, descending: bool = True, max_candidates: int = MAX_CANDIDATES) -> Search:
    """A search for the cut behind the `k >= 1` first rows under (score, pair_id ascending)."""
    return Search(rank=k - 1, num_words=3, descending=descending, max_candidates=max_candidates)


def order_statistic(rank: int, *, max_candidates: int = MAX_CANDIDATES) -> Search:
    """A search for the score of rank `rank` (0 is the smallest)."""
    return Search(rank=rank, num_words=1, max_candidates=max_candidates)


def begin(search: Search, committed: Histogram) -> Search:
    """`search` after its first round, answered by the histogram the scores were committed with."""
    return advance(search, [committed.flipped() if search.descending else committed])


def next_query(search: Search) -> Query | None:
    """What to ask every shard next, or None when the search is done."""
    if search.is_done:
        return None
    is_collect = search.size is not None and search.size <= search.max_candidates
    return Query(search.descending, search.known, search.prefix, is_collect)


def advance(search: Search, answers: Sequence[Answer]) -> Search:
    """`search` after every shard has answered `next_query(search)`, in any order.

    Raises:
        IntegrityError: fewer rows answered than the rank needs: the shards changed between two rounds.
        UserError: rows with equal score and equal pair_id straddle the cut.
    """
    histograms = [a for a in answers if isinstance(a, Histogram)]
    if histograms:
        merged = Histogram.merge(histograms)
        cumulated = np.cumsum(merged.counts)
        _require_rows(search, merged.total)
        place = int(np.searchsorted(cumulated, search.rank, side="right"))
        digit, size = int(merged.bins[place]), int(merged.counts[place])
        before, known = int(cumulated[place]) - size, search.known + DIGIT_BITS
        prefix = (search.prefix << DIGIT_BITS) | digit
    else:
        word_M = np.concatenate([a for a in answers if isinstance(a, np.ndarray)])
        _require_rows(search, len(word_M))
        word = np.partition(word_M, search.rank)[search.rank]
        before, size = int(np.count_nonzero(word_M < word)), int(np.count_nonzero(word_M == word))
        partial = search.known % WORD_BITS
        known = search.known - partial + WORD_BITS
        prefix = ((search.prefix >> partial) << WORD_BITS) | int(word)
    found = replace(search, rank=search.rank - before, known=known, prefix=prefix, size=size)
    require_unique(found)
    return found


def require_unique(search: Search) -> None:
    """Refuse a cut between rows of equal score and equal pair_id.

    Raises:
        UserError: names the pair_id.
    """
    if search.known == 3 * WORD_BITS and search.size is not None and search.rank + 1 < search.size:
        twice = f"{search.prefix & ((1 << 128) - 1):032x}"
        raise UserError(
            f"pair_id: {search.size} rows share the pair_id {twice} and their score; pair_ids must be unique"
        )


def _require_rows(search: Search, num_rows: int) -> None:
    if search.rank >= num_rows or (search.size is not None and num_rows != search.size):
        raise IntegrityError(f"search for rank {search.rank}: {num_rows} rows answered, expected {search.size}")


def found_score(search: Search) -> float:
    """The score of the row that was searched for."""
    key = search.prefix >> (search.known - WORD_BITS)
    return key_score(key ^ int(ALL_ONES) if search.descending else key)


def solve(
    searches: Mapping[Key, Search], ask: Callable[[dict[Key, Query]], Sequence[Mapping[Key, Answer]]]
) -> dict[Key, Search]:
    """Run several searches to their end in common rounds.

    Args:
        searches: by any key.
        ask: sends the open queries to every shard and returns one mapping of answers per shard.
    """
    state = dict(searches)
    while queries := {key: query for key, search in state.items() if (query := next_query(search)) is not None}:
        replies = ask(queries)
        for key in queries:
            state[key] = advance(state[key], [reply[key] for reply in replies])
    return state


def score_range(query: Query) -> tuple[float, float]:
    """Smallest and largest score whose key has the query's prefix (the first 64 bits of it)."""
    known = min(query.known, WORD_BITS)
    head = query.prefix >> (query.known - known)
    low = head << (WORD_BITS - known)
    high = low | ((1 << (WORD_BITS - known)) - 1)
    if query.descending:
        low, high = high ^ int(ALL_ONES), low ^ int(ALL_ONES)
    # The key just below that of 0.0 is that of -0.0, which no score has but which compares equal to 0.0.
    high -= high == int(SIGN) - 1
    return (-math.inf, math.inf) if known == 0 else (key_score(low), key_score(high))


def rows_between(
    score_N: np.ndarray, low_S: np.ndarray, high_S: np.ndarray, code_N: np.ndarray | None = None
) -> np.ndarray:
    """Rows with `low <= score <= high`, in one pass: the bounds are those of the row's stratum, `low_S[code_N]`."""
    found = [np.empty(0, np.int64)]
    for block in blocks(len(score_N)):
        score_B, code_B = score_N[block], 0 if code_N is None else code_N[block]
        found.append(np.flatnonzero((score_B >= low_S[code_B]) & (score_B <= high_S[code_B])) + block.start)
    return np.concatenate(found)


def answer(
    query: Query, score_N: np.ndarray, ids_NW: np.ndarray | None = None, row_M: np.ndarray | None = None
) -> Answer:
    """A shard's answer to `query`.

    Args:
        query: what is asked.
        score_N: float64, finite (checked when the shard was committed; a first round checks it again).
        ids_NW: pair_ids as two big-endian words, only read when `query.needs_ids`.
        row_M: the rows within `score_range(query)`, when the caller knows them.
    """
    if query.known == 0 and row_M is None and not query.is_collect:
        found = histogram(score_N)
        return found.flipped() if query.descending else found
    if query.known < WORD_BITS:
        return _answer_by_score(query, score_N if row_M is None else score_N[row_M])
    if ids_NW is None:
        raise ValueError("this query needs the pair_ids")
    row_M = np.flatnonzero(score_N == score_range(query)[0]) if row_M is None else row_M
    word, partial = divmod(query.known, WORD_BITS)
    if word == 2:
        row_M = row_M[ids_NW[row_M, 0] == np.uint64((query.prefix >> partial) & int(ALL_ONES))]
    key_M = ids_NW[row_M, word - 1].astype(np.uint64)
    if partial:
        head = np.uint64(query.prefix & ((1 << partial) - 1))
        key_M = key_M[key_M >> np.uint64(WORD_BITS - partial) == head]
    return key_M if query.is_collect else Histogram.from_dense(_count_digits(key_M, partial))


def _answer_by_score(query: Query, score_N: np.ndarray) -> Answer:
    """`answer` while the score is not yet fully known: block by block, as nearly all rows may have the prefix."""
    low, high = score_range(query)
    dense, collected = np.zeros(NUM_BINS, np.int64), [np.empty(0, np.uint64)]
    for block in blocks(len(score_N)):
        score_B = score_N[block]
        key_M = order_keys(score_B[(score_B >= low) & (score_B <= high)])
        key_M = ~key_M if query.descending else key_M
        if query.is_collect:
            collected.append(key_M)
        else:
            dense += _count_digits(key_M, query.known)
    return np.concatenate(collected) if query.is_collect else Histogram.from_dense(dense)


def _count_digits(key_M: np.ndarray, partial: int) -> np.ndarray:
    """Dense counts of the 16 bits behind the first `partial` bits of each word."""
    digit_M = (key_M >> np.uint64(WORD_BITS - DIGIT_BITS - partial)) & np.uint64(NUM_BINS - 1)
    return np.bincount(digit_M.view(np.int64), minlength=NUM_BINS)
