"""The shard's side of `numbers.order`: its rows, by stratum, against the queries of one round.

Shape suffixes: N rows of the shard, M rows of a range, I those inside it, T those that tie, C strata, W = 2 words of a
pair_id (`>u8`: big-endian, so Arrow's bytes as they lie).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prefsel.numbers.ranges import (
    BLOCK,
    NO_ROWS,
    Queries,
    RangeCounts,
    RangeQuery,
    Summary,
    count_range,
    finite,
    summarise,
)


@dataclass(frozen=True)
class ShardValues:
    """Values of the rows of one shard, with what breaks their ties and what tells their strata apart."""

    value_N: np.ndarray
    """float64, finite."""
    ids_NW: np.ndarray | None = None
    """pair_ids as two big-endian words; may be None while no query `needs_ids`."""
    code_N: np.ndarray | None = None
    """Stratum of each row as a position in `labels`, −1 for rows of none; None: all rows are in the first."""
    labels: Sequence[Any] = ((),)
    """Names of the strata."""

    def summaries(self) -> dict[Any, Summary]:
        """The Summary of every stratum: the first answer, where none was committed.

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        finite(self.value_N)
        if self.code_N is None:
            return {self.labels[0]: summarise(self.value_N)}
        rows_C = _split(np.arange(len(self.value_N)), self.code_N, len(self.labels))
        return {label: summarise(self.value_N[row_M]) for label, row_M in zip(self.labels, rows_C)}

    def answer(self, queries: Queries) -> dict[Any, list[RangeCounts]]:
        """What this shard says; all strata that are asked about the same word are counted in one pass."""
        found: dict[Any, list[RangeCounts]] = {key: [NO_ROWS] * len(asked) for key, asked in queries.items()}
        place = {label: code for code, label in enumerate(self.labels)}
        passes: dict[tuple[int, int], dict[int, RangeQuery]] = {}
        for (label, number), asked in queries.items():
            if label in place:
                for turn, query in enumerate(asked):
                    passes.setdefault((number, turn), {})[place[label]] = query
        for (number, turn), by_code in passes.items():
            for code, counts in self._count(by_code).items():
                found[self.labels[code], number][turn] = counts
        return found

    def _count(self, by_code: Mapping[int, RangeQuery]) -> dict[int, RangeCounts]:
        if any(query.prefix for query in by_code.values()):
            # A stratum may be further on than another: those that ask about scores are counted by themselves.
            tied = {code: query for code, query in by_code.items() if query.prefix}
            scores = {code: query for code, query in by_code.items() if not query.prefix}
            return self._count_ties(tied) | (self._count(scores) if scores else {})
        if self.code_N is None:
            return {code: count_range(self.value_N, query.range) for code, query in by_code.items()}
        return self._count_strata(by_code, self.code_N)

    def _count_strata(self, by_code: Mapping[int, RangeQuery], code_N: np.ndarray) -> dict[int, RangeCounts]:
        """One pass over the scores: every row is held against the range of its own stratum."""
        num_strata = len(self.labels)
        # Strata that are not asked about, and code −1, lie below their range: (inf, inf).
        low_C, high_C = np.full(num_strata + 1, np.inf), np.full(num_strata + 1, np.inf)
        for code, query in by_code.items():
            low_C[code], high_C[code] = query.range.low, query.range.high
        is_above_N, is_open_N = np.empty(len(code_N), bool), np.empty(len(code_N), bool)
        for start in range(0, len(code_N), BLOCK):
            block = slice(start, start + BLOCK)
            np.greater(self.value_N[block], high_C[code_N[block]], out=is_above_N[block])
            np.greater_equal(self.value_N[block], low_C[code_N[block]], out=is_open_N[block])
        is_open_N ^= is_above_N
        row_M = np.flatnonzero(is_open_N)
        value_M, code_M = self.value_N[row_M], code_N[row_M]
        is_low_M = value_M == low_C[code_M]
        is_high_M = (value_M == high_C[code_M]) & ~is_low_M
        row_I = np.flatnonzero(~(is_low_M | is_high_M))
        size_C, above_C, low_count_C, high_count_C = (
            np.bincount(code_K + 1, minlength=num_strata + 1)[1:]
            for code_K in (code_N, code_N[is_above_N], code_M[is_low_M], code_M[is_high_M])
        )
        inside_C = _split(value_M[row_I], code_M[row_I], num_strata)
        found = {}
        for code in by_code:
            at_low, at_high, above = int(low_count_C[code]), int(high_count_C[code]), int(above_C[code])
            below = int(size_C[code]) - above - at_low - at_high - len(inside_C[code])
            found[code] = RangeCounts(below, at_low, summarise(inside_C[code]), at_high, above)
        return found

    def _count_ties(self, by_code: Mapping[int, RangeQuery]) -> dict[int, RangeCounts]:
        """Counts of words of the pair_ids, among the rows that have the score they are asked for."""
        if self.ids_NW is None:
            raise ValueError("these queries need the pair_ids")
        score_C = np.full(len(self.labels) + 1, np.nan)  # nothing equals the NaN of strata that are not asked about
        for code, query in by_code.items():
            score_C[code] = query.prefix[0]
        tied_T = np.flatnonzero(self.value_N == score_C[0 if self.code_N is None else self.code_N])
        code_T = np.zeros(len(tied_T), np.int8) if self.code_N is None else self.code_N[tied_T]
        rows_C = [tied_T] if self.code_N is None else _split(tied_T, code_T, len(self.labels))
        return {code: self._count_words(rows_C[code], query, self.ids_NW) for code, query in by_code.items()}

    def _count_words(self, row_T: np.ndarray, query: RangeQuery, ids_NW: np.ndarray) -> RangeCounts:
        first_T = ids_NW[:, 0][row_T].astype(np.uint64)
        if len(query.prefix) == 1:
            return count_range(first_T, query.range, lambda row_I: ids_NW[row_T[row_I], 1].astype(np.uint64))
        row_T = row_T[first_T == np.uint64(query.prefix[1])]
        return count_range(ids_NW[row_T, 1].astype(np.uint64), query.range)


def _split(value_M: np.ndarray, code_M: np.ndarray, num_strata: int) -> list[np.ndarray]:
    """The values of every stratum, in their order; those with code −1 are in none."""
    order_M = np.argsort(code_M, kind="stable")
    edges = np.searchsorted(code_M[order_M], np.arange(num_strata + 1))
    return [value_M[order_M[start:stop]] for start, stop in pairwise(edges.tolist())]
