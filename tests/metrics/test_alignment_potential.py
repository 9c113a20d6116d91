"""Alignment potential: a plain re-implementation, and what it refuses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards

from prefsel.errors import UserError
from prefsel.metrics import score_table


def zscore_table(inputs: dict) -> pa.Table:
    """Means of log-probs, as sums over 3 and 7 tokens."""
    num_rows = len(inputs["reward_margin"])
    return pa.table(
        {
            "pair_id": list(range(num_rows)),
            "rm_a_chosen": inputs["reward_margin"],
            "rm_a_rejected": [0.0] * num_rows,
            "logps_p_chosen": [3 * mean for mean in inputs["mean_logps_chosen"]],
            "logps_p_rejected": [7 * mean for mean in inputs["mean_logps_rejected"]],
            "num_tokens_p_chosen": [3] * num_rows,
            "num_tokens_p_rejected": [7] * num_rows,
        }
    )


def test_group_spread_replaces_the_pair_margin() -> None:
    table = zscore_table(
        {
            "reward_margin": [9.0, 9.0, 9.0],  # must not be read
            "mean_logps_chosen": [-1.0, -2.0, -3.0],
            "mean_logps_rejected": [-1.5, -1.0, -1.0],
        }
    )
    table = table.append_column("rm_a_max", pa.array([0.17, 1.0, 0.5]))
    table = table.append_column("rm_a_min", pa.array([0.09, 0.2, 0.4]))
    found = score_table(table, "alignment_potential", rm="a", policy="p", spread="group")
    spread, margin = np.array([0.08, 0.8, 0.1]), np.array([0.5, 1.0, 2.0])
    expected = (spread - spread.mean()) / spread.std() - (margin - margin.mean()) / margin.std()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_disagreement_with_the_label_counts_against_a_pair_by_default() -> None:
    """Margins 3, 0 and -3 have mean 0 and std √6; the absolute ones 3, 0, 3 would put the first and the last together.

    Each mean log-prob margin is 1, 2 or 3 nats: z-scores -√1.5, 0 and √1.5, which are taken off.
    """
    inputs = {"reward_margin": [3.0, 0.0, -3.0], "mean_logps_chosen": [-1.0, -2.0, -3.0]}
    table = zscore_table({**inputs, "mean_logps_rejected": [-2.0, -4.0, -6.0]})
    found = score_table(table, "alignment_potential", rm="a", policy="p")
    np.testing.assert_allclose(found, [6**0.5, 0.0, -(6**0.5)], atol=1e-12)
    assert np.argsort(-found).tolist() == [0, 1, 2]
    absolute = score_table(table, "alignment_potential", rm="a", policy="p", sign="abs")
    np.testing.assert_allclose(absolute, [0.5**0.5 + 1.5**0.5, -(2**0.5), 0.5**0.5 - 1.5**0.5], atol=1e-12)


def test_moments_leave_out_incomplete_pairs() -> None:
    inputs = {
        "reward_margin": [0.1, -0.05, 0.2, 1e6],
        "mean_logps_chosen": [-0.5, -0.8, -0.4, None],
        "mean_logps_rejected": [-0.7, -0.72, -0.9, -0.9],
    }
    with_null = zscore_table({**inputs, "mean_logps_chosen": [-0.5, -0.8, -0.4, 0.0]})
    logps = pa.array([3 * -0.5, 3 * -0.8, 3 * -0.4, None])
    with_null = with_null.set_column(3, "logps_p_chosen", logps)
    found = score_table(with_null, "alignment_potential", rm="a", policy="p")
    assert np.isnan(found[3])
    alone = score_table(with_null[:3], "alignment_potential", rm="a", policy="p")
    assert found[:3].tolist() == alone.tolist()


def test_a_constant_column_is_an_error_not_nan() -> None:
    inputs = {"reward_margin": [0.1] * 3, "mean_logps_chosen": [-1.0, -2.0, -3.0], "mean_logps_rejected": [-1.0] * 3}
    with pytest.raises(UserError, match="alignment_potential: the explicit margin has zero variance"):
        score_table(zscore_table(inputs), "alignment_potential", rm="a", policy="p")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"form": "raw"}, "reference: form='raw' needs one"),
        ({"reference": "r"}, "belong to form='raw', got form='zscore'"),
        ({"beta": 0.1}, "belong to form='raw', got form='zscore'"),
        ({"form": "z-score"}, "form: got 'z-score'"),
        ({"weigth": 2.5}, "weigth: unknown key; did you mean 'weight'?"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(pa.table({"pair_id": [1]}), "alignment_potential", rm="a", policy="p", **params)
    assert message in str(error.value)


NAMES = [
    *("rm_a_chosen", "rm_a_rejected", "rm_a_max", "rm_a_min", "logps_p_chosen", "logps_p_rejected"),
    *("num_tokens_p_chosen", "num_tokens_p_rejected", "logps_r_chosen", "logps_r_rejected"),
]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 50),
    st.sampled_from([1, 3, 60]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from(["signed", "abs"]),
    st.sampled_from(["pair", "group"]),
    st.sampled_from(["zscore", "raw"]),
)
def test_equals_the_definition_for_any_sharding(
    num_rows: int, num_shards: int, weight: float, sign: str, spread: str, form: str
) -> None:
    columns = random_columns(NAMES, num_rows)
    ends = ("max", "min") if spread == "group" else ("chosen", "rejected")
    needed = [f"rm_a_{end}" for end in ends] + NAMES[4:6] + (NAMES[6:8] if form == "zscore" else NAMES[8:10])
    explicit, implicit, there = [], [], []
    for place, row in enumerate(rows_of(columns)):
        if any(row[name] is None for name in needed):
            continue
        there.append(place)
        margin = row[needed[0]] - row[needed[1]]
        explicit.append(abs(margin) if sign == "abs" and spread == "pair" else margin)
        chosen, rejected = row["logps_p_chosen"], row["logps_p_rejected"]
        if form == "zscore":
            implicit.append(abs(chosen / row["num_tokens_p_chosen"] - rejected / row["num_tokens_p_rejected"]))
        else:
            implicit.append(abs(0.3 * (chosen - row["logps_r_chosen"]) - 0.3 * (rejected - row["logps_r_rejected"])))
    assume(len(there) > 1)
    if form == "zscore":
        explicit, implicit = ([(v - np.mean(x)) / np.std(x) for v in x] for x in (explicit, implicit))
    expected = np.full(num_rows, np.nan)
    expected[there] = [e - weight * i for e, i in zip(explicit, implicit)]
    params = {"rm": "a", "policy": "p", "weight": weight, "sign": sign, "spread": spread, "form": form}
    params |= {"reference": "r", "beta": 0.3} if form == "raw" else {}
    found, _ = score_shards(float_table(columns), "alignment_potential", num_shards, **params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
