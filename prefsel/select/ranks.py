"""Exact ranks of all rows by (score, pair_id), across shards: a range-partitioned pass.

    split_evenly: rows of evenly spaced ranks, by `numbers.order`  ->  place (each shard): which part a row lies in
    rows of part p of every shard  ->  positions (each p): where each row stands in the total order  ->  its shard

What rank fusion and budgeted intersections decide by. The position 0 is the first row under (score descending, pair_id
ascending), as a selection takes them; `doubled_ranks` and `percentiles` count from the other end.

Shape suffixes: N rows of a shard, M rows of a part, W = 2 words of a pair_id.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np

from prefsel.numbers.histogram import order_keys
from prefsel.numbers.order import locate, target
from prefsel.numbers.ranges import Ask, Summary
from prefsel.pairs.rows import Rows
from prefsel.select.compose import Derived
from prefsel.select.thresholds import Threshold, keep_mask, threshold

EXACT = 1 << 51
"""Whole numbers below it stay different when they are scaled in float64."""


@dataclass(frozen=True)
class Parts:
    """One score, cut into parts of nearly equal size."""

    size: int
    """Rows that have the score."""
    cuts: tuple[Threshold, ...]
    """The last row of every part but the last."""
    starts: tuple[int, ...]
    """Position of the first row of every part."""


def split_evenly(summaries: Sequence[Summary], ask: Ask, num_parts: int) -> Parts:
    """Cut all rows of a score into parts that one machine each can sort, whatever ties.

    Args:
        summaries: of the score, by shard.
        ask: sends queries, about the stratum `()`, to every shard.
        num_parts: at most.
    """
    size = sum(one.count for one in summaries)
    counts = sorted({-(-part * size // num_parts) for part in range(1, num_parts)} - {0, size})
    targets: dict[Any, Any] = {((), count): target(summaries, count, descending=True, by_id=True) for count in counts}
    found = locate(targets, ask)
    return Parts(size, tuple(threshold(targets[key], found[key]) for key in targets), (0, *counts))


@dataclass(frozen=True)
class PlacedRows:
    """Rows of several scores that lie in one part, or in any."""

    column_M: np.ndarray
    """int8: which score."""
    place_M: np.ndarray
    """int16: which part of it."""
    key_M: np.ndarray
    """uint64: the image of the score that sorts the largest one first."""
    id_MW: np.ndarray
    """uint64."""
    shard_M: np.ndarray
    """int32."""
    row_M: np.ndarray
    """int64: row in the shard."""

    @classmethod
    def merge(cls, many: Iterable[PlacedRows]) -> PlacedRows:
        """The rows of several shards."""
        parts = list(many)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, which: np.ndarray) -> PlacedRows:
        """Some of the rows."""
        return PlacedRows(*(getattr(self, field.name)[which] for field in fields(self)))


def place(
    score_M: np.ndarray, ids_MW: np.ndarray, row_M: np.ndarray, parts: Parts, *, column: int, shard: int
) -> PlacedRows:
    """The rows of one shard, each in its part of one score.

    Args:
        score_M: float64, finite.
        ids_MW: their pair_ids.
        row_M: their numbers in the shard.
        parts: of the score.
        column: number of the score.
        shard: number of the shard.
    """
    place_M = np.zeros(len(row_M), np.int16)
    for cut in parts.cuts:
        place_M += ~keep_mask(score_M, ids_MW, [cut])
    return PlacedRows(
        np.full(len(row_M), column, np.int8),
        place_M,
        ~order_keys(np.ascontiguousarray(score_M, np.float64)),
        ids_MW.astype(np.uint64),
        np.full(len(row_M), shard, np.int32),
        row_M.astype(np.int64),
    )


@dataclass(frozen=True)
class Positions:
    """Where rows stand in the total order of a score."""

    column_M: np.ndarray
    shard_M: np.ndarray
    row_M: np.ndarray
    position_M: np.ndarray
    """int64."""

    @classmethod
    def merge(cls, many: Iterable[Positions]) -> Positions:
        """Those of several parts."""
        found = list(many)
        return cls(*(np.concatenate([getattr(one, field.name) for one in found]) for field in fields(cls)))

    def take(self, which: np.ndarray) -> Positions:
        """Some of them."""
        return Positions(*(getattr(self, field.name)[which] for field in fields(self)))


def positions(rows: PlacedRows, parts: Sequence[Parts]) -> Positions:
    """The positions of all rows of some parts; every row of those parts must be there.

    Args:
        rows: of any scores and parts.
        parts: of every score, by number.
    """
    order_M = np.lexsort((rows.id_MW[:, 1], rows.id_MW[:, 0], rows.key_M, rows.place_M, rows.column_M))
    column_M, place_M = rows.column_M[order_M], rows.place_M[order_M]
    is_new_M = np.ones(len(order_M), bool)
    is_new_M[1:] = (column_M[1:] != column_M[:-1]) | (place_M[1:] != place_M[:-1])
    first_M = np.flatnonzero(is_new_M)[np.cumsum(is_new_M) - 1] if len(order_M) else order_M
    start_M = np.array([parts[c].starts[p] for c, p in zip(column_M[is_new_M], place_M[is_new_M])], np.int64)
    start_M = start_M[np.cumsum(is_new_M) - 1] if len(order_M) else order_M
    found_M = start_M + np.arange(len(order_M)) - first_M
    return Positions(column_M, rows.shard_M[order_M], rows.row_M[order_M], found_M)


def place_population(step: Derived, name: str, rows: Rows, parts: Parts, *, column: int, shard: int) -> PlacedRows:
    """`place` for the population of a derived score in one shard."""
    assert rows.ids_NW is not None, "whoever ranks has read the pair_ids"
    row_M = rows.rows_with(step.population)
    row_M = np.arange(rows.num_rows) if row_M is None else row_M
    return place(rows.scores[name][row_M], rows.ids_NW[row_M], row_M, parts, column=column, shard=shard)


def positions_of_shard(found: Positions, column: int, shard: int) -> np.ndarray:
    """The positions of one shard's population in one score, int64, in the order of its rows."""
    mine = found.take((found.column_M == column) & (found.shard_M == shard))
    return mine.position_M[np.argsort(mine.row_M)]


