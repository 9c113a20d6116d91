"""Alignment potential: golden examples, a plain re-implementation, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prefsel.errors import UserError
from prefsel.metrics import score_table
from prefsel.select import select_table


def golden(shared: Path, name: str) -> dict:
    return next(row for row in json.loads((shared / "golden/golden.json").read_text()) if row["id"] == name)


def zscore_table(inputs: dict) -> pa.Table:
    """The example's means, as sums over 3 and 7 tokens."""
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


@pytest.mark.parametrize("name", ["map-zscore-w1", "map-zscore-w2.5", "map-signed-mixed", "map-abs-mixed"])
def test_golden_zscore(shared: Path, name: str) -> None:
    example = golden(shared, name)
    table = zscore_table(example["inputs"])
    found = score_table(table, "alignment_potential", rm="a", policy="p", **example["params"])
    np.testing.assert_allclose(found, example["expected"]["score"], atol=example["atol"])
    if "top2" in example["expected"]:
        rule = {"kind": "top", "score": "m_ap", "ratio": "0.4"}
        assert select_table(table.append_column("m_ap", pa.array(found)), rule).tolist() == example["expected"]["top2"]


def test_golden_raw(shared: Path) -> None:
    example = golden(shared, "map-raw")
    columns = {}
    for place, side in enumerate(("chosen", "rejected")):
        columns[f"rm_a_{side}"] = [float(example["inputs"]["reward"][place])]
        columns[f"logps_p_{side}"] = [float(example["inputs"]["logps_policy"][place])]
        columns[f"logps_r_{side}"] = [float(example["inputs"]["logps_reference"][place])]
    params = {"rm": "a", "policy": "p", "reference": "r", **example["params"]}
    found = score_table(pa.table(columns), "alignment_potential", **params)
    assert found.tolist() == pytest.approx([example["expected"]["score"]], abs=example["atol"])


def test_group_spread_replaces_the_pair_margin(shared: Path) -> None:
    example = golden(shared, "map-group-spread")
    rewards = example["inputs"]["rewards"]
    assert max(rewards) - min(rewards) == pytest.approx(example["expected"]["spread"])
    table = zscore_table(
        {
            "reward_margin": [9.0, 9.0, 9.0],  # must not be read
            "mean_logps_chosen": [-1.0, -2.0, -3.0],
            "mean_logps_rejected": [-1.5, -1.0, -1.0],
        }
    )
    table = table.append_column("rm_a_max", pa.array([max(rewards), 1.0, 0.5]))
    table = table.append_column("rm_a_min", pa.array([min(rewards), 0.2, 0.4]))
    found = score_table(table, "alignment_potential", rm="a", policy="p", spread="group")
    spread, margin = np.array([0.08, 0.8, 0.1]), np.array([0.5, 1.0, 2.0])
    expected = (spread - spread.mean()) / spread.std() - (margin - margin.mean()) / margin.std()
    np.testing.assert_allclose(found, expected, atol=1e-12)


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
        ({"weigth": 2.5}, "weigth: unknown; did you mean 'weight'?"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(pa.table({"pair_id": [1]}), "alignment_potential", rm="a", policy="p", **params)
    assert message in str(error.value)
