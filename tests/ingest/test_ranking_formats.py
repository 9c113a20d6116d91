"""Formats of K completions: which pairs come out of ratings, labels and rewards."""

import math
from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefsel.config import FieldMap, FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.formats import FORMATS, RowError, detect
from prefsel.ingest.identity import prompt_id
from prefsel.ingest.mapping import read
from prefsel.reasons import QUARANTINE

ASSIGN, ALL = FormatOptions(), FormatOptions(aspects="all")
OVERALL, MEAN = FormatOptions(label="overall"), FormatOptions(label="mean")


def row(*ratings, overall=None, prompt="p"):
    """A row of completions "0", "1", …; `ratings` has a dict of aspects each."""
    completions = [
        {"response": str(k), "annotations": {aspect: {"Rating": value} for aspect, value in one.items()}}
        for k, one in enumerate(ratings)
    ]
    for one, score in zip(completions, overall or []):
        one["overall_score"] = score
    return {"instruction": prompt, "completions": completions}


def told(name, value, options=ASSIGN):
    """Preferences with completions by their text."""
    example = FORMATS[name](value, options)
    texts = [one.messages[0]["content"] for one in example.completions]
    return [(texts[c], texts[r], aspect, margin) for c, r, aspect, margin in example.preferences], example.ties


def refused(name, value, options=ASSIGN):
    with pytest.raises(RowError) as caught:
        FORMATS[name](value, options)
    assert caught.value.reason in QUARANTINE
    return caught.value.reason


def test_every_two_completions_with_different_ratings_are_a_pair():
    value = row({"truth": "3"}, {"truth": "5"}, {"truth": "3"})
    assert told("ultrafeedback", value) == ([("1", "0", "truth", 2.0), ("1", "2", "truth", 2.0)], 1)


def test_all_aspects_are_mined_when_asked():
    value = row({"truth": "1", "honesty": "5"}, {"truth": "2", "honesty": "4"})
    assert told("ultrafeedback", value, ALL) == ([("0", "1", "honesty", 1.0), ("1", "0", "truth", 1.0)], 0)


@pytest.mark.parametrize("absent", ["N/A", "", None, "good", [], {}, "nan", "inf", True])
def test_a_rating_that_is_no_number_is_absent(absent):
    value = row({"truth": "3"}, {"truth": absent}, {"truth": 4})
    assert told("ultrafeedback", value) == ([("2", "0", "truth", 1.0)], 0)
    kept = FORMATS["ultrafeedback"](value, ASSIGN).completions
    assert [one.ratings for one in kept] == [{"truth": 3.0}, {}, {"truth": 4.0}]


def test_rows_without_annotations_have_no_pairs_and_no_error():
    value = {"instruction": "p", "completions": [{"response": "0"}, {"response": "1", "annotations": None}]}
    assert told("ultrafeedback", value) == ([], 0)


def test_ratings_may_stand_without_their_object():
    value = {
        "instruction": "p",
        "completions": [
            {"response": "0", "annotations": {"truth": 1, "honesty": None}},
            {"response": "1", "annotations": {"truth": " 2.5 "}},
        ],
    }
    assert told("ultrafeedback", value) == ([("1", "0", "truth", 1.5)], 0)


def test_all_ratings_stay_with_the_completion():
    value = row({"truth": "3", "honesty": "N/A"}, {"truth": "4"}, overall=[7.5, "8"])
    value["completions"][0]["fine-grained_score"] = 3.25
    first, second = FORMATS["ultrafeedback"](value, ASSIGN).completions
    assert first.ratings == {"truth": 3.0, "overall": 7.5, "fine_grained": 3.25}
    assert second.ratings == {"truth": 4.0, "overall": 8.0}


FOUR = ["helpfulness", "honesty", "instruction_following", "truthfulness"]


