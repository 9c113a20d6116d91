"""Exact ranks over any sharding and number of parts, against DuckDB's row_number and a sort."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import duckdb
import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.numbers import ranges
from prefsel.numbers.shard_values import ShardValues
from prefsel.select.ranks import (
    Parts,
    PlacedRows,
    Positions,
    percentiles,
    place,
    positions,
    positions_of_shard,
    split_evenly,
)

values = st.lists(
    st.one_of(st.sampled_from([0.5, 0.5, 0.5, -0.0, 0.0, 1e9]), st.floats(allow_nan=False, allow_infinity=False)),
    min_size=1,
    max_size=60,
)


def ranked(shards: Sequence[tuple[np.ndarray, np.ndarray]], num_parts: int) -> tuple[list[np.ndarray], Parts]:
    """The positions of every shard's rows, found part by part."""
    given_ = [ShardValues(score_N, ids_NW) for score_N, ids_NW in shards]
    summaries = [shard.summaries()[()] for shard in given_]
    parts = split_evenly(summaries, lambda queries: [shard.answer(queries) for shard in given_], num_parts)
    placed = PlacedRows.merge(
        place(score_N, ids_NW, np.arange(len(score_N)), parts, column=0, shard=number)
        for number, (score_N, ids_NW) in enumerate(shards)
    )
    sizes = np.bincount(placed.place_M, minlength=len(parts.starts))
    assert sizes.tolist() == np.diff([*parts.starts, parts.size]).tolist()
    assert sizes.max() <= -(-parts.size // num_parts)  # no part is larger than its share, whatever ties
    found = Positions.merge(
        positions(placed.take(placed.place_M == part), [parts]) for part in range(len(parts.starts))
    )
    return [positions_of_shard(found, 0, number) for number in range(len(shards))], parts


def row_numbers(score_N: np.ndarray, ids_NW: np.ndarray) -> list[int]:
    ids = [int(first) << 64 | int(second) for first, second in ids_NW]
    rows = pa.table({"n": range(len(ids)), "s": score_N + 0.0, "id": [f"{one:032x}" for one in ids]})  # noqa: F841
    found = duckdb.sql("select row_number() over (order by s desc, id) - 1 place from rows order by n").fetchnumpy()
    return found["place"].tolist()


@settings(deadline=None, max_examples=100)
@given(values, st.integers(1, 5), st.sampled_from([1, 2, 7, 64]), st.integers(0, 99), st.sampled_from([2, 256]))
def test_positions_are_row_numbers(scores, num_shards, num_parts, seed, num_values) -> None:
    rng, num_rows = np.random.default_rng(seed), len(scores)
    first_N = rng.integers(0, 2**64, num_rows, np.uint64) if seed % 2 else np.zeros(num_rows, np.uint64)
    ids_NW = np.stack([first_N, rng.permutation(num_rows).astype(np.uint64)], axis=1).astype(">u8")
    score_N, place_N = np.array(scores), rng.integers(0, num_shards, num_rows)
    deal = [np.flatnonzero(place_N == shard) for shard in range(num_shards)]
    with mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values):
        found, parts = ranked([(score_N[rows], ids_NW[rows]) for rows in deal], num_parts)
    expected = row_numbers(score_N, ids_NW)
    assert [place.tolist() for place in found] == [[expected[row] for row in rows] for rows in deal]
    assert len(parts.cuts) == len(parts.starts) - 1 < num_parts


def test_percentiles_are_the_middles_of_equal_shares() -> None:
    assert percentiles(np.arange(4), 4).tolist() == [87.5, 62.5, 37.5, 12.5]
    assert percentiles(np.empty(0, int), 0).tolist() == []
