"""Formats of one labelled pair, and which format a row looks like."""

import copy
import math

import pytest

from prefsel.config import FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.formats import FORMATS, RowError, detect, prompt_adapter
from prefsel.reasons import QUARANTINE

OPTIONS = FormatOptions()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


STRINGS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
TRANSCRIPT = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No.",
}
EXPLICIT = {
    "prompt": [{"role": "system", "content": "Be kind."}, user("Why?")],
    "chosen": [assistant("Because.")],
    "rejected": [assistant("No.")],
}
IMPLICIT = {
    "chosen": [user("Hi"), assistant("Hello"), user("Why?"), assistant("Because.")],
    "rejected": [user("Hi"), assistant("Hello"), user("Why?"), assistant("No.")],
}
ULTRAFEEDBACK = {
    "instruction": "Why?",
    "completions": [
        {"response": "Because.", "annotations": {"honesty": {"Rating": "5"}}},
        {"response": "No.", "annotations": {"honesty": {"Rating": "1"}}},
    ],
}
RANKED = {"question": "Why?", "completions": ["Because.", "No."], "preference": [1]}
SCORED = {"prompt": "Why?", "completions": ["Because.", "No."], "rewards": [1.0, -1.0]}
SAMPLES = {
    "prompt_chosen_rejected": STRINGS,
    "transcript": TRANSCRIPT,
    "messages_explicit": EXPLICIT,
    "messages_implicit": IMPLICIT,
    "ultrafeedback": ULTRAFEEDBACK,
    "ranked": RANKED,
    "scored": SCORED,
}


def adapt(name, value):
    before = copy.deepcopy(value)
    example = FORMATS[name](value, OPTIONS)
    assert str(value) == str(before)  # pure
    return example


def refused(name, value):
    with pytest.raises(RowError) as caught:
        FORMATS[name](value, OPTIONS)
    assert caught.value.reason in QUARANTINE
    return caught.value.reason


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_reads_its_sample_as_the_same_preference(name):
    example = adapt(name, SAMPLES[name])
    ((chosen, rejected, _, _),) = example.preferences
    assert example.completions[chosen].messages == [assistant("Because.")]
    assert example.completions[rejected].messages == [assistant("No.")]
    assert example.prompt[-1] == user("Why?")
    assert example.ties == 0


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_is_detected_and_nulls_of_other_columns_do_not_matter(name):
    assert detect(SAMPLES[name]) == name
    nulls = dict.fromkeys(["prompt", "chosen", "rejected", "completions", "preference", "rewards", "instruction"])
    assert detect(nulls | SAMPLES[name]) == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # ultrafeedback_binarized: a prompt string beside conversations that repeat it.
        ({"prompt": "Why?", **IMPLICIT}, "messages_implicit"),
        ({"prompt": "Why?", "chosen": [assistant("a")], "rejected": [assistant("b")]}, "messages_explicit"),
        ({"prompt": [user("Why?")], "chosen": "a", "rejected": "b"}, "messages_explicit"),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 2]}, "scored"),
        ({"prompt": "Why?", "completions": ["a", "b"], "preference": [0]}, "ranked"),
    ],
)
def test_variants_are_detected(value, expected):
    assert detect(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"text": "a", "label": 1},
        {"prompt": "a", "chosen": 1, "rejected": 2},
        {"chosen": "no turns", "rejected": "at all"},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "a", "completions": ["a", "b"]},
        {"prompt": "a", "completions": []},
    ],
)
def test_an_unknown_shape_lists_the_fields_and_the_formats(value):
    with pytest.raises(UserError) as caught:
        detect(value)
    assert all(name in str(caught.value) for name in [*value, *FORMATS])


def test_strings_become_messages():
    example = adapt("prompt_chosen_rejected", STRINGS)
    assert example.prompt == [user("Why?")]
    assert example.completions == [([assistant("Because.")], {}), ([assistant("No.")], {})]
    assert example.preferences == [(0, 1, None, None)]