def doubled_ranks(position_M: np.ndarray, size: int) -> np.ndarray:
    """Twice the middle of each row's own share of the ranks, odd numbers from 1 (last) to 2·size − 1 (first), int64.

    A percentile in whole numbers: 50 · doubled rank / size. What is decided by ranks is decided by these.
    """
    return 2 * (size - position_M) - 1


def weighted_ranks(doubled: Sequence[np.ndarray], weights: Sequence[float], size: int) -> np.ndarray:
    """Σ weight · doubled rank / (2 · size), summed in whole numbers and rounded once; float64 [M].

    Equal sums are equal, whatever floats would make of them: 0.1 + 0.2 weighs as much as 0.3. Different sums stay
    different while the whole numbers lie below 2^51, as they do with weights of a few digits (six, for 10⁸ pairs).
    Above, two sums may round to one float64, and then tie.

    Args:
        doubled: by score, the `doubled_ranks` of the same rows.
        weights: one per score, read in the decimal digits that write them.
        size: rows of the population.

    Returns:
        Infinite where a sum overflows.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    unit = Fraction(math.gcd(*whole), denominator)
    whole = [int(weight / unit) for weight in exact]
    if unit * sum(map(abs, whole)) > Fraction(sys.float_info.max):
        return np.full(len(doubled[0]), math.inf)
    scale = unit / (2 * size)
    if 2 * size * sum(map(abs, whole)) < EXACT:
        total_M = sum(weight * rank_M for weight, rank_M in zip(whole, doubled))
        return np.asarray(total_M * float(scale))
    many_M = sum(weight * rank_M.astype(object) for weight, rank_M in zip(whole, doubled))
    return np.asarray(many_M * scale.numerator / scale.denominator, np.float64)


def percentiles(position_M: np.ndarray, size: int) -> np.ndarray:
    """Percentile, 0 to 100, of each position among `size` rows: the middle of the row's own share."""
    return 100.0 * (size - position_M - 0.5) / max(size, 1)
