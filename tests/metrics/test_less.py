"""LESS: largest cosine over subtasks, averaged over checkpoints, and the Adam update it is about."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards

from prefsel.errors import UserError
from prefsel.metrics import score_table
from prefsel.metrics.less import adam_feature

TANGENTS = ["c0-math", "c0-code", "c1-math", "c1-code"]


def corpus(num_rows: int) -> dict[str, list]:
    """Inner products and positive norms, with nulls."""
    columns = random_columns([f"gamma_{what}_{t}" for t in TANGENTS for what in ("dot", "norm")], num_rows)
    return {
        name: [None if v is None else abs(v) + 0.1 for v in values] if "_norm_" in name else values
        for name, values in columns.items()
    }


def naive(row: dict, checkpoints: list[tuple[list[str], float]]) -> float:
    """Weighted mean over checkpoints of the largest cosine."""
    total = weights = 0.0
    for tangents, learning_rate in checkpoints:
        cosines = []
        for tangent in tangents:
            dot, norm = row[f"gamma_dot_{tangent}"], row[f"gamma_norm_{tangent}"]
            if dot is None or norm is None:
                return math.nan
            cosines.append(dot / norm)
        total += learning_rate * max(cosines)
        weights += learning_rate
    return total / weights


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.integers(1, 4))
def test_largest_cosine_over_subtasks(num_rows: int, num_shards: int, num_subtasks: int) -> None:
    columns, tangents = corpus(num_rows), TANGENTS[:num_subtasks]
    found, _ = score_shards(float_table(columns), "less", num_shards, tangent=tangents)
    np.testing.assert_allclose(found, [naive(row, [(tangents, 1.0)]) for row in rows_of(columns)], rtol=1e-12)
    if num_subtasks == 1:
        np.testing.assert_array_equal(found, score_table(float_table(columns), "less", tangent=tangents[0]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.sampled_from([2e-5, 1e-6, 3.0]))
def test_checkpoints_are_averaged_by_learning_rate(num_rows: int, num_shards: int, learning_rate: float) -> None:
    columns = corpus(num_rows)
    checkpoints = [(TANGENTS[:2], learning_rate), (TANGENTS[2:], 1e-5), (TANGENTS[1:2], 5e-6)]
    given_as = [{"tangents": tangents, "learning_rate": rate} for tangents, rate in checkpoints]
    found, _ = score_shards(float_table(columns), "less", num_shards, checkpoints=given_as)
    expected = [naive(row, checkpoints) for row in rows_of(columns)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_feature_is_the_update_that_adam_would_make() -> None:
    """PyTorch's Adam takes the step; without bias correction, and with epsilon so small that its place is no matter."""
    generator = torch.Generator().manual_seed(0)
    m, v, g = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    v = v.square()
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999), eps=0.0)
    late = 10**6  # bias corrections are 1 to the last bit
    optimizer.state[parameter] = {"step": torch.tensor(float(late)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    parameter.grad = g
    optimizer.step()
    feature = adam_feature(m.numpy(), v.numpy(), g.numpy(), eps=1e-30)
    np.testing.assert_allclose(-parameter.detach().numpy(), feature, rtol=1e-12)


def test_epsilon_is_inside_the_root() -> None:
    feature = adam_feature(np.zeros(1), np.zeros(1), np.array([1e-6]), betas=(0.5, 0.75), eps=1e-8)
    assert feature[0] == pytest.approx(0.5e-6 / math.sqrt(0.25e-12 + 1e-8), rel=1e-12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of tangent and checkpoints"),
        ({"tangent": "t", "checkpoints": [{"tangents": ["t"], "learning_rate": 1}]}, "exactly one of tangent and"),
        ({"checkpoints": []}, "checkpoints"),
        ({"checkpoints": [{"tangents": ["t"], "learning_rate": 0}]}, "checkpoints.0.learning_rate: got 0"),
        ({"tangent": "t"}, "gamma_norm_t: 2 of 3 pairs have a norm of -1; valid: above 0"),
        ({"tangent": "u"}, "missing columns gamma_dot_u (made by a scorer of kind pair_gradients)"),
    ],
)
def test_what_does_not_fit_is_refused(params: dict, message: str) -> None:
    table = pa.table({"gamma_dot_t": [1.0, 0.0, 1.0], "gamma_norm_t": [2.0, 0.0, -1.0]})
    with pytest.raises(UserError) as error:
        score_table(table, "less", **params)
    assert message in str(error.value)
