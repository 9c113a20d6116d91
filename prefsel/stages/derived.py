"""Derived scores of compound rules: the tasks that count, make and commit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.pairs.rows import Rows
from prefsel.pairs.score_shards import ScoreReader, score_table, shard_info
from prefsel.plan.derived import DerivedScore
from prefsel.select.compose import Derived
from prefsel.select.dedupe import KeyedRows, duplicates_to_drop, keyed, scores_left
from prefsel.select.duplicates import Drops
from prefsel.select.fuse import Fitted, Partial, derive, statistics
from prefsel.select.ranks import Parts, PlacedRows, Positions, place_population, positions, positions_of_shard
from prefsel.select.thresholds import Threshold, keep_mask
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact


def count_statistics(shard: ShardRef, shared: tuple[ScoreReader, DerivedScore]) -> Partial:
    """What one shard says about the population."""
    reader, one = shared
    return statistics(one.step, reader.rows(shard, one.columns))


def commit_derived(item: tuple[ShardRef, str], shared: tuple[ScoreReader, DerivedScore, Fitted]) -> None:
    """Score and commit one shard."""
    (shard, made_from), (reader, one, fitted) = item, shared
    attempt = _artifact(reader, one, shard).log_attempt(shard.shard)
    rows = reader.rows(shard, one.columns, ids=True)
    dropped = reader.reasons(shard, one.step.population)
    _commit(reader, one, shard, derive(one.step, fitted, rows), dropped, made_from, attempt)


@dataclass(frozen=True)
class DedupePass:
    """A dedupe over all shards: each sends its rows to partitions, which tell it the ones that lost."""

    reader: ScoreReader
    score: DerivedScore
    inputs: Mapping[str, str]
    """Shard key → hash of what its scores are made from."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[KeyedRows]:
        """The rows of a shard, by partition."""
        return keyed(self.score.step, self._rows(shard), shard.number, num_partitions)

    def merge(self, sent: Iterable[KeyedRows]) -> KeyedRows:
        """Rows of one partition."""
        return KeyedRows.merge(sent)

    def settle(self, rows: KeyedRows) -> Drops:
        """What a partition drops."""
        return duplicates_to_drop(rows)

    def commit(self, shard: ShardRef, drops: Sequence[Drops]) -> dict[str, int]:
        """Commit one shard; nothing more is counted."""
        attempt = _artifact(self.reader, self.score, shard).log_attempt(shard.shard)
        lost = [drop.row_M[drop.shard_M == shard.number] for drop in drops]
        lost_M = np.concatenate([np.empty(0, np.int64), *lost])
        rows = self._rows(shard)
        is_lost_N = np.zeros(rows.num_rows, bool)
        is_lost_N[lost_M] = True
        kept = self.reader.reasons(shard, self.score.step.population)
        dropped = pc.if_else(pa.array(is_lost_N), f"same_{self.score.step.by}", kept)
        score_N = scores_left(self.score.step, rows, lost_M)
        _commit(self.reader, self.score, shard, score_N, dropped, self.inputs[shard.key], attempt)
        return {}

    def _rows(self, shard: ShardRef) -> Rows:
        return self.reader.rows(shard, self.score.columns, ids=True, keys=[self.score.step.by])


@dataclass(frozen=True)
class RankPass:
    """A score by exact ranks: every shard sends its rows to the parts they lie in, which tell where they stand."""

    reader: ScoreReader
    score: DerivedScore
    parts: tuple[Parts, ...]
    """Of every score it is made of, in their order."""
    inputs: Mapping[str, str]
    """Shard key → hash of what its scores are made from."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[PlacedRows]:
        """The rows of a shard, by partition: a part of every score."""
        step, rows = self.score.step, self.reader.rows(shard, self.score.columns, ids=True)
        placed = PlacedRows.merge(
            place_population(step, name, rows, parts, column=number, shard=shard.number)
            for number, (name, parts) in enumerate(zip(step.scores, self.parts))
        )
        return [placed.take(placed.place_M == number) for number in range(num_partitions)]

    def merge(self, sent: Iterable[PlacedRows]) -> PlacedRows:
        """Rows of one partition."""
        return PlacedRows.merge(sent)

    def settle(self, rows: PlacedRows) -> Positions:
        """Where the rows of a partition stand."""
        return positions(rows, self.parts)

    def commit(self, shard: ShardRef, found: Sequence[Positions]) -> dict[str, int]:
        """Commit one shard; nothing more is counted."""
        attempt = _artifact(self.reader, self.score, shard).log_attempt(shard.shard)
        step, everything = self.score.step, Positions.merge(found)
        told = {name: positions_of_shard(everything, n, shard.number) for n, name in enumerate(step.scores)}
        rows = self.reader.rows(shard, self.score.columns, ids=True)
        score_N = derive(step, counts_of(step, self.parts), rows, told)
        dropped = self.reader.reasons(shard, step.population)
        _commit(self.reader, self.score, shard, score_N, dropped, self.inputs[shard.key], attempt)
        return {}


def counts_of(step: Derived, parts: Sequence[Parts]) -> Fitted:
    """What is fitted where ranks decide: the size of the population."""
    return {name: {"count": one.size} for name, one in zip(step.scores, parts)}


def count_upto(
    shard: ShardRef, shared: tuple[ScoreReader, Sequence[str], Sequence[tuple[str, Threshold]]]
) -> list[int]:
    """How many rows of a population stand at or before each of some rows, in the score named beside it."""
    reader, population, asked = shared
    rows = reader.rows(shard, list(dict.fromkeys((*population, *(name for name, _ in asked)))), ids=True)
    assert rows.ids_NW is not None
    row_M = rows.rows_with(population)
    taken = slice(None) if row_M is None else row_M
    ids_MW = rows.ids_NW[taken]
    return [int(keep_mask(rows.scores[name][taken], ids_MW, [one]).sum()) for name, one in asked]


def _artifact(reader: ScoreReader, one: DerivedScore, shard: ShardRef) -> Artifact:
    return Artifact(reader.reader.storage, f"{one.folder}/{shard.source}")


def _commit(
    reader: ScoreReader,
    one: DerivedScore,
    shard: ShardRef,
    score_N: np.ndarray,
    dropped: pa.Array,
    made_from: str,
    attempt: str,
) -> None:
    like = reader.table(shard, one.columns[0], ["pair_id", "source", "aspect"])
    lengths = reader.lengths(shard, one.columns[0])
    table = score_table({name: like[name] for name in like.column_names}, score_N, dropped, lengths)
    info = shard_info(table, lengths)
    _artifact(reader, one, shard).commit(shard.shard, table, made_from=made_from, attempt=attempt, info=info)
