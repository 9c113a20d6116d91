from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from prefsel.report import trained
from prefsel.report.tables import Table
from prefsel.train.heldout import MARGINS
from prefsel.workspace.manifest import StageReport


def column(table: Table, title: str) -> list[Any]:
    place = list(table.columns).index(title)
    return [row[place] for row in table.rows]


def test_training_before_and_after(report: dict[str, Any]) -> None:
    found = trained.trainings(report["training"])
    assert column(found, "Accuracy before") == ["48.9 %", "48.9 %"]
    # 0.4885 + 0.0039 · 40 = 0.6445, and 5.5 points to each side
    assert column(found, "Accuracy after")[0] == "64.5 %"
    assert column(found, "95 % interval")[0] == "59.0 % to 70.0 %"
    assert column(found, "Steps") == ["40", "40"]


def test_an_evaluation_that_is_not_of_step_0_is_not_before() -> None:
    before, after = trained.evaluated({"evaluations": [{"step": 20, "accuracy": 0.6}, {"step": 10, "accuracy": 0.5}]})
    assert before == {}
    assert after["accuracy"] == 0.6


def test_without_margins_the_interval_is_that_of_a_share(report: dict[str, Any]) -> None:
    coin = trained.share_estimate({"accuracy": 0.5, "num_pairs": 100})
    assert coin == {
        "mean": 50.0, "low": pytest.approx(50 - 1.96 * 5, abs=1e-3), "high": pytest.approx(50 + 1.96 * 5, abs=1e-3),
        "num_items": 100,
    }  # fmt: skip
    for evaluation in ({"accuracy": math.nan, "num_pairs": 100}, {"accuracy": 0.5, "num_pairs": 0}, {}):
        assert trained.share_estimate(evaluation) == {}
    del report["training"][0]["held_out"]
    found = trained.trainings(report["training"])
    # √(0.6445 · 0.3555 / 348) = 0.02566
    assert column(found, "95 % interval")[0] == "59.4 % to 69.5 %"
    assert trained.held_out(report["training"][0], None)["after"]["mean"] == pytest.approx(64.45)


def margins() -> pa.Table:
    rows = [("a", "1", 0.0, 0.5), ("b", "1", 0.0, -0.5), ("c", "2", -1e-9, 0.0), ("d", "3", 2.0, 1.0)]
    return pa.table(dict(zip(MARGINS.names, zip(*rows))), schema=MARGINS)


def test_accuracy_per_pair_counts_ties_half() -> None:
    assert trained.accuracies(margins(), "before").value_N.tolist() == [50, 50, 0, 100]
    assert trained.accuracies(margins(), "after").value_N.tolist() == [100, 0, 50, 100]
    found = trained.held_out({"evaluations": [{"step": 0, "accuracy": 0.9, "num_pairs": 4}]}, margins())
    assert (found["before"]["mean"], found["after"]["mean"]) == (50, 62.5)
    assert (found["after"]["num_items"], found["after"]["num_prompts"]) == (4, 3)


def test_reward_models_have_a_row_each() -> None:
    details = {"holdout_before": {"accuracy": 0.5}, "holdout_after": {"accuracy": 0.75, "num_pairs": 8}}
    found = trained.reward_table(
        [StageReport("reward", "rm", "pairs", 4, 4, {}, 1, 1, 1.0, "models/rm@0", "0", details)]
    )
    assert found is not None
    assert found["rows"][0][:5] == ["rm", 4, 8, 0.5, 0.75]
    assert trained.reward_table([]) is None


def test_warnings_of_a_stage() -> None:
    details = {"warnings": ["a"], "sampling": {"warnings": ["b"]}, "padded_because": "c"}
    report = StageReport("metric", "m", "pairs", 0, 0, {}, 1, 1, 1.0, "scores/m@0", "0", details)
    assert list(trained.stage_warnings(report)) == ["a", "b", "rows are padded, not packed: c"]


def test_a_failed_self_check_says_so() -> None:
    checks = [{"name": "a", "value": 0.7, "expected": 0.693147, "tolerance": 1e-4, "ok": False}]
    assert trained.self_checks({"self_checks": checks}).rows == [["a", "0.7", "0.693147", "0.0001", "FAILED"]]


def test_a_policy_that_starts_at_its_reference_is_recognised(report: dict[str, Any]) -> None:
    assert trained.starts_at_reference(report["training"])
    for one in report["training"]:
        one["evaluations"][0]["margin"] = 0.2
    assert not trained.starts_at_reference(report["training"])


def test_an_interval_of_a_share_holds_shares_alone() -> None:
    """Three of four pairs: 75 ± 1.96 · √(0.75 · 0.25 / 4) = 75 ± 42.4 per cent."""
    found = trained.share_estimate({"accuracy": 0.75, "num_pairs": 4})
    assert found["low"] == pytest.approx(75 - 42.43, abs=0.01)
    assert found["high"] == 100.0
    assert trained.share_estimate({"accuracy": 0.25, "num_pairs": 4})["low"] == 0.0
