from __future__ import annotations

import math
from typing import Any

from prefsel.report import trained
from prefsel.report.tables import Table


def column(table: Table, title: str) -> list[Any]:
    place = list(table.columns).index(title)
    return [row[place] for row in table.rows]


def test_training_before_and_after(report: dict[str, Any]) -> None:
    found = trained.trainings(report["training"])
    assert column(found, "Accuracy before") == ["48.9 %", "48.9 %"]
    # 0.4885 + 0.0039 · 40 = 0.6445, of 348 pairs: √(0.6445 · 0.3555 / 348) = 0.02566
    assert column(found, "Accuracy after")[0] == "64.5 %"
    assert column(found, "s.e. (points)")[0] == "± 2.6"
    assert column(found, "Steps") == ["40", "40"]


def test_an_evaluation_that_is_not_of_step_0_is_not_before() -> None:
    before, after = trained.evaluated({"evaluations": [{"step": 20, "accuracy": 0.6}, {"step": 10, "accuracy": 0.5}]})
    assert before == {}
    assert after["accuracy"] == 0.6


def test_standard_error_of_a_coin() -> None:
    assert trained.standard_error({"accuracy": 0.5, "num_pairs": 100}) == 0.05
    assert trained.standard_error({"accuracy": math.nan, "num_pairs": 100}) is None
    assert trained.standard_error({"accuracy": 0.5, "num_pairs": 0}) is None


def test_a_failed_self_check_says_so() -> None:
    checks = [{"name": "a", "value": 0.7, "expected": 0.693147, "tolerance": 1e-4, "ok": False}]
    assert trained.self_checks({"self_checks": checks}).rows == [["a", "0.7", "0.693147", "0.0001", "FAILED"]]


def test_a_policy_that_starts_at_its_reference_is_recognised(report: dict[str, Any]) -> None:
    assert trained.starts_at_reference(report["training"])
    for one in report["training"]:
        one["evaluations"][0]["margin"] = 0.2
    assert not trained.starts_at_reference(report["training"])
