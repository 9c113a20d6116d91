"""A scored shard → its committed columns, with everything that is known about how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.pairs.reader import PAIR_COLUMNS
from prefsel.schema import SAME_AS, columns_schema
from prefsel.score.contract import Scored
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact


def commit_scored(
    artifact: Artifact, shard: ShardRef, groups: pa.Table, scored: Scored, *, made_from: str, attempt: str, **info: Any
) -> None:
    """Commit the columns of a shard.

    Args:
        artifact: Of the scorer and the shard's source.
        shard: Which one.
        groups: What it was made from.
        scored: Its numbers.
        made_from: Content hash of `groups`.
        attempt: Its name in the log of attempts.
        info: More to keep in the ledger.
    """
    if artifact.path.startswith(PAIR_COLUMNS):
        pairs = Artifact(artifact.storage, shard.pairs_path).read(shard.shard, ["pair_id"])
        table = _pair_columns_table(pairs, scored.columns)
        rows = table.num_rows
    else:
        table = _columns_table(groups, scored.columns)
        rows = len(pc.list_flatten(table["completion_ids"]))
        if same := getattr(scored, "same_as", {}):
            table = table.append_column(SAME_AS, _same_as_column(groups, same))
    known = {
        "dropped": dict(scored.dropped),
        "counters": dict(scored.counters),
        "facts": dict(scored.facts),
        "poisoned": scored.poisoned[:100],
        "padded_because": scored.padded_because,
        "template_error": scored.template_error,
        "completions": rows,
    }
    # A scorer of a plugin may be another record than `ScoredShard`, and say nothing of a template.
    if (use := getattr(scored, "template", None)) is not None:
        known["template"] = asdict(use)
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=known | info)


def _same_as_column(groups: pa.Table, same: Mapping[int, Sequence[int | None]]) -> pa.Array:
    """`ScoredShard.same_as` as a column: a null list for the groups whose completions all differ."""
    rows = [same.get(row) for row in range(groups.num_rows)]
    return pa.array(rows, pa.list_(pa.int32()))


def _columns_table(groups: pa.Table, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Columns beside the identifiers they belong to; −0.0 becomes 0.0."""
    completions = groups["completions"].combine_chunks()
    # Cut out by Arrow: as Python objects, all texts of a shard would be made while the other thread runs a model.
    ends = pc.cumulative_sum(pc.list_value_length(completions)).cast(pa.int32())
    ids = pc.struct_field(pc.list_flatten(completions), "completion_id")
    values = {name: [[None if v is None else v + 0.0 for v in row] for row in rows] for name, rows in columns.items()}
    arrays = {
        "prompt_id": groups["prompt_id"],
        "completion_ids": pa.ListArray.from_arrays(pa.concat_arrays([pa.array([0], pa.int32()), ends]), ids),
        **values,
    }
    return pa.table(arrays, schema=columns_schema(list(columns)))


def _pair_columns_table(pairs: pa.Table, columns: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """Pair-level columns beside the pair_ids; −0.0 becomes 0.0."""
    values = {
        name: pa.array([None if v is None else v + 0.0 for v in row], pa.float64()) for name, row in columns.items()
    }
    return pa.table({"pair_id": pairs["pair_id"], **values})
