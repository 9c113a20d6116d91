"""Data map: over the group's candidates, from completion columns to scores, and over the pair."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import score_table
from prefsel.pairs.join import pair_table
from prefsel.schema import GROUPS, PAIRS, columns_schema

NAMES = ["rm_a_mean", "rm_a_var", "rm_a_chosen", "rm_a_rejected"]


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


def flat_table(groups: list[list[float | None]]) -> pa.Table:
    """One pair (first and last completion) of each group of rewards."""
    ids = [[ident(100 * (g + 1) + k) for k in range(len(group))] for g, group in enumerate(groups)]
    group_rows = [
        {
            "prompt_id": ident(g),
            "prompt": [{"role": "user", "content": str(g)}],
            "completions": [
                {"completion_id": one, "messages": [{"role": "assistant", "content": one.hex()}], "ratings": []}
                for one in ids[g]
            ],
            "provenance": None,
        }
        for g in range(len(groups))
    ]
    pair_rows = [
        {
            "pair_id": ident(10_000 + g),
            "mirror_id": ident(20_000 + g),
            "prompt_id": ident(g),
            "chosen": 0,
            "rejected": len(group) - 1,
        }
        for g, group in enumerate(groups)
    ]
    column_rows = [
        {"prompt_id": ident(g), "completion_ids": ids[g], "rm_a": group} for g, group in reversed([*enumerate(groups)])
    ]
    return pair_table(
        pa.Table.from_pylist(pair_rows, PAIRS),
        pa.Table.from_pylist(group_rows, GROUPS),
        [pa.Table.from_pylist(column_rows, columns_schema(["rm_a"]))],
        source="s",
    )


values = st.none() | st.floats(-100, 100).map(lambda value: round(value, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(values, min_size=2, max_size=5), min_size=1, max_size=8))
def test_mean_and_population_variance_of_the_scored_candidates(groups: list[list[float | None]]) -> None:
    table = flat_table(groups)
    known = [[value for value in group if value is not None] for group in groups]
    means = [statistics.fmean(group) if group else math.nan for group in known]
    np.testing.assert_allclose(score_table(table, "data_map", rm="a"), means, rtol=1e-12, atol=1e-12)
    variances = [-statistics.pvariance(group) if group else math.nan for group in known]
    found = score_table(table, "data_map", rm="a", axis="variance")
    np.testing.assert_allclose(found, variances, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 50),
    st.sampled_from([1, 3, 60]),
    st.sampled_from(["mean", "variance"]),
    st.sampled_from(["group", "pair"]),
)
def test_equals_the_definition_for_any_sharding(num_rows: int, num_shards: int, axis: str, candidates: str) -> None:
    columns = random_columns(NAMES, num_rows)
    expected = []
    for row in rows_of(columns):
        if candidates == "group":
            value = row["rm_a_mean"] if axis == "mean" else row["rm_a_var"]
        else:
            pair = [row["rm_a_chosen"], row["rm_a_rejected"]]
            of_pair = statistics.fmean if axis == "mean" else statistics.pvariance
            value = None if None in pair else of_pair(pair)
        expected.append(math.nan if value is None else value if axis == "mean" else -value)
    found, _ = score_shards(float_table(columns), "data_map", num_shards, rm="a", axis=axis, candidates=candidates)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_table_of_plain_pairs_has_no_groups() -> None:
    table = sided(rm_a=[(2.0, 5.0)])
    with pytest.raises(UserError, match="missing columns rm_a_mean"):
        score_table(table, "data_map", rm="a")
    with pytest.raises(UserError, match="axis: got 'var'; input should be 'mean' or 'variance'"):
        score_table(table, "data_map", rm="a", axis="var")
