"""Where the pairs of a training come from: a selection's dataset, the corpus read through a selection, or a part of it;
file by file or shard by shard.

The result is one table in this process: prompt_id and pair_id as hex, messages, aspect, and where asked for the
reference's log-probs under the names the loop reads, a metric's score, and the selection's own score.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config import CrossFit
from prefsel.errors import IntegrityError
from prefsel.ingest.identity import fold_of
from prefsel.pairs.export import export_rows
from prefsel.pairs.reader import PairReader
from prefsel.schema import FLIPPED
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import SEAL, read_seal
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

REFERENCE_COLUMNS = ("reference_logps_chosen", "reference_logps_rejected")
TEXT = ("pair_id", "prompt_id", "prompt", "chosen", "rejected", "source", "aspect")


@dataclass(frozen=True)
class Dataset:
    """The rows of a committed dataset."""

    storage: Storage
    path: str

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Its files in order, projected to the columns they have of these."""
        seal = read_seal(self.storage, self.path)
        if seal is None:
            raise self.storage.damaged(f"{self.path}/{SEAL}", "missing", "the dataset is not finished")
        data = Artifact(self.storage, f"{self.path}/data")
        for name in sorted(name for name in seal["files"] if name.endswith(".parquet")):
            table = data.read(name.removeprefix("data/").removesuffix(".parquet"), list(columns))
            yield table.select([column for column in columns if column in table.column_names])


@dataclass(frozen=True)
class SelectionPairs:
    """The kept rows of a selection, read from the corpus: the rows its dataset would have, in the same order."""

    reader: PairReader
    shards: tuple[ShardRef, ...]
    folder: str
    """Of the selection, without the source."""

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Its pairs, one table per shard that has any.

        Raises:
            IntegrityError: a selection shard is damaged, or speaks of other pairs than the corpus has.
        """
        for shard in self.shards:
            kept = Artifact(self.reader.storage, f"{self.folder}/{shard.source}").read(shard.shard)
            if not kept.num_rows:
                continue
            pairs, row_K = self.reader.pairs(shard), kept["row"].to_numpy()
            ids = pairs["pair_id"].combine_chunks().take(pa.array(row_K[row_K < pairs.num_rows]))
            if not ids.equals(kept["pair_id"].combine_chunks()):
                raise IntegrityError(f"{self.folder}/{shard.key}: its pair_ids are not those of pairs/{shard.key}")
            attached = {name: kept[name].combine_chunks() for name in ("score", FLIPPED) if name in kept.column_names}
            table = export_rows(row_K, pairs, self.reader.groups(shard), self.reader.flat(shard), attached)
            yield table.select([name for name in columns if name in table.column_names])


@dataclass(frozen=True)
class SplitPairs:
    """The pairs of the corpus that eligibility gave one code: eligible ones, or those dropped for one reason."""

    reader: PairReader
    shards: tuple[ShardRef, ...]
    reason: str | None
    """None: the eligible pairs; `validation`, `holdout`: those set aside."""
    only: frozenset[bytes] | None = None
    """Of these only the pairs with such ids."""

    def rows(self, shard: ShardRef, pairs: pa.Table) -> np.ndarray:
        """Positions of the part's pairs in a shard."""
        dropped = self.reader.dropped(shard, pairs)
        is_mine = pc.is_null(dropped) if self.reason is None else pc.equal(dropped, self.reason).fill_null(False)
        row_M = np.flatnonzero(is_mine.to_numpy(zero_copy_only=False))
        if self.only is None:
            return row_M
        ids = pairs["pair_id"].take(pa.array(row_M)).to_pylist()
        return row_M[np.array([one in self.only for one in ids], bool)]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Its pairs, one table per shard that has any."""
        for shard in self.shards:
            pairs = self.reader.pairs(shard)
            row_M = self.rows(shard, pairs)
            if len(row_M):
                table = export_rows(row_M, pairs, self.reader.groups(shard), self.reader.flat(shard), {})
                yield table.select([name for name in columns if name in table.column_names])


def smallest_ids(part: SplitPairs, shard: ShardRef, limit: int) -> list[bytes]:
    """The first `limit` pair_ids of a shard's part, ascending: pieces of a sample that no file order changes."""
    pairs = part.reader.pairs(shard)
    return heapq.nsmallest(limit, pairs["pair_id"].take(pa.array(part.rows(shard, pairs))).to_pylist())


