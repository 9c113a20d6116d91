"""Reasons by the text alone: every one by an example that has it and one that just has not."""

from __future__ import annotations

import dataclasses

import pytest

from prefsel.generate.quality import ends_in_loop, repetition, why_unused
from prefsel.reasons import meaning


@dataclasses.dataclass
class Said:
    text: str
    stop: str = "end"


WORDS = [f"w{number}" for number in range(1000)]
FRESH = " ".join(WORDS[:100])


def test_every_reason_has_a_response_and_a_meaning():
    responses = [
        Said("a fine answer"),
        Said(""),
        Said(" \n"),
        Said("a fine answer"),
        Said("cut here", "length"),
        Said("", "poisoned"),
        Said("no " * 200),
    ]
    reasons = why_unused(responses, drop_cut=True)
    assert reasons == [None, "empty", "empty", "duplicate_response", "cut_off", "poisoned", "repetitive"]
    assert all(meaning(reason) for reason in reasons if reason)


def test_what_is_not_asked_for_is_not_looked_at():
    responses = [Said("cut here", "length"), Said("no " * 200), Said("Here is the new prompt: why?")]
    assert why_unused(responses, max_repetition=None) == [None, None, None]


def test_the_first_of_equal_responses_stays_and_a_bad_one_keeps_its_own_reason():
    assert why_unused([Said("x"), Said("y"), Said("x"), Said("x")]) == [None, None, *["duplicate_response"] * 2]
    assert why_unused([Said("no " * 200), Said("no " * 200)]) == ["repetitive", "repetitive"]


def test_a_response_is_no_duplicate_of_one_that_is_not_kept():
    responses = [Said("Yes.", "length"), Said("Yes."), Said("Yes.")]
    assert why_unused(responses, drop_cut=True) == ["cut_off", None, "duplicate_response"]
    assert why_unused(responses) == [None, *["duplicate_response"] * 2]


TABLE = """The rows of the table of all employees:

+----+----------+--------+
| id | name     | salary |
+----+----------+--------+
|  1 | Alice    |  50000 |
|  2 | Bob      |  61000 |
+----+----------+--------+"""
PADDED = f"""| Feature | Basic | Pro |
|{"-" * 40}|{"-" * 30}|{"-" * 30}|
| Storage | 10 GB | 1 TB |
| Users | 1 | unlimited |"""
HEADINGS = f"RESUME\n{'=' * 60}\nName: Ada\n{'=' * 60}\nWork: mathematics and engines, taught by others.\n{'-' * 60}"
CONTENTS = f"1. Introduction {'.' * 40} 3\n2. Methods {'.' * 46} 7\n3. Results {'.' * 46} 12"


@pytest.mark.parametrize("text", [TABLE, PADDED, HEADINGS, CONTENTS])
def test_drawn_lines_are_no_repetition(text):
    assert why_unused([Said(text)]) == [None]


@pytest.mark.parametrize("text", ["!" * 200, "." * 200, "=" * 121, "- " * 40, f"so it is {'-' * 200}", "a-" * 40])
def test_a_model_that_says_one_mark_only_is_found(text):
    assert why_unused([Said(text)]) == ["repetitive"]


def test_repetition_is_the_share_of_runs_of_four_that_came_before():
    assert repetition(WORDS[:100]) == 0
    # 16 units three times: 45 runs, of which 16 are different (the runs across the seam repeat, too).
    assert repetition(WORDS[:16] * 3) == pytest.approx(1 - 16 / 45)
    assert repetition(["no"] * 31) == 0  # too short to tell
    assert repetition(["no"] * 32) == pytest.approx(1 - 1 / 29)


def test_the_share_is_compared_with_the_limit():
    # 61 of 157 runs came before: 0.389.
    said = [Said(" ".join([*WORDS[:96], "and", *WORDS[:63]]))]
    assert why_unused(said, max_repetition=0.38) == ["repetitive"]
    assert why_unused(said, max_repetition=0.40) == [None]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (WORDS[:200] + ["the"] * 32, True),
        (WORDS[:200] + ["the"] * 31, False),
        (WORDS[:200] + WORDS[:9] * 4, True),  # 36 units
        (WORDS[:200] + WORDS[:9] * 3, False),
        (WORDS[:200] + WORDS[:64] * 4, True),
        (WORDS[:200] + WORDS[:65] * 4, False),  # longer than what is looked for
        (WORDS[:200] + ["the"] * 40 + ["end"], False),
        ([], False),
    ],
)
def test_a_loop_at_the_end(units, expected):
    assert ends_in_loop(units) is expected


def test_scripts_without_spaces_are_read_by_character():
    assert why_unused([Said("我不知道" * 20)]) == ["repetitive"]
    assert why_unused([Said("我不知道，但是可以试一试。")]) == [None]
