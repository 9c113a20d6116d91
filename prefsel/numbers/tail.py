"""The upper tail of a column, counted by integers: what the search for an upper bound needs from each shard.

N: rows of a shard; B: integers of the tail that some row falls on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _search_start(high: float, divisor: float) -> float:
    """Where the search begins: the largest value divided and cut towards zero, as Python's `int` does."""
    return float(math.trunc(high / divisor)) if math.isfinite(high) else high


@dataclass(frozen=True)
class UpperTail:
    """Counts of the values above `_search_start`, each in the bin of the integer it is rounded up to.

    For an integer U, `m > U` is `ceil(m) > U`: counts above integers are exact. A shard starts at or before the corpus,
    because its largest value is not above that of the corpus, so nothing the corpus needs is cut off.
    """

    count: int
    """All values, those below the tail too."""
    high: float
    """-inf without values."""
    divisor: float
    bins_B: np.ndarray
    """float64 integers, ascending."""
    counts_B: np.ndarray
    """int64."""

    @classmethod
    def of(cls, value_N: np.ndarray, divisor: float) -> UpperTail:
        """The tail of finite float64 values."""
        high = float(value_N.max()) if len(value_N) else -math.inf
        bin_N = np.ceil(value_N)
        bins_B, counts_B = np.unique(bin_N[bin_N > _search_start(high, divisor)], return_counts=True)
        return cls(len(value_N), high, divisor, bins_B, counts_B.astype(np.int64))

    @classmethod
    def merge(cls, many: Sequence[UpperTail]) -> UpperTail:
        """The tail of all rows of several shards."""
        high, divisor = max(part.high for part in many), many[0].divisor
        bin_P = np.concatenate([part.bins_B for part in many])
        bins_B, place_P = np.unique(bin_P, return_inverse=True)
        counts_B = np.zeros(len(bins_B), np.int64)
        np.add.at(counts_B, place_P, np.concatenate([part.counts_B for part in many]))
        is_tail_B = bins_B > _search_start(high, divisor)
        return cls(sum(part.count for part in many), high, divisor, bins_B[is_tail_B], counts_B[is_tail_B])

    def upper_bound(self, min_above: int) -> tuple[float, int]:
        r"""The smallest integer U from `_search_start` on with fewer than `min_above` values above it, or than max − U.

        The search ends at the integer part of the largest value: margins that are all below one have U = 0. Stepping by
        one is not needed: between two bins the count stays and max − U falls, so only the start and the bins can be the
        first to satisfy either condition.

        Returns:
            U, and how many values lie above it.
        """
        above_B = np.append(np.cumsum(self.counts_B[::-1])[::-1], 0)
        start = _search_start(self.high, self.divisor)
        bounds_B = np.append(start, self.bins_B)
        is_bound_B = (above_B < min_above) | (above_B < self.high - bounds_B)
        first = int(np.argmax(is_bound_B))  # nothing lies above the last bin, so one of them always is
        bound = min(float(bounds_B[first]), max(start, float(math.trunc(self.high))))
        return bound, int(self.counts_B[self.bins_B > bound].sum())