@dataclass(frozen=True)
class Mixed:
    """The rows of several sources, one after the other; a pair that stands in two counts once."""

    parts: tuple[Dataset | SelectionPairs | SplitPairs, ...]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Their tables, without pairs that came before."""
        seen = pa.array([], pa.string())
        for part in self.parts:
            mine = [seen]
            for table in part.tables(columns):
                ids = table["pair_id"].combine_chunks()
                yield table.filter(pc.invert(pc.is_in(ids, value_set=seen)))
                mine.append(ids)
            seen = pa.concat_arrays(mine)


@dataclass(frozen=True)
class PairSource:
    """Everything that decides which rows a training reads."""

    rows: Dataset | SelectionPairs | SplitPairs | Mixed
    reference: str | None = None
    """Model whose `logps_<model>_*` are the reference; rows without them are left out and counted."""
    divergence: str | None = None
    """Folder of scores, whose negative is the `preference_divergence` of a pair; rows without a score are left out."""
    weight: str | None = None
    """Folder of scores, each the `weight` of a pair; rows without a score are left out."""
    aspect: str | None = None
    """Only the pairs labelled with it."""
    fold: int | None = None
    """Leave this fold's prompts out."""
    cross_fit: CrossFit | None = None

    def table(self) -> tuple[pa.Table | None, dict[str, int]]:
        """The rows (None: there are none), and how many were left out by reason."""
        stored = [f"logps_{self.reference}_{side}" for side in ("chosen", "rejected")] if self.reference else []
        parts: list[pa.Table] = []
        lacking = 0
        for read in self.rows.tables([*TEXT, "score", *stored]):
            table = self._mine(read)
            for name, given in zip(REFERENCE_COLUMNS, stored):
                place = table.column_names.index(given)
                table = table.rename_columns([name if i == place else n for i, n in enumerate(table.column_names)])
            if stored:
                known = table.filter(pc.and_(*(pc.is_valid(table[name]) for name in REFERENCE_COLUMNS)))
                lacking += table.num_rows - known.num_rows
                table = known
            if table.num_rows:
                parts.append(table)
        dropped = {"missing_reference_logps": lacking} if lacking else {}
        if not parts:
            return None, dropped
        joined = pa.concat_tables(parts, promote_options="permissive")
        # PD is the negative of what is selected by.
        wanted = (
            ("divergence", self.divergence, "preference_divergence", -1.0),
            ("weight", self.weight, "weight", 1.0),
        )
        for what, folder, name, sign in wanted:
            if folder is not None:
                joined, unscored = self._with_score(joined, folder, name, sign)
                dropped |= {f"missing_{what}": unscored} if unscored else {}
        return joined if joined.num_rows else None, dropped

    def _mine(self, table: pa.Table) -> pa.Table:
        if self.aspect is not None:
            table = table.filter(pc.equal(table["aspect"], self.aspect).fill_null(False))
        if self.cross_fit is not None and self.fold is not None:
            prompts = [bytes.fromhex(one) for one in table["prompt_id"].to_pylist()]
            table = table.filter(pa.array(fold_of(prompts, **self.cross_fit.model_dump()) != self.fold))
        return table

    def _with_score(self, table: pa.Table, folder: str, name: str, sign: float) -> tuple[pa.Table, int]:
        """A metric's score beside every row, read by pair_id; and how many rows have none and were left out.

        Args:
            table: The rows.
            folder: Of the scores, without the source.
            name: Of the new column.
            sign: What scores are multiplied by.
        """
        assert not isinstance(self.rows, Mixed), "refused by the configuration"
        storage = self.rows.storage if isinstance(self.rows, Dataset) else self.rows.reader.storage
        wanted = pa.array([bytes.fromhex(one) for one in table["pair_id"].to_pylist()], pa.binary(16))
        score_N = np.full(table.num_rows, np.nan)
        for source in storage.folders(folder):
            artifact = Artifact(storage, f"{folder}/{source}")
            for shard in artifact.entries():
                scores = artifact.read(shard, ["pair_id", "score"])
                place_N = pc.index_in(wanted, value_set=scores["pair_id"].combine_chunks())
                row_M = np.flatnonzero(pc.is_valid(place_N).to_numpy(zero_copy_only=False))
                found_M = scores["score"].take(place_N.take(pa.array(row_M))).to_numpy(zero_copy_only=False)
                is_scored_M = np.isfinite(found_M)  # a duplicate stands in several shards and is scored in one
                score_N[row_M[is_scored_M]] = found_M[is_scored_M]
        known_N = np.isfinite(score_N)
        column = pa.array(sign * score_N[known_N])
        return table.filter(pa.array(known_N)).append_column(name, column), int((~known_N).sum())
