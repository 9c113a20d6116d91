"""SelectiveDPO: both ways to the held-out losses, and how their columns are found."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import METRICS, score_table
from prefsel.metrics.selective_dpo import SelectiveDpo

POLICIES = ["cross-a", "cross-b", "cross-c"]
NAMES = [f"logps_{model}_{side}" for model in [*POLICIES, "r"] for side in ("chosen", "rejected")]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.integers(1, 3))
def test_mean_of_given_losses(num_rows: int, num_shards: int, seeds: int) -> None:
    columns = random_columns([f"held_{seed}" for seed in range(3)], num_rows)
    expected = []
    for row in rows_of(columns):
        losses = [row[f"held_{seed}"] for seed in range(seeds)]
        expected.append(math.nan if None in losses else -sum(losses) / seeds)
    found, _ = score_shards(float_table(columns), "selective_dpo", num_shards, losses="held", seeds=seeds)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.integers(1, 3), st.sampled_from([0.1, 1.0]))
def test_mean_of_losses_from_log_probs(num_rows: int, num_shards: int, num_policies: int, beta: float) -> None:
    columns, policies = random_columns(NAMES, num_rows), POLICIES[:num_policies]
    expected = []
    for row in rows_of(columns):
        needed = [row[f"logps_{model}_{side}"] for model in [*policies, "r"] for side in ("chosen", "rejected")]
        if None in needed:
            expected.append(math.nan)
            continue
        losses = []
        for policy in policies:
            chosen, rejected = (
                row[f"logps_{policy}_{side}"] - row[f"logps_r_{side}"] for side in ("chosen", "rejected")
            )
            losses.append(math.log(1 + math.exp(-beta * (chosen - rejected))))
        expected.append(-sum(losses) / num_policies)
    params = {"policies": policies, "reference": "r", "beta": beta}
    found, _ = score_shards(float_table(columns), "selective_dpo", num_shards, **params)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(found, score_table(float_table(columns), "selective_dpo", **params))


def test_both_forms_agree() -> None:
    table = float_table(random_columns(NAMES, 30, nulls=0.0))
    for place, policy in enumerate(POLICIES[:2]):
        margin_N = score_table(table, "implicit_margin", policy=policy, reference="r")
        table = table.append_column(f"loss_{place}", pa.array(np.log1p(np.exp(-margin_N))))
    from_losses = score_table(table, "selective_dpo", losses="loss")
    from_logps = score_table(table, "selective_dpo", policies=POLICIES[:2], reference="r")
    np.testing.assert_allclose(from_losses, from_logps, rtol=1e-12)


def test_the_columns_of_a_table_are_counted() -> None:
    columns = {f"loss_{seed}": [float(seed)] for seed in range(11)}
    others = {"loss_mean": [9.0], "loss_1_chosen": [9.0], "my_loss_0": [9.0], "loss_07": [9.0], "losss_0": [9.0]}
    table = pa.table({**others, **columns})
    assert score_table(table, "selective_dpo", losses="loss").tolist() == [-5.0]
    assert score_table(table, "selective_dpo", losses="loss", seeds=2).tolist() == [-0.5]
    # A prefix is text, not a pattern.
    with pytest.raises(UserError, match="got the columns none"):
        score_table(table, "selective_dpo", losses="l.ss")


def test_a_gap_in_the_columns_is_refused() -> None:
    with pytest.raises(UserError, match=r"got the columns l_0, l_2; valid: l_0, l_1, … with no gap"):
        score_table(pa.table({"l_0": [1.0], "l_2": [1.0]}), "selective_dpo", losses="l")
    with pytest.raises(UserError, match=r"missing columns l_1$"):
        score_table(pa.table({"l_0": [1.0]}), "selective_dpo", losses="l", seeds=2)


def test_without_a_table_the_number_of_seeds_must_be_given() -> None:
    with pytest.raises(UserError, match="selective_dpo: seeds: how many columns of losses"):
        METRICS["selective_dpo"].columns(SelectiveDpo(losses="l"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of losses and policies: got losses=None, policies=None"),
        ({"losses": "l", "policies": ["p"], "reference": "r"}, "exactly one of losses and policies"),
        ({"losses": "l", "beta": 0.1}, "beta: belong to policies"),
        ({"losses": "l", "reference": "r"}, "reference: belong to policies"),
        ({"policies": ["p"], "reference": "r", "seeds": 2}, "seeds: belong to losses"),
        ({"policies": ["p"]}, "reference: policies need one"),
        ({"policies": []}, "policies"),
        ({"losses": "l", "seeds": 0}, "seeds: got 0"),
        ({"policies": ["p"], "reference": "r", "beta": 0}, "beta: got 0"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(sided(logps_p=[(0, 0)], logps_r=[(0, 0)]), "selective_dpo", **params)
    assert message in str(error.value)
