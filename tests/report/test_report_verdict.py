from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefsel.evaluate.intervals import Values
from prefsel.report import verdict

SELECTIONS = [{"name": name} for name in ("top", "top-random", "other")]
RANDOM = ["top-random", "drawn"]


def training(name: str, selection: str, *, num_pairs: int = 10, **settings: Any) -> dict[str, Any]:
    made = {"name": name, "selection": selection, "num_pairs": num_pairs, "model": "m", "reference": "m"}
    return made | {"settings": {"beta": 0.1, "seed": 0} | settings, "evaluations": [{"step": 0}]}


def values(*numbers: float) -> Values:
    items = [str(number) for number in range(len(numbers))]
    return Values(items, items, np.array(numbers, float))


def test_every_trained_selection_stands_beside_random_and_all() -> None:
    trainings = [
        training("a", "top"),
        training("r", "top-random"),
        training("everything", "all"),
        training("v", "validation"),
    ]
    accuracy = {"a": values(100, 100, 0, 100), "r": values(0, 100, 0, 0), "everything": values(100, 100, 0, 100)}
    found = verdict.comparisons(trainings, RANDOM, {"accuracy": accuracy})
    assert [(one["training"], one["control"], one["against"]) for one in found] == [
        ("a", "random", "r"), ("a", "all", "everything")
    ]  # fmt: skip
    assert found[0]["difference"]["mean"] == 50  # (100 + 0 + 0 + 100) / 4
    assert found[0]["unlike"] == []
    assert verdict.judgement(found[1]["difference"]) == "no difference shown"  # all differences are 0
    table = verdict.compared(found)
    assert [row[:3] for row in table.rows] == [["top", "random: r", "accuracy"], ["top", "all: everything", "accuracy"]]
    assert table.rows[0][3] == "+50.0"
    assert table.rows[0][-1] == "few prompts: a rough interval"


def test_what_is_drawn_at_random() -> None:
    kinds = {"random-map": "random", "map": "alignment_potential"}
    by_map, by_chance = ({"kind": "top", "score": f"score_{name}", "ratio": 0.3} for name in ("map", "random-map"))
    drawn = {"kind": "random", "scores": ["score_map"], "count": 3}
    assert not verdict.drawn_at_random(by_map, kinds)
    assert verdict.drawn_at_random(by_chance, kinds)
    assert verdict.drawn_at_random(drawn, kinds)
    # The control of a dedupe draws from one pair of each prompt.
    assert verdict.drawn_at_random({"kind": "dedupe", "by": "prompt", "rule": drawn}, kinds)
    assert not verdict.drawn_at_random({"kind": "dedupe", "by": "prompt", "rule": by_map}, kinds)
    assert not verdict.drawn_at_random({"kind": "intersect", "rules": [by_map, by_map]}, kinds)


def test_the_control_is_the_one_most_alike() -> None:
    ours = training("a", "top", learning_rate=1e-4)
    own_control = training("own", "top-random", learning_rate=5e-4)
    alike = training("alike", "drawn", learning_rate=1e-4, num_pairs=99)
    trainings = [ours, own_control, alike]
    assert verdict.control_of(ours, "random", trainings, RANDOM) is alike
    assert verdict.unlike(ours, own_control) == ["learning_rate"]
    own_control["settings"]["learning_rate"] = 1e-4
    assert verdict.control_of(ours, "random", trainings, RANDOM) is own_control
    assert verdict.control_of(ours, "all", trainings, RANDOM) is None
    # What moves no weight makes no difference.
    own_control["settings"] |= {"workers": 4, "token_budget": 1}
    assert verdict.unlike(ours, own_control) == []


def test_other_settings_are_told() -> None:
    trainings = [training("a", "top", beta=0.5), training("r", "top-random", seed=1)]
    found = verdict.comparisons(trainings, RANDOM, {"accuracy": {"a": values(1, 2), "r": values(0, 2)}})
    assert found[0]["unlike"] == ["beta", "seed"]
    assert "other settings: beta, seed" in verdict.compared(found).rows[0][-1]
    assert list(verdict.clauses({"name": "top"}, found)) == ["a against random (other settings: beta, seed)"]


