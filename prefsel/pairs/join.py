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
from prefsel.schema import CARRIED, SAME_AS

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


def rows_of(found: pa.Table, ids: pa.Array, *, what: str) -> pa.Table:
    """The rows of a table for some pair_ids, in their order.

    Args:
        found: Has a column `pair_id`, each id once.
        ids: The pair_ids wanted.
        what: What an error calls the table.

    Raises:
        IntegrityError: One of the pairs is not in it; says how many and which is the first.
    """
    place = pc.index_in(ids, value_set=found["pair_id"].combine_chunks())
    if place.null_count:
        lost = ids.filter(pc.is_null(place))[0].as_py().hex()
        raise IntegrityError(f"{what}: lacks {place.null_count} of {len(ids)} pairs, first {lost}")
    return found.take(place)


def pair_table(
    pairs: pa.Table, groups: pa.Table, column_sets: Sequence[pa.Table], *, source: str, spread: bool = True
) -> pa.Table:
    """The flat pair table of one shard.

    Args:
        pairs: schema `PAIRS`.
        groups: at least `GROUP_KEYS` of the same shard.
        column_sets: tables of schema `columns_schema`.
        source: the shard's source, repeated as a column.
        spread: also add `<column>_max` and `<column>_min` over all completions of the prompt, and of rewards (`rm_…`)
            the mean and the population variance, `<column>_mean` and `<column>_var`; nulls left out, and null where
            no completion of the prompt has a value.

    Returns:
        One row per pair, in the order of `pairs`: pair_id, prompt_id, aspect, source, then `<column>_chosen` and
        `<column>_rejected` (float64, null where the completion has no value).
    """
    rows_N, chosen_N, rejected_N = completion_positions(pairs, groups)
    completions = _flat(groups["completions"])
    ids_C = pc.struct_field(completions, "completion_id")
    lengths_G = np.diff(_offsets(groups["completions"]))
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
            if spread:
                found = group_spread(values_C.to_numpy(zero_copy_only=False), lengths_G, name.startswith("rm_"))
                arrays |= {
                    f"{name}_{suffix}": pa.array(value_G[rows_N], from_pandas=True) for suffix, value_G in found.items()
                }
    return pa.table(arrays)


def carried_columns(pairs: pa.Table, names: Sequence[str]) -> dict[str, pa.Array]:
    """The fields that pairs carry, by name, as text; null where the row had none, or the source carries no such field.

    Args:
        pairs: of a shard; the column `carried` may be absent.
        names: of the fields.
    """
    if CARRIED not in pairs.column_names:
        return {name: pa.nulls(pairs.num_rows, pa.string()) for name in names}
    carried = pairs[CARRIED].combine_chunks()
    return {name: pc.map_lookup(carried, pa.scalar(name), "first") for name in names}


def same_tokens(pairs: pa.Table, groups: pa.Table, column_set: pa.Table) -> pa.Array:
    """Which pairs' two completions are the same tokens to the model of a column set, booleans [pairs].

    Args:
        pairs: schema `PAIRS`.
        groups: at least `GROUP_KEYS` of the same shard.
        column_set: of schema `columns_schema`, with `SAME_AS`.
    """
    known_C, same_G = _flat(column_set["completion_ids"]), column_set[SAME_AS].combine_chunks()
    first_G = _offsets(column_set["completion_ids"])[:-1]
    class_C = np.arange(len(known_C))  # the first completion with its tokens, of each
    for row in np.flatnonzero(same_G.is_valid().to_numpy(zero_copy_only=False)).tolist():
        for number, place in enumerate(same_G[row].as_py()):
            if place is not None:
                class_C[first_G[row] + number] = first_G[row] + place
    _, chosen_N, rejected_N = completion_positions(pairs, groups)
    ids_C = pc.struct_field(_flat(groups["completions"]), "completion_id")
    where_C = pc.index_in(ids_C, value_set=known_C)
    is_known_C = where_C.is_valid().to_numpy(zero_copy_only=False)
    found_C = class_C[where_C.fill_null(0).to_numpy()]
    return pa.array((found_C[chosen_N] == found_C[rejected_N]) & is_known_C[chosen_N] & is_known_C[rejected_N])


def group_spread(value_C: np.ndarray, lengths_G: np.ndarray, with_moments: bool) -> dict[str, np.ndarray]:
    """How the values of each group are spread.

    Args:
        value_C: float64, the completions of one group after another; NaN where there is none.
        lengths_G: how many completions each group has.
        with_moments: also the mean and the population variance.

    Returns:
        `max`, `min` and, if asked, `mean` and `var`: float64 [G], NaN for a group without values.
    """
    is_known_C = ~np.isnan(value_C)
    owner_K, value_K = np.repeat(np.arange(len(lengths_G)), lengths_G)[is_known_C], value_C[is_known_C]
    largest_G, smallest_G = np.full(len(lengths_G), -np.inf), np.full(len(lengths_G), np.inf)
    np.maximum.at(largest_G, owner_K, value_K)
    np.minimum.at(smallest_G, owner_K, value_K)
    found = {"max": largest_G, "min": smallest_G}
    count_G = np.bincount(owner_K, minlength=len(lengths_G))
    if with_moments:
        divisor_G = np.maximum(count_G, 1)

        def mean_G(of_K: np.ndarray) -> np.ndarray:
            return np.bincount(owner_K, weights=of_K, minlength=len(lengths_G)) / divisor_G

        # The deviations' own mean is what rounding took from the first one: without it equal values get a variance
        # of 1e-34, and ties at zero are broken by noise.
        rough_G = mean_G(value_K)
        deviation_K = value_K - rough_G[owner_K]
        rest_G = mean_G(deviation_K)
        found |= {"mean": rough_G + rest_G, "var": mean_G(np.square(deviation_K - rest_G[owner_K]))}
    return {name: np.where(count_G > 0, value_G, np.nan) for name, value_G in found.items()}
