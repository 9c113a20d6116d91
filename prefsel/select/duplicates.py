"""Duplicates and contradictory labels across shards: an exact, hash-partitioned pass.

    partition (each shard)  ->  rows of partition p of every shard  ->  resolve (each p)  ->  drops by shard and row

A pair and its mirror (the same two completions, opposite label) share the smaller of their two ids, so they meet in one
partition whatever shards they came from.

Shape suffixes: N rows of a shard, M rows of a partition, W = 2 big-endian words of an id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from prefsel.errors import invalid

DUPLICATE, CONTRADICTION = 0, 1
REASONS = ("duplicate", "contradiction")
"""Reason codes are positions in here."""
# How a row's pair_id relates to its mirror_id: bits, so that a group's rows can be combined with `or`.
SMALLER, LARGER = 1, 2


@dataclass(frozen=True)
class PartitionRows:
    """Rows whose smaller id falls into one partition: 29 bytes a row."""

    id_MW: np.ndarray
    """The smaller of pair_id and mirror_id, uint64."""
    side_M: np.ndarray
    """uint8: SMALLER or LARGER pair_id; both bits when a pair is its own mirror."""
    shard_M: np.ndarray
    """int32: position of the shard in corpus order."""
    row_M: np.ndarray
    """int64: row in the shard."""

    @classmethod
    def merge(cls, many: Iterable[PartitionRows]) -> PartitionRows:
        """The rows of one partition from several shards."""
        parts = list(many)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Drops:
    """Rows that cannot be selected, in corpus order."""

    shard_M: np.ndarray
    row_M: np.ndarray
    reason_M: np.ndarray
    """uint8 position in `REASONS`; each row is named once."""

    def take(self, which: np.ndarray) -> Drops:
        """Some of them."""
        return Drops(self.shard_M[which], self.row_M[which], self.reason_M[which])


def partition(
    pair_NW: np.ndarray, mirror_NW: np.ndarray, shard_no: int, num_partitions: int, row_N: np.ndarray | None = None
) -> list[PartitionRows]:
    """The rows of one shard, by partition.

    Args:
        pair_NW: pair_ids as two big-endian words (`numbers.columns.id_words`).
        mirror_NW: mirror_ids.
        shard_no: position of the shard in corpus order: the first wins.
        num_partitions: how many `resolve` calls share the work.
        row_N: row numbers in the shard; default 0 to N-1.
    """
    pair_NW, mirror_NW = pair_NW.astype(np.uint64), mirror_NW.astype(np.uint64)
    is_first_equal_N = pair_NW[:, 0] == mirror_NW[:, 0]
    is_larger_N = (pair_NW[:, 0] > mirror_NW[:, 0]) | (is_first_equal_N & (pair_NW[:, 1] > mirror_NW[:, 1]))
    is_self_N = is_first_equal_N & (pair_NW[:, 1] == mirror_NW[:, 1])
    id_NW = np.where(is_larger_N[:, None], mirror_NW, pair_NW)
    side_N = np.where(is_self_N, SMALLER | LARGER, np.where(is_larger_N, LARGER, SMALLER)).astype(np.uint8)
    row_N = np.arange(len(pair_NW)) if row_N is None else row_N
    # Low bits: the smaller of two hashes leans to small numbers, its low bits do not.
    place_N = (id_NW[:, 1] % np.uint64(num_partitions)).astype(np.int64)
    order_N = np.argsort(place_N, kind="stable")
    ends = np.cumsum(np.bincount(place_N, minlength=num_partitions))[:-1]
    return [
        PartitionRows(id_NW[rows], side_N[rows], np.full(len(rows), shard_no, np.int32), row_N[rows].astype(np.int64))
        for rows in np.split(order_N, ends)
    ]


def resolve(rows: PartitionRows, *, contradictions: Literal["drop", "keep"] = "drop") -> Drops:
    """Which rows of a partition cannot be selected.

    `duplicate`: a pair_id that stands earlier in corpus order (shard, row). `contradiction`: a pair_id whose mirror_id
    is a pair_id too; all rows of both are dropped, their duplicates included, unless `contradictions="keep"`.

    Raises:
        UserError: `contradictions` is neither "drop" nor "keep".
    """
    if contradictions not in ("drop", "keep"):
        raise invalid("contradictions", contradictions, ("drop", "keep"))
    order_M = np.lexsort((rows.row_M, rows.shard_M, rows.side_M, rows.id_MW[:, 1], rows.id_MW[:, 0]))
    id_MW, side_M = rows.id_MW[order_M], rows.side_M[order_M]
    is_new_id_M, is_new_side_M = np.ones(len(order_M), bool), np.ones(len(order_M), bool)
    is_new_id_M[1:] = (id_MW[1:] != id_MW[:-1]).any(axis=1)
    is_new_side_M[1:] = is_new_id_M[1:] | (side_M[1:] != side_M[:-1])
    reason_M = np.where(is_new_side_M, 255, DUPLICATE).astype(np.uint8)
    if contradictions == "drop" and len(order_M):
        group_M = np.cumsum(is_new_id_M) - 1
        sides_G = np.bitwise_or.reduceat(side_M, np.flatnonzero(is_new_id_M))
        reason_M[sides_G[group_M] == SMALLER | LARGER] = CONTRADICTION
    dropped_M = order_M[reason_M != 255]
    reason_M = reason_M[reason_M != 255]
    corpus_M = np.lexsort((rows.row_M[dropped_M], rows.shard_M[dropped_M]))
    dropped_M = dropped_M[corpus_M]
    return Drops(rows.shard_M[dropped_M], rows.row_M[dropped_M], reason_M[corpus_M])
