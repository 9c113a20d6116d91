"""Difficulty gap against its definition, one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards

from prefsel.errors import UserError
from prefsel.metrics import score_table

NAMES = [f"logps_{model}_{side}" for model in "pr" for side in ("chosen", "rejected")]


def naive(row: dict, beta: float, absolute: bool) -> float:
    """-IRM or -|IRM|."""
    if None in row.values():
        return math.nan
    irm = beta * (row["logps_p_chosen"] - row["logps_r_chosen"]) - beta * (
        row["logps_p_rejected"] - row["logps_r_rejected"]
    )
    return -abs(irm) if absolute else -irm


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.sampled_from([0.1, 1.0]), st.booleans())
def test_equals_the_definition_for_any_sharding(num_rows: int, num_shards: int, beta: float, absolute: bool) -> None:
    columns = random_columns(NAMES, num_rows)
    params = {"policy": "p", "reference": "r", "beta": beta, "absolute": absolute}
    found, _ = score_shards(float_table(columns), "difficulty_gap", num_shards, **params)
    expected = [naive(row, beta, absolute) for row in rows_of(columns)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(found, score_table(float_table(columns), "difficulty_gap", **params))


def test_needs_a_reference() -> None:
    with pytest.raises(UserError, match="reference: required, but missing"):
        score_table(float_table(random_columns(NAMES, 3)), "difficulty_gap", policy="p")