def test_each_prompt_is_assigned_one_aspect_by_its_hash_and_each_aspect_its_share():
    seen = Counter()
    for n in range(800):
        value = row(dict.fromkeys(FOUR, "1"), dict.fromkeys(FOUR, "2"), prompt=f"prompt {n}")
        ((_, _, aspect, _),), _ = told("ultrafeedback", value)
        # Other ratings, another order, more completions: the same prompt keeps its aspect.
        again = row(*[dict.fromkeys(FOUR[::-1], str(k)) for k in (4, 1, 3)], prompt=f"prompt {n}")
        assert {label for _, _, label, _ in told("ultrafeedback", again)[0]} == {aspect}
        seen[aspect] += 1
    # Four standard errors of a share of 1/4 at 800 prompts are 49.
    assert set(seen) == set(FOUR)
    assert all(abs(count - 200) < 49 for count in seen.values())


def test_an_aspect_that_cannot_make_a_pair_is_not_assigned():
    for n in range(30):
        value = row({"truth": "1", "honesty": "2"}, {"truth": "2"}, prompt=str(n))
        assert told("ultrafeedback", value)[0] == [("1", "0", "truth", 1.0)]


def test_overall_and_mean_labels_belong_to_no_aspect():
    value = row({"a": "5", "b": "1"}, {"a": "1", "b": "2"}, {"a": "4", "b": "2"}, overall=[2, 3, 3])
    assert told("ultrafeedback", value, OVERALL) == ([("1", "0", None, 1.0), ("2", "0", None, 1.0)], 1)
    assert told("ultrafeedback", value, MEAN) == ([("0", "1", None, 1.5), ("2", "1", None, 1.5)], 1)


def test_the_mean_is_over_the_aspects_both_are_rated_on():
    value = row({"a": "3", "b": "5"}, {"a": "4", "b": "N/A"}, {"b": "1"})
    assert told("ultrafeedback", value, MEAN) == ([("1", "0", None, 1.0), ("0", "2", None, 4.0)], 0)


def test_equal_responses_are_one_completion_with_its_first_rating():
    value = row({"truth": "1"}, {"truth": "2"}, {"truth": "5"})
    value["completions"][2]["response"] = "0"
    assert told("ultrafeedback", value) == ([("1", "0", "truth", 1.0)], 0)
    assert len(FORMATS["ultrafeedback"](value, ASSIGN).completions) == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (row({"a": "1"}), "too_few_completions"),
        (row(), "too_few_completions"),
        ({"instruction": "p"}, "missing_field"),
        ({"instruction": "p", "completions": None}, "missing_field"),
        ({"completions": row({}, {})["completions"]}, "missing_field"),
        ({"instruction": "", "completions": row({}, {})["completions"]}, "empty_prompt"),
        ({"instruction": "p", "completions": "text"}, "wrong_type"),
        ({"instruction": "p", "completions": ["a", "b"]}, "wrong_type"),
        ({"instruction": "p", "completions": [{"response": "a", "annotations": [1]}, {"response": "b"}]}, "wrong_type"),
        ({"instruction": "p", "completions": [{"response": "a"}, {"response": ""}]}, "empty_completion"),
        ({"instruction": "p", "completions": [{"response": "a"}, {"response": None}]}, "missing_field"),
        ({"instruction": "p", "completions": [{"response": "a"}, {"response": "a"}]}, "identical_completions"),
        (row({"a": math.nan}, {"a": 1}), "non_finite_score"),
        (row({}, {}, overall=[math.inf, 1]), "non_finite_score"),
    ],
)
def test_bad_ultrafeedback(value, reason):
    assert refused("ultrafeedback", value) == reason


def test_labels_are_read_in_the_order_1v2_1v3_2v3():
    value = {"question": "q", "completions": ["a", "b", "c"], "preference": [1, 2, 0]}
    assert told("ranked", value) == ([("a", "b", None, None), ("c", "a", None, None)], 1)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6))
