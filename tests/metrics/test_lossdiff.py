"""LossDiff against its definition, one pair at a time, and where a plain logarithm would overflow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import score_table

NAMES = [f"logps_{model}_{side}" for model in ("t", "tv", "r") for side in ("chosen", "rejected")]
PARAMS = {"policy": "t", "validation_policy": "tv", "reference": "r"}


def naive(row: dict, beta: float) -> float:
    """-log σ(IRM) of both models, subtracted."""
    if any(row[name] is None for name in NAMES):
        return math.nan
    losses = []
    for model in ("t", "tv"):
        ratio = [row[f"logps_{model}_{side}"] - row[f"logps_r_{side}"] for side in ("chosen", "rejected")]
        losses.append(-math.log(1 / (1 + math.exp(-beta * (ratio[0] - ratio[1])))))
    return losses[0] - losses[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.sampled_from([0.01, 0.1, 1.0]))
def test_equals_the_definition_for_any_sharding(num_rows: int, num_shards: int, beta: float) -> None:
    columns = random_columns(NAMES, num_rows)
    found, fitted = score_shards(float_table(columns), "lossdiff", num_shards, beta=beta, **PARAMS)
    np.testing.assert_allclose(found, [naive(row, beta) for row in rows_of(columns)], rtol=1e-12, atol=1e-12)
    assert fitted == {}
    np.testing.assert_array_equal(found, score_table(float_table(columns), "lossdiff", beta=beta, **PARAMS))


def test_extreme_margins_are_linear_not_infinite() -> None:
    # softplus(1e5) is 1e5 and softplus(-1e5) is 0 to the last bit.
    table = sided(logps_t=[(-1e5, 0), (1e5, 0)], logps_tv=[(1e5, 0), (-1e5, 0)], logps_r=[(0, 0)] * 2)
    assert score_table(table, "lossdiff", beta=1, **PARAMS).tolist() == [1e5, -1e5]


def test_small_losses_keep_their_digits() -> None:
    # log1p(e^-50) is e^-50; 1 - σ rounds to 0 there.
    table = sided(logps_t=[(50, 0)], logps_tv=[(60, 0)], logps_r=[(0, 0)])
    expected = math.exp(-50) - math.exp(-60)
    assert score_table(table, "lossdiff", beta=1, **PARAMS)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beta": 0}, "beta: got 0"),
        ({"validation": "x"}, "validation: unknown key; did you mean 'validation_policy'?"),
        ({"reference": None}, "reference"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(sided(logps_t=[(0, 0)]), "lossdiff", **{**PARAMS, **params})
    assert message in str(error.value)
