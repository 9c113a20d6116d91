from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.train.calibration import calibration, holdout_report

MARGINS = st.lists(st.floats(-30, 30) | st.just(0.0), min_size=1, max_size=60)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_a_table_that_can_be_checked_by_eye() -> None:
    # Confidences 0.62 (right), 0.63 (wrong), 0.91 (right), 0.93 (right): bins [0.6, 0.65) and [0.9, 0.95).
    table = calibration(np.array([logit(0.62), -logit(0.63), logit(0.91), logit(0.93)]))
    filled = {entry["low"]: entry for entry in table["bins"] if entry["num_pairs"]}
    assert [(entry["low"], entry["high"]) for entry in table["bins"]] == [
        *[(0.5, 0.55), (0.55, 0.6), (0.6, 0.65), (0.65, 0.7), (0.7, 0.75)],
        *[(0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1.0)],
    ]
    assert filled[0.6] == {
        "low": 0.6,
        "high": 0.65,
        "num_pairs": 2,
        "confidence": pytest.approx(0.625),
        "accuracy": 0.5,
    }
    assert filled[0.9] == {"low": 0.9, "high": 0.95, "num_pairs": 2, "confidence": pytest.approx(0.92), "accuracy": 1.0}
    assert len(filled) == 2
    assert table["bins"][0]["confidence"] is None
    assert table["bins"][0]["accuracy"] is None
    assert table["expected_error"] == pytest.approx((2 * 0.125 + 2 * 0.08) / 4)


@given(MARGINS.map(lambda margins: [margin or 1.0 for margin in margins]))
def test_it_is_the_error_of_every_pair_shown_in_both_orders(margins: list[float]) -> None:
    """The usual expected calibration error of a binary prediction, 20 bins of [0, 1], by a loop over pairs."""
    shown = [(m, 1.0) for m in margins] + [(-m, 0.0) for m in margins]
    bins: dict[int, list[tuple[float, float]]] = {}
    for m, outcome in shown:
        # By the distance from one half, so that a pair and its mirror image are never rounded into different bins.
        probability = 1 / (1 + math.exp(-m))
        distance = min(9, sum(0.5 + k / 20 <= 1 / (1 + math.exp(-abs(m))) for k in range(1, 10)))
        bins.setdefault(distance if m > 0 else -1 - distance, []).append((probability, outcome))
    error = sum(abs(sum(p - o for p, o in members)) for members in bins.values()) / len(shown)
    assert calibration(np.array(margins))["expected_error"] == pytest.approx(error, abs=1e-12)


def test_a_model_without_an_opinion_is_calibrated_and_a_wrong_one_is_not() -> None:
    assert calibration(np.zeros(5))["expected_error"] == 0.0
    assert calibration(np.full(5, -40.0))["expected_error"] == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.5, 1.0, size=100_000)
    margins = np.log(probability / (1 - probability)) * np.where(rng.random(100_000) < probability, 1, -1)
    assert calibration(margins)["expected_error"] < 0.01
    assert calibration(3 * margins)["expected_error"] > 0.1


@given(MARGINS.filter(lambda margins: len(margins) > 1), st.randoms(use_true_random=False))
def test_the_report_is_a_loop_over_pairs(margins: list[float], random) -> None:
    lengths = [random.randint(-3, 3) for _ in margins]
    report = holdout_report(np.array(margins), np.array(lengths, dtype=float))
    assert report is not None
    sides = {True: [], False: []}
    for margin, length in zip(margins, lengths):
        sides[length >= 0].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    assert report["num_pairs"] == len(margins)
    assert report["accuracy"] == pytest.approx(sum(map(sum, sides.values())) / len(margins))
    for side, name in ((True, "longer"), (False, "shorter")):
        assert report[f"num_{name}_chosen"] == len(sides[side])
        mean = sum(sides[side]) / len(sides[side]) if sides[side] else None
        assert report[f"accuracy_{name}_chosen"] == (None if mean is None else pytest.approx(mean))
    losses = [max(0.0, -m) + math.log1p(math.exp(-abs(m))) for m in margins]
    assert report["loss"] == pytest.approx(sum(losses) / len(losses))


def test_length_correlation() -> None:
    report = holdout_report(np.array([1.0, 2.0, 3.0, -1.0]), np.array([2.0, 4.0, 6.0, -2.0]))
    assert report is not None
    assert report["length_correlation"] == pytest.approx(1.0)
    constant = holdout_report(np.array([0.1, 0.1, 0.1]), np.array([1.0, 2.0, 3.0]))
    assert constant is not None
    assert constant["length_correlation"] is None


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_one_pair_says_nothing(num_pairs: int) -> None:
    assert holdout_report(np.ones(num_pairs), np.ones(num_pairs)) is None
