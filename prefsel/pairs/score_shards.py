"""Committed scores as a rule reads them: the rows of a shard, with the pair_ids, strata and keys that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError
from prefsel.pairs.join import GROUP_KEYS, completion_positions
from prefsel.pairs.reader import PairReader
from prefsel.select.radix import id_words
from prefsel.select.rows import Rows
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact


@dataclass(frozen=True)
class ScoreReader:
    """The committed scores a rule reads, by column, as tasks need them; pickles as a few strings."""

    reader: PairReader
    """Of pairs, groups and lengths."""
    folders: Mapping[str, str]
    """Column → folder of its scores, without the source."""

    def table(self, shard: ShardRef, column: str, names: list[str]) -> pa.Table:
        """Some columns of one score's shard."""
        return Artifact(self.reader.storage, f"{self.folders[column]}/{shard.source}").read(shard.shard, names)

    def rows(
        self,
        shard: ShardRef,
        columns: Sequence[str],
        *,
        ids: bool = False,
        by: Iterable[str] = (),
        keys: Iterable[str] = (),
    ) -> Rows:
        """The rows of a shard with what is asked for.

        Args:
            shard: which.
            columns: scores.
            ids: also pair_ids, which must then be the same for all scores.
            by: columns of strata.
            keys: what dedupes keep one of, `prompt` or `pair`.

        Raises:
            IntegrityError: the scores are of other pairs.
        """
        texts = [name for name in ("source", "aspect") if name in by]
        names = ["score", *(["pair_id"] if ids else [])]
        # The texts of strata come from the first score's file, with it: a file is opened once.
        tables = {one: self.table(shard, one, [*names, *(texts if one == columns[0] else [])]) for one in columns}
        if ids:
            self._require_same_pairs(shard, tables)
        shown = tables[columns[0]]
        return Rows(
            scores={name: one["score"].to_numpy(zero_copy_only=False) for name, one in tables.items()},
            ids_NW=id_words(tables[columns[0]]["pair_id"]) if ids else None,
            texts={name: shown[name] for name in texts},
            gap_N=self._gaps(shard) if "length_bin" in by else None,
            keys={key: self._keys(shard, key) for key in keys},
            full=frozenset(name for name, one in tables.items() if not one["score"].null_count),
        )

    def _require_same_pairs(self, shard: ShardRef, tables: Mapping[str, pa.Table]) -> None:
        first, *others = tables
        ids = tables[first]["pair_id"].combine_chunks()
        for column in others:
            if not tables[column]["pair_id"].combine_chunks().equals(ids):
                raise IntegrityError(f"{self.folders[column]}/{shard.key}: its pairs are not those of {first}")

    def lengths(self, shard: ShardRef) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the chosen and rejected completion of every pair, NaN where unknown."""
        flat = self.reader.flat(shard) if self.reader.length_column else pa.table({})
        return self.reader.lengths(shard, flat)

    def _gaps(self, shard: ShardRef) -> np.ndarray:
        chosen_N, rejected_N = self.lengths(shard)
        return np.abs(chosen_N - rejected_N)

    def _keys(self, shard: ShardRef, by: str) -> np.ndarray:
        pairs = self.reader.pairs(shard)
        if by == "prompt":
            return id_words(pairs["prompt_id"])
        groups = self.reader.groups(shard, GROUP_KEYS)
        ids = pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "completion_id")
        _, *sides = completion_positions(pairs, groups)
        # The ids of two completions, the smaller first: they name their prompt too.
        chosen_NW, rejected_NW = (id_words(ids.take(pa.array(side_N))).astype(np.uint64) for side_N in sides)
        is_equal_N = chosen_NW[:, 0] == rejected_NW[:, 0]
        is_swapped_N = (chosen_NW[:, 0] > rejected_NW[:, 0]) | (is_equal_N & (chosen_NW[:, 1] > rejected_NW[:, 1]))
        low_NW = np.where(is_swapped_N[:, None], rejected_NW, chosen_NW)
        high_NW = np.where(is_swapped_N[:, None], chosen_NW, rejected_NW)
        return np.concatenate([low_NW, high_NW], axis=1)

    def reasons(self, shard: ShardRef, columns: Iterable[str]) -> pa.Array:
        """Why each pair of a shard lacks one of these scores, as the first of them says; null where it has all."""
        given = [self.table(shard, column, ["dropped"])["dropped"].combine_chunks() for column in columns]
        return pc.coalesce(*(one.cast(pa.string()) for one in given))
