"""What is asked about a range of values, and what a shard says: counts, and a Summary of the values inside.

Shape suffixes: M rows of a shard or stratum, B of a block, I those inside a range.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.errors import NonFiniteError

FEW = 2048
"""So many values of a range are sent as they are; a shard of 100 000 rows has about 800 between two of its own."""
MAX_VALUES, ROWS_PER_VALUE = 256, 256
"""More are summarised by 256 of them; in a ledger, 2.7 KB of a shard, by one every 256 rows and at most as many."""
BLOCK = 1 << 16
"""Rows compared at once, so that temporaries stay in the cache."""
WORD_BITS = 64

Number = float | int


@dataclass(frozen=True)
class Range:
    """Two values, floats for scores and unsigned integers for words of an id; `low <= high`."""

    low: Number
    high: Number

    @property
    def widest(self) -> Range:
        """What every value lies in."""
        return EVERYTHING if isinstance(self.low, float) else ALL_WORDS


EVERYTHING = Range(-math.inf, math.inf)
ALL_WORDS = Range(0, (1 << WORD_BITS) - 1)


@dataclass(frozen=True)
class Summary:
    """Some values of a shard: all of them, or exact order statistics that include the smallest and the largest."""

    count: int
    """How many values are summarised."""
    values: np.ndarray
    """Ascending: those at `positions(count, len(values))`."""
    next_words: np.ndarray | None = None
    """The following word of each, where all values are there and have one."""

    @property
    def is_complete(self) -> bool:
        """Whether every value is there."""
        return len(self.values) == self.count

    def next_words_between(self, first: int, last: int) -> np.ndarray | None:
        """Those of the values at some places; None where they were not told."""
        if self.next_words is None:
            return None if last > first else np.empty(0, np.uint64)
        return self.next_words[first:last]

    def to_text(self) -> str:
        """The values of scores as text for a ledger."""
        return base64.b64encode((self.values + 0.0).astype("<f8").tobytes()).decode()

    @classmethod
    def from_text(cls, count: int, text: str) -> Summary:
        """The inverse of `to_text` for the Summary of `count` scores."""
        return cls(count, np.frombuffer(base64.b64decode(text), "<f8"))


def positions(count: int, num_values: int) -> np.ndarray:
    """Places of some order statistics among `count` values: int64, ascending and even, the first and last included."""
    return np.arange(num_values) * (count - 1) // max(1, num_values - 1)


def summarise(value_M: np.ndarray, next_M: np.ndarray | None = None) -> Summary:
    """What a shard says about some values, which come in any order.

    Args:
        value_M: float64 or uint64.
        next_M: the following word of each.
    """
    if len(value_M) > max(FEW, MAX_VALUES):
        return Summary(len(value_M), np.sort(value_M)[positions(len(value_M), MAX_VALUES)])
    if next_M is None:
        return Summary(len(value_M), np.sort(value_M))
    order_M = np.argsort(value_M, kind="stable")
    return Summary(len(value_M), value_M[order_M], next_M[order_M])


def summarise_for_ledger(score_M: np.ndarray) -> Summary:
    """The Summary that a shard of scores is committed with: a value every 256 rows or more, 2 to 256 of them."""
    num_values = min(MAX_VALUES, 2 + len(score_M) // ROWS_PER_VALUE, len(score_M))
    return Summary(len(score_M), np.sort(score_M)[positions(len(score_M), num_values)])


@dataclass(frozen=True)
class RangeQuery:
    """What a shard is asked: how its rows lie around two values of one word of their key."""

    range: Range
    prefix: tuple[Number, ...] = ()
    """The words before it, which the rows must have: nothing, a score, or a score and the first word of an id."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to answer."""
        return bool(self.prefix)


@dataclass(frozen=True)
class RangeCounts:
    """Its answer."""

    below: int
    at_low: int
    inside: Summary
    """Of the values strictly between the two."""
    at_high: int
    """0 where the two values are one."""
    above: int

    @property
    def total(self) -> int:
        """All rows that were looked at."""
        return self.below + self.at_low + self.inside.count + self.at_high + self.above

    @classmethod
    def all_of(cls, summary: Summary) -> RangeCounts:
        """What a Summary of all rows says about `EVERYTHING`."""
        return cls(0, 0, summary, 0, 0)


NO_ROWS = RangeCounts.all_of(Summary(0, np.empty(0)))
"""Of a shard without the stratum that is asked about."""

Queries = Mapping[Any, Sequence[RangeQuery]]
"""By (stratum, number): a band asks about four ranks of one stratum."""
Replies = Mapping[Any, Sequence[RangeCounts]]
"""By the same keys, one answer per query."""
Ask = Callable[[Queries], Sequence[Replies]]
"""Sends the queries to every shard; one mapping of answers per shard, always in the same order of shards."""


def count_range(
    value_N: np.ndarray,
    asked: Range,
    *,
    among_N: np.ndarray | None = None,
    next_words: Callable[[np.ndarray], np.ndarray] | None = None,
) -> RangeCounts:
    """How values lie around two of them.

    Args:
        value_N: float64, or uint64.
        asked: the two.
        among_N: which rows are counted; None: all.
        next_words: gives the following word of some of the rows, by their places in `value_N`.

    Raises:
        NonFiniteError: `EVERYTHING` is asked for, and a score is NaN or infinite.
    """
    if asked == EVERYTHING and among_N is None:
        return RangeCounts.all_of(summarise(finite(value_N)))
    low, high = value_N.dtype.type(asked.low), value_N.dtype.type(asked.high)
    total = len(value_N) if among_N is None else int(np.count_nonzero(among_N))
    below = above = at_low = at_high = 0
    inside = [np.empty(0, np.int64)]
    for start in range(0, len(value_N), BLOCK):
        value_B = value_N[start : start + BLOCK]
        among_B = None if among_N is None else among_N[start : start + BLOCK]
        is_below_B, is_above_B = _among(value_B < low, among_B), _among(value_B > high, among_B)
        below += int(np.count_nonzero(is_below_B))
        above += int(np.count_nonzero(is_above_B))
        if low < high:
            is_below_B |= is_above_B
            row_M = np.flatnonzero(_among(~is_below_B, among_B))
            is_low_M, is_high_M = value_B[row_M] == low, value_B[row_M] == high
            at_low += int(np.count_nonzero(is_low_M))
            at_high += int(np.count_nonzero(is_high_M))
            inside.append(row_M[~(is_low_M | is_high_M)] + start)
    row_I = np.concatenate(inside)
    if low == high:
        at_low = total - below - above
    following_I = next_words(row_I) if next_words is not None and len(row_I) <= FEW else None
    return RangeCounts(below, at_low, summarise(value_N[row_I], following_I), at_high, above)


def _among(is_in_B: np.ndarray, among_B: np.ndarray | None) -> np.ndarray:
    if among_B is not None:
        is_in_B &= among_B
    return is_in_B


def finite(value_N: np.ndarray) -> np.ndarray:
    """The values themselves.

    Raises:
        NonFiniteError: some are NaN or infinite; says how many and where.
    """
    is_finite_N = np.isfinite(value_N)
    if not is_finite_N.all():
        raise _non_finite(np.flatnonzero(~is_finite_N))
    return value_N


def _non_finite(rows: np.ndarray) -> NonFiniteError:
    """The error for scores at `rows` that are NaN or infinite."""
    return NonFiniteError(f"score: {len(rows)} values are NaN or infinite, first at rows {rows[:5].tolist()}")
