"""Kept pairs → rows that `datasets` and trainers read: messages, identifiers as hex, and every number beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.pairs.join import completion_positions


def hex_ids(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Binary identifiers as hex strings."""
    return pa.array([value.hex() for value in column.to_pylist()], pa.string())


def export_rows(
    rows_N: np.ndarray, pairs: pa.Table, groups: pa.Table, flat: pa.Table, extra: Mapping[str, pa.Array]
) -> pa.Table:
    """The dataset rows of some pairs of one shard.

    Args:
        rows_N: positions of the pairs in `pairs`, ascending.
        pairs: schema `PAIRS`.
        groups: schema `GROUPS`, the same shard.
        flat: the shard's flat pair table (`metrics.join.pair_table`); its float columns are carried along.
        extra: more columns, already aligned with `rows_N` (score, percentile, stratum).

    Returns:
        pair_id, prompt_id (hex), prompt, chosen, rejected (lists of role/content messages), source, aspect, then
        `extra` and the float columns of `flat`.
    """
    take = pa.array(rows_N)
    kept = pairs.take(take)
    group_N, chosen_N, rejected_N = completion_positions(kept, groups)
    messages_C = pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "messages")
    numbers = flat.take(take)
    arrays: dict[str, pa.Array] = {
        "pair_id": hex_ids(kept["pair_id"]),
        "prompt_id": hex_ids(kept["prompt_id"]),
        "prompt": groups["prompt"].combine_chunks().take(pa.array(group_N)),
        "chosen": messages_C.take(pa.array(chosen_N)),
        "rejected": messages_C.take(pa.array(rejected_N)),
        "source": numbers["source"].combine_chunks(),
        "aspect": kept["aspect"].combine_chunks(),
        **extra,
    }
    for name in numbers.column_names:
        if pa.types.is_floating(numbers[name].type):
            arrays[name] = numbers[name].combine_chunks()
    return pa.table(arrays)
