"""Evaluations on the page: what a row says, and that text of the corpus stays text."""

from __future__ import annotations

from typing import Any

from prefsel.report import evaluation_plots
from prefsel.report.evaluated import answers, judges, points, rewards
from prefsel.report.page import render


def estimate(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "num_items": 16, "num_prompts": 16}


def model(name: str, gain: float | None = None, **more: Any) -> dict[str, Any]:
    """What an evaluation of a model says, by one judge with rewards and by one that compares."""
    wins = {"raw": estimate(0.75, 0.6, 0.9), "length_controlled": estimate(0.7), "num_inconsistent": None}
    is_compared = gain is not None
    gold = {
        "reward": estimate(1.0 + (gain or 0.0), 0.5, 1.5),
        "reward_difference": estimate(gain, gain - 0.2, gain + 0.2) if gain is not None else None,
        "win_rate": wins if is_compared else None,
        "warnings": ["judge 'gold' also chose what …", "judge 'gold' says nothing of 2 of its 16 answers"],
        "kl": {"per_response": estimate(2.0)} if is_compared else None,
    }
    two = {"win_rate": wins | {"num_inconsistent": 4, "raw": estimate(0.55, 0.45, 0.65)}, "warnings": []}
    return {
        "model": name,
        "baseline": "base" if is_compared else None,
        "prompts": "holdout",
        "judges": {"gold": gold, "two": two} if is_compared else {"gold": gold},
        "overall": {
            "num_answers": 16,
            "tokens": estimate(12.0),
            "kl": {"per_response": estimate(2.0, 1.5, 2.5), "per_token": 0.1} if is_compared else None,
            "diversity": {
                "distinct": [estimate(0.5), estimate(0.9), None, None],
                "self_similarity": None,
                "repetition": estimate(0.25),
                "num_empty": 0,
            },
            "held_out": {"accuracy": estimate(0.6, 0.5, 0.7), "margin": estimate(0.3), "calibration_error": 0.1},
        },
        "answers": {name: {"asked": 18, "dropped": {"empty": 2}}},
        "examples": [],
        **more,
    }


FOUND = [model("base"), model("tuned", 0.5)]


def row(table: Any, number: int) -> dict[str, Any]:
    return dict(zip(table.columns, table.rows[number]))


def test_a_row_per_model_and_judge() -> None:
    table = rewards(FOUND)
    assert [(line[0], line[1]) for line in table.rows] == [("base", "gold"), ("tuned", "gold"), ("tuned", "two")]
    gold, two = row(table, 1), row(table, 2)
    assert (gold["Reward"], gold["Against"], gold["Difference"]) == ("1.500", "base", "+0.500")
    assert (gold["Its interval"], gold["Shown"]) == ("+0.300 to +0.700", "better")
    assert (gold["Wins"], gold["At equal lengths"]) == ("75.0 %", "70.0 %")
    assert gold["Note"] == "chose the pairs too; says nothing of 2 of its 16 answers"
    # A judge that compares: its interval holds one half.
    assert (two["Shown"], two["Note"]) == ("no difference shown", "25.0 % of the verdicts turn with the order")
    assert row(table, 0)["Shown"] == row(table, 0)["Wins"] == "–"


def test_a_row_per_model() -> None:
    tuned = row(answers(FOUND), 1)
    assert (tuned["KL per answer"], tuned["KL per token"], tuned["distinct-2"]) == ("2.000", "0.1000", "0.9000")
    assert (tuned["Left out"], tuned["Repeated"], tuned["Held-out accuracy"]) == ("2: 2 empty", "25.0 %", "60.0 %")
    assert "Self-similarity" not in tuned  # of one answer to a prompt there is none


def test_plots_know_who_was_compared() -> None:
    assert judges(FOUND) == ["gold"]
    base, tuned = points(FOUND, "gold")
    assert (base["kl"], base["difference"]) == (0.0, None)
    assert (tuned["kl"], tuned["difference"]["mean"]) == (2.0, 0.5)
    assert len(evaluation_plots.differences(FOUND)) == len(evaluation_plots.rewards_by_divergence(FOUND)) == 1
    assert evaluation_plots.differences(FOUND[:1]) == evaluation_plots.rewards_by_divergence(FOUND[:1]) == []


def test_rounds_have_a_course_when_there_are_two() -> None:
    played = [model("base"), *(model(f"arm-{number}", 0.1 * number, arm="arm", round=number) for number in (1, 2))]
    (drawing,) = evaluation_plots.rewards_by_round(played)
    assert "by round" in drawing
    assert "arm" in drawing
    assert evaluation_plots.rewards_by_round(played[:2]) == evaluation_plots.rewards_by_round(FOUND) == []


def test_round_zero_is_what_is_known_of_the_first_policy() -> None:
    def course(*others: dict[str, Any], first: str) -> list[tuple[int, float]]:
        played = [model(f"arm-{n}", 0.1 * n, arm="arm", round=n, first=first) for n in (1, 2)]
        found = evaluation_plots.gains_by_round([*others, *played], played, "gold")
        return [(number, gain["mean"]) for number, gain in found]

    assert course(model("base"), first="base") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    # Compared with another model than the rounds began with: no difference of 0, but the first policy's own.
    assert course(model("base"), first="sft") == [(1, 0.1), (2, 0.2)]
    assert course(model("base"), model("sft", -0.3), first="sft") == [(0, -0.3), (1, 0.1), (2, 0.2)]


def test_a_model_without_a_baseline_is_at_no_distance() -> None:
    assert [one["kl"] for one in points([*FOUND, model("alone")], "gold")] == [0.0, 2.0, None]


def test_a_rate_at_lengths_that_were_not_seen_is_told() -> None:
    found = model("tuned", 0.5)
    found["judges"]["gold"]["win_rate"] |= {"is_extrapolated": True}
    assert row(rewards([found]), 0)["Note"].endswith(
        "; one model's answers are all the longer ones: equal lengths were not seen"
    )


def test_answers_stay_text() -> None:
    example = {"prompt_id": "00", "prompt": "<b>?", "answer": "<script>x</script>", "baseline": "plain", "numbers": {}}
    page = render(
        {"run": {"run": "r"}, "stages": [], "evaluated": [model("base"), model("t", 0.5, examples=[example])]}
    )
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<script>x</script>" not in page
    assert 'id="evaluation"' in page
    assert "Answers of t beside those of base" in page
    assert "evaluation" not in render({"run": {"run": "r"}, "stages": []}).partition("<main>")[2]