def test_labels_made_from_ranks_give_the_pairs_of_the_ranks(ranks):
    texts = [f"text {k}" for k in range(len(ranks))]
    labels = [
        0 if ranks[i] == ranks[j] else 1 if ranks[i] > ranks[j] else 2
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
    ]
    pairs, ties = told("ranked", {"prompt": "q", "completions": texts, "preference": labels})
    better = {(x, y) for x, a in zip(texts, ranks) for y, b in zip(texts, ranks) if a > b}
    assert {(chosen, rejected) for chosen, rejected, _, _ in pairs} == better
    assert len(pairs) == len(better)
    assert ties == labels.count(0)
    scored, scored_ties = told(
        "scored", {"prompt": "q", "completions": texts, "rewards": ranks}, FormatOptions(pairs="all")
    )
    assert {(chosen, rejected) for chosen, rejected, _, _ in scored} == better
    assert scored_ties == ties


def test_a_label_between_equal_texts_is_a_tie():
    value = {"question": "q", "completions": ["a", "a", "c"], "preference": [1, 2, 0]}
    assert told("ranked", value) == ([("c", "a", None, None)], 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"preference": [1]}, "wrong_type"),
        ({"preference": [1, 0, 3]}, "wrong_type"),
        ({"preference": [1, 0, True]}, "wrong_type"),
        ({"preference": [1, 0, "second"]}, "wrong_type"),
        ({"preference": [1, 0, None]}, "wrong_type"),
        ({"preference": [1, 0, math.nan]}, "wrong_type"),
        ({"preference": None}, "missing_field"),
        ({"question": None}, "missing_field"),
        ({"completions": ["a", "b", " "]}, "empty_completion"),
        ({"completions": ["a", "a", "a"]}, "identical_completions"),
        ({"completions": ["a", "b", 3]}, "wrong_type"),
    ],
)
def test_bad_ranked(change, reason):
    assert (
        refused("ranked", {"question": "q", "completions": ["a", "b", "c"], "preference": [1, 2, 0]} | change) == reason
    )


def test_best_against_worst():
    value = {"prompt": "q", "completions": ["a", "b", "c", "d"], "rewards": [0.5, 2, -1, 2]}
    assert told("scored", value) == ([("b", "c", None, 3.0)], 0)
    assert [one.ratings for one in FORMATS["scored"](value, ASSIGN).completions] == [
        {"score": 0.5}, {"score": 2.0}, {"score": -1.0}, {"score": 2.0},
    ]  # fmt: skip
    pairs, ties = told("scored", value, FormatOptions(pairs="all"))
    assert (len(pairs), ties) == (5, 1)
    assert ("d", "a", None, 1.5) in pairs


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 1, 1], ([], 1)),
        ([None, None, 3], ([], 0)),
        ([None, 1, 3], ([("c", "b", None, 2.0)], 0)),
    ],
)
def test_equal_and_absent_rewards(rewards, expected):
    assert told("scored", {"prompt": "q", "completions": ["a", "b", "c"], "rewards": rewards}) == expected


def test_completions_may_be_messages():
    replies = [[{"role": "assistant", "content": text}] for text in "ab"]
    value = {"prompt": [{"role": "user", "content": "q"}], "responses": replies, "scores": [1, 2]}
    assert told("scored", value) == ([("b", "a", None, 1.0)], 0)
    assert prompt_id(FORMATS["scored"](value, ASSIGN).prompt) == prompt_id([{"role": "user", "content": "q"}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rewards": [1]}, "wrong_type"),
        ({"rewards": [1, [2]]}, "wrong_type"),
        ({"rewards": [1, True]}, "wrong_type"),
        ({"rewards": [1, math.nan]}, "non_finite_score"),
        ({"rewards": [1e308, -1e308]}, "non_finite_score"),
        ({"rewards": None}, "missing_field"),
        ({"completions": ["a", "a"]}, "identical_completions"),
        ({"completions": ["a"], "rewards": [1]}, "too_few_completions"),
        ({"prompt": 3}, "wrong_type"),
    ],
)
def test_bad_scored(change, reason):
    assert refused("scored", {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 2]} | change) == reason