def test_transcript_prompt_is_the_longest_common_prefix_of_turns():
    example = adapt("transcript", TRANSCRIPT)
    assert example.prompt == [user("Hi"), assistant("Hello"), user("Why?")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "completions"),
    [
        # The answers begin alike: turns are compared, not characters.
        ("Human: a\n\nAssistant: yes, 1", "Human: a\n\nAssistant: yes, 2", ["a"], [["yes, 1"], ["yes, 2"]]),
        # One is the beginning of the other: at least one turn is left in each.
        (
            "Human: a\n\nAssistant: b",
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            ["a"],
            [["b"], ["b", "c", "d"]],
        ),
        # Two turns of the assistant in a row, the first of them shared.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: d",
            ["a", "b"],
            [["c"], ["d"]],
        ),
        # Blank lines, and the word itself, inside a turn.
        (
            "\n\nHuman: a\n\nb Human: c\n\nAssistant: d\n\n\ne",
            "\n\nHuman: a\n\nb Human: c\n\nAssistant: f",
            ["a\n\nb Human: c"],
            [["d\n\n\ne"], ["f"]],
        ),
        # A preface is a system message.
        ("Be.\n\nHuman: a\n\nAssistant: b", "Be.\n\nHuman: a\n\nAssistant: c", ["Be.", "a"], [["b"], ["c"]]),
    ],
)
def test_transcripts(chosen, rejected, prompt, completions):
    example = adapt("transcript", {"chosen": chosen, "rejected": rejected})
    assert [message["content"] for message in example.prompt] == prompt
    assert [[message["content"] for message in one.messages] for one in example.completions] == completions
    assert all(one.messages[0]["role"] == one.messages[-1]["role"] == "assistant" for one in example.completions)


def test_a_preface_has_the_system_role():
    value = {"chosen": "S\n\nHuman: a\n\nAssistant: b", "rejected": "S\n\nHuman: a\n\nAssistant: c"}
    assert [message["role"] for message in adapt("transcript", value).prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "identical_completions"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: ", "empty_completion"),
        ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "empty_completion"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "prompt_mismatch"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "prompt_mismatch"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d", "wrong_type"),
        ("no turn", "\n\nHuman: a\n\nAssistant: d", "wrong_type"),
        ("", "\n\nHuman: a\n\nAssistant: d", "wrong_type"),
        ("\n\nHuman: \n\nAssistant: b", "\n\nHuman: \n\nAssistant: d", "empty_prompt"),
        ([], "\n\nHuman: a\n\nAssistant: d", "wrong_type"),
        (None, "\n\nHuman: a\n\nAssistant: d", "missing_field"),
    ],
)
def test_bad_transcripts(chosen, rejected, reason):
    assert refused("transcript", {"chosen": chosen, "rejected": rejected}) == reason


def test_extra_keys_of_messages_are_left_out():
    chosen = [{"role": "assistant", "content": "a", "name": None, "weight": 1}]
    example = adapt("messages_explicit", EXPLICIT | {"chosen": chosen})
    assert example.completions[0].messages == [assistant("a")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "x"} | {"rejected": "x"}, "identical_completions"),
        ({"chosen": ""}, "empty_completion"),
        ({"rejected": " \n\t"}, "empty_completion"),
        ({"prompt": " "}, "empty_prompt"),
        ({"chosen": None}, "missing_field"),
        ({"prompt": 5}, "wrong_type"),
        ({"rejected": ["a"]}, "wrong_type"),
        ({"score_chosen": math.nan}, "non_finite_score"),
        ({"score_rejected": -math.inf}, "non_finite_score"),
        ({"score_rejected": 10**400}, "non_finite_score"),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, "non_finite_score"),
        ({"helpfulness_chosen": math.inf}, "non_finite_score"),
        ({"aspect": 3}, "wrong_type"),
    ],
)
def test_bad_strings(change, reason):
    assert refused("prompt_chosen_rejected", STRINGS | change) == reason


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named_with_those_that_are_there(field):
    value = {key: text for key, text in STRINGS.items() if key != field}
    with pytest.raises(RowError) as caught:
        FORMATS["prompt_chosen_rejected"](value, OPTIONS)
    assert caught.value.reason == "missing_field"
    assert all(name in caught.value.detail for name in STRINGS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [user("")]}, "empty_prompt"),
        ({"prompt": {"role": "user"}}, "missing_field"),
        ({"chosen": []}, "empty_completion"),
        ({"chosen": [assistant(" ")]}, "empty_completion"),
        ({"chosen": ["text"]}, "wrong_type"),
        ({"chosen": [user("Why?"), assistant("a")]}, "prompt_mismatch"),
        ({"chosen": [{"role": "assistant"}]}, "missing_field"),
        ({"chosen": [{"content": "a"}]}, "missing_field"),
        ({"chosen": [{"role": "assistant", "content": [1]}]}, "wrong_type"),
        ({"chosen": [{"role": 1, "content": "a"}]}, "wrong_type"),
        ({"chosen": [assistant("No.")]}, "identical_completions"),
    ],
)
def test_bad_messages(change, reason):
    assert refused("messages_explicit", EXPLICIT | change) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": IMPLICIT["rejected"]}, "identical_completions"),
        ({"chosen": []}, "empty_completion"),
        ({"chosen": [user("Other"), assistant("a")]}, "prompt_mismatch"),
        ({"chosen": [user("Hi"), assistant("Hello"), user("Where?"), assistant("Here.")]}, "prompt_mismatch"),
        ({"chosen": [user("Hi"), assistant("Hello"), user("Why?")]}, "wrong_type"),
        ({"chosen": "text"}, "prompt_mismatch"),
    ],
)
def test_bad_conversations(change, reason):
    assert refused("messages_implicit", IMPLICIT | change) == reason


