"""Kept pairs → rows that `datasets` and trainers read: messages, identifiers as hex, and every number beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config.columns import completion_column
from prefsel.pairs.join import completion_positions
from prefsel.schema import FLIPPED

OTHER_SIDE = {"chosen": "rejected", "rejected": "chosen"}


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
        extra: more columns, already aligned with `rows_N` (score, percentile, stratum). Where `flipped` among them is
            true, chosen and rejected are exchanged, with every number of either side; a number of the pair as such is
            of the pair as it was labelled, and null then.

    Returns:
        pair_id, prompt_id (hex), prompt, chosen, rejected (lists of role/content messages), source, aspect, then
        the fields that pairs carry, `extra` and the float columns of `flat`.
    """
    take = pa.array(rows_N)
    kept = pairs.take(take)
    group_N, chosen_N, rejected_N = completion_positions(kept, groups)
    is_flipped_N = extra[FLIPPED].to_numpy(zero_copy_only=False) if FLIPPED in extra else None
    if is_flipped_N is not None:
        chosen_N, rejected_N = exchanged(is_flipped_N, chosen_N, rejected_N)
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
        **{name: numbers[name].combine_chunks() for name in carried_in(numbers)},
        **extra,
    }
    for name in numbers.column_names:
        if pa.types.is_floating(numbers[name].type):
            arrays[name] = numbers[name].combine_chunks()
    if is_flipped_N is not None:
        of_flat = {name: arrays[name] for name in numbers.column_names if name in arrays}
        arrays |= exchanged_numbers(of_flat, is_flipped_N)
    return pa.table(arrays)


def carried_in(flat: pa.Table) -> list[str]:
    """The columns of a flat pair table that are fields which its pairs carry: text that is not of every corpus."""
    return [
        one.name
        for one in flat.schema
        if pa.types.is_string(one.type) and one.name not in ("source", "aspect", "dropped")
    ]


def exchanged(is_flipped_N: np.ndarray, chosen_N: np.ndarray, rejected_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What belongs to either side, exchanged where a pair is flipped."""
    return np.where(is_flipped_N, rejected_N, chosen_N), np.where(is_flipped_N, chosen_N, rejected_N)


def exchanged_numbers(columns: Mapping[str, pa.Array], is_flipped_N: np.ndarray) -> dict[str, pa.Array]:
    """Flat columns of some pairs, those of either side exchanged where a pair is flipped.

    Args:
        columns: By name; others than numbers are left out.
        is_flipped_N: bool.

    Returns:
        The columns that change: `<x>_chosen` and `<x>_rejected`, and those of the pair as such, null where it is
        flipped. What is told of all completions of the prompt (`_max`, `_mean`, …) stays.
    """
    is_flipped, found = pa.array(is_flipped_N), {}
    for name, column in columns.items():
        if not pa.types.is_floating(column.type):
            continue
        stem, _, side = name.rpartition("_")
        if side in OTHER_SIDE and (other := columns.get(f"{stem}_{OTHER_SIDE[side]}")) is not None:
            found[name] = pc.if_else(is_flipped, other, column)
        elif completion_column(name) == name:
            found[name] = pc.if_else(is_flipped, pa.scalar(None, column.type), column)
    return found