def test_two_models_of_one_selection_are_told_apart() -> None:
    trainings = [training("a", "top"), training("b", "top"), training("r", "top-random")]
    measures = {"accuracy": {name: values(0, 100) for name in "abr"}}
    table = verdict.compared(verdict.comparisons(trainings, RANDOM, measures))
    assert [row[1] for row in table.rows] == ["a", "b"]
    assert list(table.columns)[:2] == ["Selection", "Model"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 2.0, "better"),
        (-2.0, -0.1, "worse"),
        (-0.1, 2.0, "no difference shown"),
        (0.0, 2.0, "no difference shown"),
        (-2.0, 0.0, "no difference shown"),
        (None, None, "cannot be told"),
    ],
)
def test_what_a_difference_shows(low: float | None, high: float | None, expected: str) -> None:
    assert verdict.judgement({"mean": 1.0, "low": low, "high": high}) == expected
    assert verdict.judgement(None) == "cannot be told"


def test_without_margins_there_is_no_difference_and_it_says_so() -> None:
    trainings = [training("a", "top"), training("r", "top-random"), training("e", "all")]
    found = verdict.comparisons(trainings, RANDOM, {"accuracy": {"r": values(1, 2)}})
    assert [one["difference"] for one in found] == [None, None]
    assert [row[-1] for row in verdict.compared(found).rows] == ["cannot be told"] * 2
    told = list(verdict.not_shown(SELECTIONS[:2], trainings, RANDOM, found))
    assert len(told) == 1
    assert told[0].startswith("No paired difference for a: ")


def test_clauses_of_one_selection() -> None:
    trainings = [training("a", "top"), training("r", "top-random")]
    many = np.arange(100.0)
    measures = {
        "gold": {"a": values(*(many + 1 + many % 2)), "r": values(*many)},
        "accuracy, points": {"a": values(*many), "r": values(*many)},
    }
    found = verdict.comparisons(trainings, RANDOM, measures)
    assert verdict.clauses({"name": "top"}, found) == {
        "a against random": [("better", "in gold (+1.50)"), ("no difference shown", "in accuracy, points (0.00)")]
    }
    assert verdict.clauses({"name": "other"}, found) == {}


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        ({"mean": 50.0, "low": 40.0, "high": 60.0}, []),
        ({"mean": 55.0, "low": 40.0, "high": 70.0}, []),
        (
            {"mean": 48.4, "low": 40.0, "high": 56.8},
            ["m orders 48.4 % of pairs as they are labelled, below a coin's 50 %; its 95 % interval holds 50 %, "
             "so this may be chance."],
        ),
        (
            {"mean": 30.0, "low": 20.0, "high": 40.0},
            ["m orders 30.0 % of pairs as they are labelled, below a coin's 50 %; "
             "its whole 95 % interval lies below."],
        ),
        ({}, []),
        (None, []),
    ],
)  # fmt: skip
def test_below_chance(held_out: Any, told: list[str]) -> None:
    assert list(verdict.below_chance("m", held_out, "pairs")) == told


def test_what_was_not_measured() -> None:
    def told(*trainings: dict[str, Any]) -> list[str]:
        return list(verdict.not_shown(SELECTIONS, trainings, RANDOM, []))

    assert told() == ["No model was trained on a selection: nothing here says whether one is worth training on."]
    assert told(training("r", "top-random")) == told()
    assert told(training("a", "top")) == [
        "No model was trained on top-random, other.",
        "No model was trained on pairs drawn at random: nothing is compared with random.",
        "No model was trained on all eligible pairs: nothing is compared with training on everything.",
    ]
    everything = [training(name, name) for name in ("top", "top-random", "other", "all")]
    assert told(*everything) == []
    everything[0]["evaluations"] = []
    assert told(*everything) == [
        "Without held-out pairs (split.holdout, max_eval_pairs) nothing was measured of top."
    ]  # fmt: skip


def test_long_lists_are_cut() -> None:
    assert verdict.listed([str(n) for n in range(8)]) == "0, 1, 2, 3, 4, 5 and 2 more"
