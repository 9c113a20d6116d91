from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from prefsel.errors import NonFiniteError, UserError
from prefsel.evaluate.judges import (
    ColumnJudge,
    PairwiseJudge,
    RewardJudge,
    checked,
    gold_judge,
    judged_before,
    load_judge,
    preferences_of,
    question_of,
    rewards_of,
)
from prefsel.world.gold import gold

PROMPT = "tell me about the apple ."


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_gold_is_that_of_the_world_for_text_and_for_messages() -> None:
    answer = "sure , the apple is red ."
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    found = rewards_of(gold_judge(), [PROMPT, turns], [answer, answer], ["a", "b"])
    assert found.tolist() == [gold(PROMPT, answer)] * 2


def test_a_function_of_the_users_is_loaded_by_name() -> None:
    judge = load_judge("judge_functions:shorter", "reward")
    assert isinstance(judge, RewardJudge)
    assert rewards_of(judge, ["p", "p"], ["four", "a"], ["p", "p"]).tolist() == [-4.0, -1.0]
    pairwise = load_judge("judge_functions:shorter_of_two", "pairwise")
    assert isinstance(pairwise, PairwiseJudge)
    assert preferences_of(pairwise, ["p"] * 3, ["a", "bb", "c"], ["aa", "b", "d"], list("pqr")).tolist() == [1, 0, 0.5]


def test_its_identity_is_that_of_its_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    identities = []
    for text in ("return [1.0 for a in answers]", "return [2.0 for a in answers]"):
        (tmp_path / "changing_judge.py").write_text(f"def judge(prompts, answers):\n    {text}\n")
        sys.modules.pop("changing_judge", None)
        identities.append(load_judge("changing_judge:judge", "reward").identity)
    assert identities[0] != identities[1]
    assert load_judge("changing_judge:judge", "reward").identity == identities[1]
    sys.modules.pop("changing_judge", None)


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("judge_functions", "reward", "valid: package.module:function"),
        ("no_such_module:judge", "reward", "it cannot be imported: No module named"),
        ("judge_functions:none", "reward", "it cannot be imported: .*has no attribute 'none'"),
        ("judge_functions:number", "reward", "3 is not a callable object"),
        ("judge_functions:shorter", "pairwise", r"3 lists \(prompts, answers_a, answers_b\)"),
        ("judge_functions:shorter", "gold", "judge kind: got 'gold'; valid: reward, pairwise"),
    ],
)
def test_what_is_no_judge_is_refused(path: str, kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_judge(path, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([1.0], UserError, "it gave 1 rewards; valid: 2, one per row"),
        (7.0, UserError, "it gave one number rewards; valid: 2"),
        ([[1.0], [2.0]], UserError, "it gave 2 × 1 rewards"),
        (["good", "bad"], UserError, "its rewards are no numbers"),
        ([1.0, float("nan")], NonFiniteError, r"1 rewards are NaN or infinite, first for prompts \['b'\]"),
        ([float("inf"), 0.0], NonFiniteError, r"first for prompts \['a'\]"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(given: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        rewards_of(RewardJudge("bad", "1", lambda prompts, answers: given), ["A", "B"], ["x", "y"], ["a", "b"])


def test_preferences_beyond_0_to_1_are_refused_by_name() -> None:
    judge = PairwiseJudge("bad", "1", lambda prompts, first, second: [0.5, 1.5])
    with pytest.raises(UserError, match=r"1 preferences lie outside 0 to 1, first 1\.5 for prompt b"):
        preferences_of(judge, ["A", "B"], ["x", "y"], ["z", "w"], ["a", "b"])


def test_numbers_of_a_column_are_checked_alike() -> None:
    assert checked("rm", "rewards", np.array([1, 2]), ["a", "b"]).dtype == np.float64
    with pytest.raises(NonFiniteError, match="judge 'rm'"):
        checked("rm", "rewards", [None, 1.0], ["a", "b"])


def test_a_judge_that_chose_the_pairs_is_named() -> None:
    judge = ColumnJudge("rm", "rm@0f")
    assert judged_before(judge, {"score_margin": "rm@0f", "score_other": "rm@1e"}).startswith(
        "judge 'rm' also chose what the model was trained on (score_margin):"
    )
    assert judged_before(judge, {"score_other": "rm@1e"}) == ""


def test_a_prompt_that_asks_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"no user message with a text among the roles \['system'\]"):
        question_of([{"role": "system", "content": "x"}])