def test_numbers_in_pairs_of_columns_become_ratings():
    numbers = {"score_chosen": 9, "score_rejected": 7.5, "style_chosen": 4, "style_rejected": -0.0, "cost_chosen": 2}
    others = {"model_chosen": "a", "is_new_chosen": True, "tokens_chosen": [1], "_chosen": 1, "x_rejected": None}
    value = STRINGS | numbers | others
    example = adapt("prompt_chosen_rejected", value)
    assert example.completions[0].ratings == {"score": 9.0, "style": 4.0, "cost": 2.0}
    assert example.completions[1].ratings == {"score": 7.5, "style": 0.0}
    assert math.copysign(1, example.completions[1].ratings["style"]) == 1
    assert example.preferences == [(0, 1, None, 1.5)]


def test_a_score_against_the_label_gives_a_negative_margin():
    value = STRINGS | {"score_chosen": 1, "score_rejected": 4}
    assert adapt("prompt_chosen_rejected", value).preferences == [(0, 1, None, -3.0)]


@pytest.mark.parametrize("name", ["prompt_chosen_rejected", "transcript", "messages_explicit", "messages_implicit"])
def test_an_aspect_and_scores_belong_to_every_pair_format(name):
    value = SAMPLES[name] | {"aspect": "honesty", "score_chosen": 2, "score_rejected": 1}
    assert adapt(name, value).preferences == [(0, 1, "honesty", 1.0)]
    assert adapt(name, SAMPLES[name] | {"aspect": ""}).preferences == [(0, 1, None, None)]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_prompt_alone(name):
    expected = adapt(name, SAMPLES[name]).prompt
    for adapter in (prompt_adapter(None), prompt_adapter(name)):
        (example,) = adapter(SAMPLES[name], OPTIONS)
        assert (example.prompt, example.completions, example.preferences) == (expected, [], [])


@pytest.mark.parametrize("value", [{"instruction": "Why?"}, {"question": "Why?"}, STRINGS | {"chosen": "No."}])
def test_the_prompt_of_rows_that_hold_no_preference(value):
    (example,) = prompt_adapter(None)(value, OPTIONS)
    assert example.prompt == [user("Why?")]


def test_a_row_without_a_prompt():
    with pytest.raises(RowError, match="missing_field"):
        prompt_adapter(None)({"text": "a"}, OPTIONS)


def test_rows_inside_of_one_field_are_pointed_at() -> None:
    with pytest.raises(UserError, match=r"seem to stand inside of 'data'; .* jq -c '\.data\[\]'"):
        detect({"version": "1", "data": [STRINGS, STRINGS]})
    with pytest.raises(UserError, match="say which field is what"):
        detect({"turns": [{"speaker": "a"}]})
