"""One shard of the corpus as a flat pair table with every number and drop reason beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError
from prefsel.pairs.join import GROUP_KEYS, carried_columns, completion_positions, pair_table, same_tokens
from prefsel.schema import SAME_AS
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

PAIR_COLUMNS = "pair_columns/"
"""Where pair-level columns lie: numbers of a pair that are no function of one completion."""


@dataclass(frozen=True)
class PairReader:
    """Reads shards by name; pickles as a few strings."""

    storage: Storage
    eligible: str
    """Folder of the eligibility artifact, without the source."""
    columns: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Folders of column sets, without the source, each with the completion columns wanted from it."""
    length_column: str | None = None
    """`num_tokens_<model>` for lengths in tokens; None: characters of the text."""
    carried: tuple[str, ...] = ()
    """Fields of the rows that some source carries."""

    @property
    def length_unit(self) -> str:
        """What `lengths` counts."""
        return "tokens" if self.length_column else "characters"

    def pairs(self, shard: ShardRef) -> pa.Table:
        """The pairs of a shard, schema `PAIRS`."""
        return Artifact(self.storage, shard.pairs_path).read(shard.shard)

    def groups(self, shard: ShardRef, columns: list[str] | None = None) -> pa.Table:
        """The groups of a shard; all of them or a projection."""
        return Artifact(self.storage, f"groups/{shard.source}").read(shard.shard, columns)

    def dropped(self, shard: ShardRef, pairs: pa.Table) -> pa.Array:
        """Why each pair cannot be selected, null for eligible ones; strings aligned with `pairs`.

        Raises:
            IntegrityError: the eligibility shard speaks of other pairs.
        """
        table = Artifact(self.storage, f"{self.eligible}/{shard.source}").read(shard.shard)
        if not table["pair_id"].combine_chunks().equals(pairs["pair_id"].combine_chunks()):
            raise IntegrityError(f"{self.eligible}/{shard.key}: its pair_ids are not those of pairs/{shard.key}")
        return table["dropped"].combine_chunks().cast(pa.string())

    def flat(self, shard: ShardRef) -> pa.Table:
        """The flat pair table of a shard (`metrics.join.pair_table`), what its pairs carry, and `dropped`; in order.

        Besides what cannot be selected, pairs are dropped as `same_tokens` whose two completions are the same tokens to
        a model that one of the columns is made by.
        """
        pairs, groups = self.pairs(shard), self.groups(shard, GROUP_KEYS)
        # Parquet leaves out of a projection what a shard does not have, as most have no `same_as`.
        read = [
            Artifact(self.storage, f"{folder}/{shard.source}").read(
                shard.shard, ["prompt_id", "completion_ids", *names, SAME_AS]
            )
            for folder, names in self.columns
            if not folder.startswith(PAIR_COLUMNS)
        ]
        sets = [one.drop_columns(SAME_AS) if SAME_AS in one.column_names else one for one in read]
        table = pair_table(pairs, groups, sets, source=shard.source)
        for name, column in carried_columns(pairs, self.carried).items():
            table = table.append_column(name, column)
        for folder, names in self.columns:
            if folder.startswith(PAIR_COLUMNS):
                table = self._with_pair_columns(table, Artifact(self.storage, f"{folder}/{shard.source}"), shard, names)
        if self.length_column:
            for side in ("chosen", "rejected"):
                table = table.append_column(f"num_tokens_{side}", table[f"{self.length_column}_{side}"])
        dropped = self.dropped(shard, pairs)
        for one in read:
            if SAME_AS in one.column_names:
                is_same = pc.and_(same_tokens(pairs, groups, one), pc.is_null(dropped))
                dropped = pc.if_else(is_same, pa.scalar("same_tokens"), dropped)
        return table.append_column("dropped", dropped)

    def _with_pair_columns(
        self, table: pa.Table, artifact: Artifact, shard: ShardRef, names: tuple[str, ...]
    ) -> pa.Table:
        found = artifact.read(shard.shard, ["pair_id", *names])
        place = pc.index_in(table["pair_id"].combine_chunks(), value_set=found["pair_id"].combine_chunks())
        for name in names:
            table = table.append_column(name, found[name].combine_chunks().take(place))
        return table

    def lengths(self, shard: ShardRef, flat: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the chosen and rejected completion of each pair, float64 [pairs], NaN where unknown."""
        if self.length_column:
            sides = (flat[f"{self.length_column}_{side}"] for side in ("chosen", "rejected"))
            chosen_N, rejected_N = (side.to_numpy(zero_copy_only=False) for side in sides)
            return chosen_N, rejected_N
        groups = self.groups(shard, ["prompt_id", "completions"])
        _, chosen_N, rejected_N = completion_positions(self.pairs(shard), groups)
        messages = pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "messages")
        owner_M = pc.list_parent_indices(messages).to_numpy()
        # A message that is a call alone has no text.
        sizes_M = pc.utf8_length(pc.struct_field(pc.list_flatten(messages), "content")).fill_null(0).to_numpy()
        characters_C = np.bincount(owner_M, weights=sizes_M, minlength=len(messages))
        return characters_C[chosen_N], characters_C[rejected_N]
