"""Who may be selected: splits, exclusions and duplicates, as one drop reason per pair, decided before any statistic.

Precedence, so that every pair is counted once: excluded prompt, prompt of a held-out source, contradiction or
duplicate, held-out prompt, proxy or validation prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config import Split
from prefsel.errors import UserError
from prefsel.ingest.identity import split_of
from prefsel.numbers.columns import id_words
from prefsel.select import duplicates
from prefsel.workspace.catalog import Catalog, ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

REASONS = ("holdout", "proxy", "validation", "excluded_prompt", "holdout_prompt", *duplicates.REASONS)
"""Reason codes are positions in here; -1 is an eligible pair."""
HOLDOUT, PROXY, VALIDATION, EXCLUDED, HOLDOUT_PROMPT, FIRST_DUPLICATE = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Rules:
    """What decides before duplicates do."""

    split: Split
    excluded: pa.Array
    """prompt_ids of `exclude_prompts` and of `exclude` sources."""
    held_out: pa.Array
    """prompt_ids of `holdout` sources."""


def prompt_ids(storage: Storage, catalog: Catalog, role: str) -> pa.Array:
    """The prompt_ids of all sources of a role: evaluation sets, small enough for one machine."""
    chunks = [
        chunk
        for source in catalog.sources
        if source.role == role
        for file in source.files
        for shard in file.shards
        for chunk in Artifact(storage, f"groups/{source.name}").read(shard, ["prompt_id"])["prompt_id"].chunks
    ]
    return pc.unique(pa.chunked_array(chunks, pa.binary(16)))


def shared_prompts(pairs: pa.Table, shard: ShardRef, rules: Rules, validation: pa.Array) -> list[bytes]:
    """The prompts of a `train` shard that also stand in a validation source, each once, in order.

    Those that are excluded, or of a held-out source, are used in neither; those of the validation part of a split are
    not selected from.
    """
    if shard.role != "train":
        return []
    codes_N = base_codes(pairs, shard, rules)
    prompts = pairs["prompt_id"].combine_chunks()
    is_used_N = ~np.isin(codes_N, (EXCLUDED, HOLDOUT_PROMPT, VALIDATION))
    is_shared_N = pc.is_in(prompts, value_set=validation).to_numpy(zero_copy_only=False) & is_used_N
    return pc.unique(prompts.filter(pa.array(is_shared_N))).to_pylist()


def require_disjoint(shards: Sequence[ShardRef], found: Sequence[Sequence[bytes]], validation: Sequence[str]) -> None:
    """Refuse a corpus whose selection would be measured against what is selected.

    Args:
        shards: of the corpus.
        found: of each its `shared_prompts`.
        validation: names of the validation sources.

    Raises:
        UserError: how many prompts, which sources, the first prompt_ids.
    """
    prompts = list(dict.fromkeys(prompt for of_shard in found for prompt in of_shard))
    if prompts:
        sources = dict.fromkeys(shard.source for shard, of_shard in zip(shards, found) if of_shard)
        first = ", ".join(prompt.hex() for prompt in prompts[:5])
        raise UserError(
            f"sources.{', '.join(validation)} (role validation): {len(prompts):,} prompts also stand in "
            f"{', '.join(sources)} (role train), first {first}; remove them from one side or list them in "
            "exclude_prompts, or use split.validation instead of a validation source"
        )


def base_codes(rows: pa.Table, shard: ShardRef, rules: Rules) -> np.ndarray:
    """Reason code of each row, pair or prompt, before duplicates, by its `prompt_id`; int8 [rows]."""
    prompts = rows["prompt_id"].combine_chunks()
    codes_N = np.full(len(prompts), -1, np.int8)
    if shard.role == "holdout":
        codes_N[:] = HOLDOUT
    elif shard.role == "validation":
        codes_N[:] = VALIDATION
        codes_N[pc.is_in(prompts, value_set=rules.held_out).to_numpy(zero_copy_only=False)] = HOLDOUT_PROMPT
    else:
        split_N = split_of(prompts, **rules.split.model_dump())
        codes_N[split_N == 1], codes_N[split_N == 2], codes_N[split_N == 3] = HOLDOUT, PROXY, VALIDATION
        codes_N[pc.is_in(prompts, value_set=rules.held_out).to_numpy(zero_copy_only=False)] = HOLDOUT_PROMPT
    codes_N[pc.is_in(prompts, value_set=rules.excluded).to_numpy(zero_copy_only=False)] = EXCLUDED
    return codes_N


@dataclass(frozen=True)
class EligiblePass:
    """The decision about every pair: shards send ids to partitions, which tell them their duplicates."""

    storage: Storage
    rules: Rules
    contradictions: Literal["drop", "keep"]
    folder: str
    inputs: Mapping[str, str]
    """Shard key → hash of its pairs."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[duplicates.PartitionRows]:
        """What the duplicate search needs of a shard, by partition: pairs that would otherwise stay in their split."""
        pairs = self._pairs(shard, ["pair_id", "mirror_id", "prompt_id"])
        codes_N = base_codes(pairs, shard, self.rules)
        row_N = np.flatnonzero((codes_N != EXCLUDED) & (codes_N != HOLDOUT_PROMPT))
        pair_NW, mirror_NW = id_words(pairs["pair_id"])[row_N], id_words(pairs["mirror_id"])[row_N]
        return duplicates.partition(pair_NW, mirror_NW, shard.number, num_partitions, row_N)

    def merge(self, sent: Iterable[duplicates.PartitionRows]) -> duplicates.PartitionRows:
        """Rows of one partition."""
        return duplicates.PartitionRows.merge(sent)

    def settle(self, rows: duplicates.PartitionRows) -> duplicates.Drops:
        """What a partition drops."""
        return duplicates.resolve(rows, contradictions=self.contradictions)

    def commit(self, shard: ShardRef, drops: Sequence[duplicates.Drops]) -> dict[str, int]:
        """Commit one shard; returns its pairs by drop reason, plus `eligible`."""
        artifact = Artifact(self.storage, f"{self.folder}/{shard.source}")
        attempt = artifact.log_attempt(shard.shard)
        table = _eligible_table(self._pairs(shard, ["pair_id", "prompt_id"]), shard, self.rules, drops)
        counts = _count_reasons(table)
        made_from = self.inputs[shard.key]
        artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info={"counts": counts})
        return counts

    def _pairs(self, shard: ShardRef, columns: list[str]) -> pa.Table:
        return Artifact(self.storage, shard.pairs_path).read(shard.shard, columns)


def _eligible_table(pairs: pa.Table, shard: ShardRef, rules: Rules, drops: Sequence[duplicates.Drops]) -> pa.Table:
    """pair_id and drop reason (null: eligible) of every pair of a shard, in order."""
    codes_N = base_codes(pairs, shard, rules)
    for drop in drops:
        is_mine_M = drop.shard_M == shard.number
        codes_N[drop.row_M[is_mine_M]] = FIRST_DUPLICATE + drop.reason_M[is_mine_M]
    indices = pa.array(codes_N, pa.int8(), mask=codes_N < 0)
    dropped = pa.DictionaryArray.from_arrays(indices, pa.array(REASONS, pa.string()))
    return pa.table({"pair_id": pairs["pair_id"], "dropped": dropped})


def _count_reasons(table: pa.Table) -> dict[str, int]:
    """Dropped rows by reason, plus `eligible`."""
    counted = pc.value_counts(table["dropped"].combine_chunks().cast(pa.string()))
    return {(row["values"].as_py() or "eligible"): row["counts"].as_py() for row in counted}
