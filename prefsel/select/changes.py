"""What a selection of today has that the one before it had not, and the other way round, and why.

A pair entered or left *because of the corpus* when it could not be selected at the other time: it was not there, or was
dropped. Otherwise it did so *because of itself*: it was there both times, and its score or the threshold has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.numbers.columns import id_words
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

KEPT_BEFORE, KEPT_NOW, THERE_BEFORE, THERE_NOW = 1, 2, 4, 8
CHANGES = ("entered_by_corpus", "entered_by_itself", "left_by_corpus", "left_by_itself")


@dataclass(frozen=True)
class FlaggedRows:
    """Pairs of one partition, each with what one shard says of it."""

    id_MW: np.ndarray
    """pair_ids as two words, uint64."""
    flags_M: np.ndarray
    """uint8: `KEPT_BEFORE` and its kin, added up."""
    shard_M: np.ndarray
    """int32: number of the shard."""

    @classmethod
    def merge(cls, many: Iterable[FlaggedRows]) -> FlaggedRows:
        """Those of several shards."""
        parts = list(many)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, which: np.ndarray) -> FlaggedRows:
        """Some of them."""
        return FlaggedRows(self.id_MW[which], self.flags_M[which], self.shard_M[which])


@dataclass(frozen=True)
class Side:
    """A selection at one time: folders without the source, and the shards it is of."""

    selection: str
    scores: str
    shards: frozenset[str]
    """Their keys."""


@dataclass(frozen=True)
class ChangesPass:
    """Compares two selections over all shards of both: each sends its pairs to partitions, which tell what changed."""

    storage: Storage
    before: Side
    now: Side
    folder: str
    """Where the changed pairs are written, without the source."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[FlaggedRows]:
        """The pairs of a shard that either selection keeps or could keep, by partition."""
        both = ((self.before, KEPT_BEFORE, THERE_BEFORE), (self.now, KEPT_NOW, THERE_NOW))
        rows = FlaggedRows.merge(part for side, kept, there in both for part in self._rows(shard, side, kept, there))
        part_M = rows.id_MW[:, 1] % np.uint64(num_partitions)
        return [rows.take(part_M == number) for number in range(num_partitions)]

    def merge(self, sent: Iterable[FlaggedRows]) -> FlaggedRows:
        """Rows of one partition."""
        return FlaggedRows.merge(sent)

    def settle(self, rows: FlaggedRows) -> FlaggedRows:
        """Every pair that was kept at one time at least, once, with all that is known of it."""
        order_M = np.lexsort((rows.shard_M, rows.id_MW[:, 1], rows.id_MW[:, 0]))
        rows = rows.take(order_M)
        is_first_M = np.ones(len(order_M), bool)
        is_first_M[1:] = (rows.id_MW[1:] != rows.id_MW[:-1]).any(axis=1)
        first_P = np.flatnonzero(is_first_M)
        flags_P = np.bitwise_or.reduceat(rows.flags_M, first_P) if len(first_P) else np.empty(0, np.uint8)
        is_kept_P = (flags_P & (KEPT_BEFORE | KEPT_NOW)) > 0
        pairs = FlaggedRows(rows.id_MW[first_P], flags_P, rows.shard_M[first_P])
        return pairs.take(is_kept_P)

    def commit(self, shard: ShardRef, found: Sequence[FlaggedRows]) -> dict[str, int]:
        """Write the changed pairs that a shard speaks of first; returns counts by change, `stayed` among them."""
        pairs = FlaggedRows.merge(found)
        pairs = pairs.take(pairs.shard_M == shard.number)
        change_P = changes_of(pairs.flags_M)
        counts = {name: int((change_P == number).sum()) for number, name in enumerate(CHANGES)}
        counts["stayed"] = int((change_P < 0).sum())
        if (rows := np.flatnonzero(change_P >= 0)).size:
            artifact = Artifact(self.storage, f"{self.folder}/{shard.source}")
            data = pa.py_buffer(pairs.id_MW[rows].astype(">u8").tobytes())
            ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(rows), [None, data])
            names = pa.array([CHANGES[number] for number in change_P[rows]]).dictionary_encode()
            attempt, table = artifact.log_attempt(shard.shard), pa.table({"pair_id": ids, "change": names})
            counts["shards"] = 1
            artifact.commit(shard.shard, table, made_from=self.folder, attempt=attempt, info=counts)
        return counts

    def _rows(self, shard: ShardRef, side: Side, kept: int, there: int) -> Iterable[FlaggedRows]:
        if shard.key not in side.shards:
            empty = FlaggedRows(np.empty((0, 2), np.uint64), np.empty(0, np.uint8), np.empty(0, np.int32))
            return [empty]
        selected = Artifact(self.storage, f"{side.selection}/{shard.source}").read(shard.shard, ["pair_id"])
        scores = Artifact(self.storage, f"{side.scores}/{shard.source}").read(shard.shard, ["pair_id", "dropped"])
        eligible = scores.filter(pc.is_null(scores["dropped"]))
        return [_flagged(selected, kept, shard.number), _flagged(eligible, there, shard.number)]


def changes_of(flags_P: np.ndarray) -> np.ndarray:
    """The position in `CHANGES` of what became of each pair; -1 where it stayed."""
    before_P, now_P = (flags_P & KEPT_BEFORE) > 0, (flags_P & KEPT_NOW) > 0
    entered_P = np.where((flags_P & THERE_BEFORE) > 0, 1, 0)
    left_P = np.where((flags_P & THERE_NOW) > 0, 3, 2)
    return np.where(before_P & now_P, -1, np.where(now_P, entered_P, left_P))


def _flagged(table: pa.Table, flag: int, number: int) -> FlaggedRows:
    ids_MW = id_words(table["pair_id"]).astype(np.uint64)
    return FlaggedRows(ids_MW, np.full(len(ids_MW), flag, np.uint8), np.full(len(ids_MW), number, np.int32))