def test_relabelling_keeps_the_pairs_of_the_aspect_and_turns_them():
    rated = [{"a": 5, "b": 2}, {"a": 3, "b": 5}, {"a": 3, "b": 2}]  # each aspect ties once, the means never
    row = {
        "instruction": "q",
        "completions": [
            {"response": f"r{n}", "annotations": {k: {"Rating": str(v)} for k, v in one.items()}}
            for n, one in enumerate(rated)
        ],
    }

    def mined(**options):
        example = FORMATS["ultrafeedback"](row, FormatOptions(**options))
        return {frozenset((p.chosen, p.rejected)): p.chosen for p in example.preferences}

    own, turned, whole = mined(), mined(label="mean", relabel=True), mined(label="mean")
    means = [sum(one.values()) / 2 for one in rated]
    assert set(turned) == {pair for pair in own if len({means[k] for k in pair}) == 2}
    assert all(chosen == max(pair, key=lambda k: means[k]) for pair, chosen in turned.items())
    assert set(whole) > set(turned)


def test_sorted_answers_are_all_compared_with_each_other() -> None:
    row = {"prompt": "Why?", "chosen": ["a", "b", "a"], "rejected": ["c", "d"]}
    assert detect(row) == "sorted"
    found = FORMATS["sorted"](row, FormatOptions(pairs="all"))
    texts = [one.messages[0]["content"] for one in found.completions]
    pairs = [(texts[one.chosen], texts[one.rejected]) for one in found.preferences]
    assert pairs == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    with pytest.raises(RowError, match="both hold the answer 'b'"):
        FORMATS["sorted"]({"prompt": "Why?", "chosen": "b", "rejected": ["c", "b"]}, FormatOptions())


def test_turns_of_an_arena_need_an_answer_each_and_one_outcome() -> None:
    row = {"prompt": ["Q", "R"], "response_a": ["x", "y"], "response_b": ["x", "z"]}
    won = {"winner_model_a": "0", "winner_model_b": "0", "winner_tie": "1"}
    adapt = FORMATS["arena_turns"]
    assert adapt(row | won, FormatOptions()).ties == 1
    with pytest.raises(RowError, match="response_b: got 1 turns; the prompt has 2"):
        adapt(row | won | {"response_b": "z"}, FormatOptions())
    with pytest.raises(RowError, match="2 of them are 1"):
        adapt(row | won | {"winner_model_a": 1}, FormatOptions())
    with pytest.raises(RowError, match="absent or null"):
        adapt(row | won | {"response_b": ["x", None]}, FormatOptions())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "instruction": "What?", "completions": ["a", "b"], "rewards": [1, 2]},
        {"prompt": "Why?", "question": "What?", "completions": ["a", "b"], "preference": [1]},
        {"prompt": "Why?", "instruction": "What?", "completion": "a", "label": True},
    ],
)
def test_a_second_prompt_is_never_left_out(row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[detect(row)](row, FormatOptions())
    assert caught.value.reason == "unread_field"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -100},
        {"context": "p", "response1": "a", "response2": "b", "overall_preference": 4},
    ],
)
def test_a_strength_out_of_its_scale_is_no_strength(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="valid: -3 to 3"):
        FORMATS[detect(row)](row, FormatOptions())


def test_parts_of_text_by_any_of_their_names() -> None:
    parts = [{"type": "input_text", "text": "Why"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert FORMATS[detect(row)](row, FormatOptions()).prompt == [{"role": "user", "content": "Why?"}]


def test_a_map_to_start_from_names_several_responses() -> None:
    for row, proposed in (
        ({"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}, "responses[].text"),
        ({"query": "p", "candidates": ["a", "b"], "ranking": [2, 1]}, "candidates"),
    ):
        with pytest.raises(UserError) as caught:
            detect(row)
        fields = FieldMap.model_validate(yaml.safe_load(str(caught.value).split("map: ")[1]))
        assert fields.responses == proposed
        example = read(row, FormatOptions(), fields=fields)
        (preference,) = example.preferences
        assert example.completions[preference.chosen].messages[0]["content"] == "b"
