"""Histograms of the 16 leading bits of a score: what the percentiles shown to people are read from.

They are binned, and say so: a bin is a sixteenth of a power of two wide. What decides about a row uses exact ranks
(`numbers.order`).

N: rows of a shard, B of a block.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefsel.numbers.ranges import BLOCK, WORD_BITS, finite

DIGIT_BITS = 16
NUM_BINS = 1 << DIGIT_BITS
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
SIGN = np.uint64(1 << 63)
# Bins of one non-finite sign: exponents of all ones are the first and the last 16 of the 65 536.
NON_FINITE_BINS = 16


def blocks(num_rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def order_keys(score_N: np.ndarray) -> np.ndarray:
    """The order-preserving uint64 image of float64 scores: `a < b` iff `key(a) < key(b)`, and -0.0 equals 0.0.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    bits_N = (finite(score_N) + 0.0).view(np.uint64)
    # Negative numbers: all bits flipped. Others: the sign bit set. (The signed shift copies the sign; 5 x `np.where`.)
    return bits_N ^ ((bits_N.view(np.int64) >> 63).view(np.uint64) | SIGN)


def key_score(key: int) -> float:
    """The score whose order key is `key`, the inverse of `order_keys`."""
    bits = key ^ int(SIGN) if key >> 63 else key ^ int(ALL_ONES)
    return float(np.uint64(bits).view(np.float64))


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

    @cached_property
    def _middles(self) -> np.ndarray:
        """Percentile of every bin, float64 [65 536]."""
        dense = np.zeros(NUM_BINS, np.int64)
        dense[self.bins] = self.counts
        return 100.0 * (np.cumsum(dense) - dense / 2) / max(self.total, 1)

    def percentile(self, score_N: np.ndarray) -> np.ndarray:
        """Percentile (0-100) of each score under this histogram of the top 16 bits.

        Binned: `100 · (count below the bin + half the bin) / N`. All scores of one bin share a percentile; a bin is a
        sixteenth of a power of two wide.
        """
        return self._middles[(order_keys(score_N) >> np.uint64(WORD_BITS - DIGIT_BITS)).astype(np.intp)]


def _raw_digits(score_B: np.ndarray) -> np.ndarray:
    """Top 16 bits of the floats themselves (-0.0 made 0.0); `_ordered` sorts the counts, far cheaper than the rows."""
    return (score_B + 0.0).view("<u2")[3::4]


def _ordered(raw: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Counts over raw top bits, put into the order of the keys: negative numbers reversed, then the others.

    NaN and infinities land in the outermost bins of each side, so they are found here without a pass over the rows.
    """
    dense = np.concatenate([raw[NUM_BINS // 2 :][::-1], raw[: NUM_BINS // 2]])
    if dense[:NON_FINITE_BINS].any() or dense[-NON_FINITE_BINS:].any():
        finite(score_N)
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
