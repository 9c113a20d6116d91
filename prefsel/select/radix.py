"""Exact order statistics and exact k-best over shards, by radix: counts travel, rows stay.

A row's place in the total order (score, then pair_id ascending) is a number of 192 bits: the order-preserving image of
the score (64), then the pair_id (128, big-endian). The row of a given rank is found from the leading bits down:

    driver                                shards
    next_query  -> prefix, known bits ->  answer: histogram of the next 16 bits of the rows with that prefix
    advance     <- merged histogram   <-    ... or, once few rows are left, the remaining words of those rows
    threshold                         ->  keep_mask

`next_query`, `advance` and `answer` are pure, so the same code serves one process and a cluster. Memory is
O(bins + candidates). The pair_id is only looked at among rows that tie with the threshold score.

Shape suffixes: N rows of a shard, M candidates, W = 2 words of a pair_id (`>u8`: big-endian, so Arrow's bytes as
they lie).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from prefsel.errors import IntegrityError, NonFiniteError, UserError

MAX_CANDIDATES = 1_000_000
WORD_BITS, DIGIT_BITS = 64, 16
NUM_BINS = 1 << DIGIT_BITS
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
SIGN = np.uint64(1 << 63)
# Rows handled at once, so that temporaries stay in the cache: 1e7 rows took 2-3 times as long in one piece.
BLOCK = 1 << 17
# Bins of one non-finite sign: exponents of all ones are the first and the last 16 of the 65 536.
NON_FINITE_BINS = 16

Key = TypeVar("Key", bound=Hashable)


# --- keys and histograms ---------------------------------------------------------------------------------------------


def blocks(num_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `BLOCK` rows."""
    for start in range(0, num_rows, BLOCK):
        yield slice(start, min(start + BLOCK, num_rows))


def order_keys(score_N: np.ndarray) -> np.ndarray:
    """The order-preserving uint64 image of float64 scores: `a < b` iff `key(a) < key(b)`, and -0.0 equals 0.0.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    finite_N = np.isfinite(score_N)
    if not finite_N.all():
        raise non_finite(np.flatnonzero(~finite_N))
    bits_N = (score_N + 0.0).view(np.uint64)
    # Negative numbers: all bits flipped. Others: the sign bit set.
    return bits_N ^ np.where(bits_N >> np.uint64(63), ALL_ONES, SIGN)


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

    def percentile(self, score_N: np.ndarray) -> np.ndarray:
        """Percentile (0-100) of each score under this histogram of the top 16 bits.

        Binned: `100 · (count below the bin + half the bin) / N`. All scores of one bin share a percentile; a bin is a
        sixteenth of a power of two wide.
        """
        dense = np.zeros(NUM_BINS, np.int64)
        dense[self.bins] = self.counts
        middle = 100.0 * (np.cumsum(dense) - dense / 2) / max(self.total, 1)
        return middle[(order_keys(score_N) >> np.uint64(WORD_BITS - DIGIT_BITS)).astype(np.intp)]


def _top_digits(score_B: np.ndarray) -> np.ndarray:
    """Top 16 bits of the order keys, without checking for NaN: those land in the outermost 16 bins of each side."""
    top_B = (score_B + 0.0).view("<u2")[3::4]
    return top_B ^ np.where(top_B >> 15, np.uint16(0xFFFF), np.uint16(0x8000))


def _require_finite_bins(dense: np.ndarray, score_N: np.ndarray) -> None:
    if dense[:NON_FINITE_BINS].any() or dense[-NON_FINITE_BINS:].any():
        raise non_finite(np.flatnonzero(~np.isfinite(score_N)))


def histogram(score_N: np.ndarray) -> Histogram:
    """Histogram of the top 16 bits of the order keys of `score_N`; what a score shard is committed with.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    score_N = np.ascontiguousarray(score_N, np.float64)
    dense = np.zeros(NUM_BINS, np.int64)
    for block in blocks(len(score_N)):
        dense += np.bincount(_top_digits(score_N[block]), minlength=NUM_BINS)
    _require_finite_bins(dense, score_N)
    return Histogram.from_dense(dense)


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
        dense = np.zeros((width + 2, NUM_BINS), np.int64)
        step = 1 if width <= 2 else 8  # dense counts are added once per step blocks
        for start in range(0, len(score_N), step * BLOCK):
            block = slice(start, start + step * BLOCK)
            # Slot 0 takes the rows before this group of strata, the last slot those behind it.
            slot_B = np.clip(code_N[block].astype(np.int64) - (first - 1), 0, width + 1)
            digit_B = (slot_B << DIGIT_BITS) | _top_digits(score_N[block])
            dense += np.bincount(digit_B, minlength=dense.size).reshape(dense.shape)
        for slot in range(1, width + 1):
            _require_finite_bins(dense[slot], score_N)
            found.append(Histogram.from_dense(dense[slot]))
    return found
