"""Completion columns → flat pair table, by identifier: never by position.

Inside a shard, `groups`, `pairs` and every column set hold the same prompts; a pair's value is looked up by the
completion_id its index points at, so a column set made in another order, or by another version of the file, still
gives each pair its own numbers (and null where it has none).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError

GROUP_KEYS = ["prompt_id", "completions.list.element.completion_id"]
"""Projection of a groups shard that `pair_table` needs."""


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pc.list_flatten(column.combine_chunks())


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    lengths = pc.list_value_length(column.combine_chunks()).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def completion_positions(pairs: pa.Table, groups: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of each pair's group, and flat positions of its chosen and rejected completion, int64 [pairs] each."""
    rows = pc.index_in(pairs["prompt_id"].combine_chunks(), value_set=groups["prompt_id"].combine_chunks())
    if rows.null_count:
        lost = pairs["pair_id"].filter(pc.is_null(rows))[0].as_py().hex()
        raise IntegrityError(f"pairs: {rows.null_count} pairs point at no group of their shard, first {lost}")
    rows_N = rows.to_numpy().astype(np.int64)
    start_N = _offsets(groups["completions"])[rows_N]
    return rows_N, start_N + pairs["chosen"].to_numpy(), start_N + pairs["rejected"].to_numpy()


def pair_table(
    pairs: pa.Table, groups: pa.Table, column_sets: Sequence[pa.Table], *, source: str, spread: bool = True
) -> pa.Table:
    """The flat pair table of one shard.

    Args:
        pairs: schema `PAIRS`.
        groups: at least `GROUP_KEYS` of the same shard.
        column_sets: tables of schema `columns_schema`.
        source: the shard's source, repeated as a column.
        spread: also add `<column>_max` and `<column>_min` over all completions of the prompt, nulls left out.

    Returns:
        One row per pair, in the order of `pairs`: pair_id, prompt_id, aspect, source, then `<column>_chosen` and
        `<column>_rejected` (float64, null where the completion has no value).
    """
    rows_N, chosen_N, rejected_N = completion_positions(pairs, groups)
    completions = _flat(groups["completions"])
    ids_C = pc.struct_field(completions, "completion_id")
    starts_G = _offsets(groups["completions"])[:-1]
    arrays = {name: pairs[name].combine_chunks() for name in ("pair_id", "prompt_id", "aspect")}
    arrays["source"] = pa.repeat(pa.scalar(source), pairs.num_rows)
    for table in column_sets:
        known_C = _flat(table["completion_ids"])
        where_C = None if known_C.equals(ids_C) else pc.index_in(ids_C, value_set=known_C)
        for name in table.column_names[2:]:
            values_C = _flat(table[name])
            values_C = values_C if where_C is None else values_C.take(where_C)
            arrays[f"{name}_chosen"] = values_C.take(pa.array(chosen_N))
            arrays[f"{name}_rejected"] = values_C.take(pa.array(rejected_N))
            if spread and len(values_C):
                for suffix, reduce in (("max", np.fmax), ("min", np.fmin)):
                    by_group_G = reduce.reduceat(values_C.to_numpy(zero_copy_only=False), starts_G)
                    arrays[f"{name}_{suffix}"] = pa.array(by_group_G[rows_N], from_pandas=True)
            elif spread:
                arrays |= {f"{name}_{suffix}": pa.array([], pa.float64()) for suffix in ("max", "min")}
    return pa.table(arrays)
