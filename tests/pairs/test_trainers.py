"""What each trainer can hold of a pair, message by message."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefsel.pairs.trainers import TRAINERS, CannotHold

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "A"}
OTHER = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "t"}
OFFER = {**USER, "tools": [{"name": "f"}]}


def convert(trainer: str, prompt: Any, chosen: Any = (ANSWER,), rejected: Any = (OTHER,)) -> dict[str, Any]:
    return TRAINERS[trainer].convert(prompt, chosen, rejected)


def test_lists_stay_as_they_came() -> None:
    prompt = [OFFER, CALLED, {**TOOL, "name": "f"}]
    found = convert("trl", prompt, [{**ANSWER, "reasoning_content": "because"}])
    assert found == {
        "prompt": [USER, CALLED, {**TOOL, "name": "f"}],
        "chosen": [{**ANSWER, "reasoning_content": "because"}],
        "rejected": [OTHER],
        "tools": json.dumps([{"name": "f"}]),
    }
    assert convert("openrlhf", [USER, CALLED, TOOL])["prompt"] == [USER, CALLED, TOOL]


def test_single_messages() -> None:
    assert convert("axolotl", [SYSTEM, USER]) == {"messages": [SYSTEM, USER], "chosen": ANSWER, "rejected": OTHER}
    turned = convert("llamafactory", [SYSTEM, USER, ANSWER, USER], [CALLED])
    assert turned["messages"] == [SYSTEM, USER, ANSWER, USER]
    assert turned["chosen"] == {"role": "function_call", "content": '[{"name": "f", "arguments": {"x": 1}}]'}
    assert turned["tools"] == ""
    answered = convert("llamafactory", [USER, CALLED, {**TOOL, "tool_call_id": "1", "name": "f"}])
    assert answered["messages"][1:] == [turned["chosen"], TOOL]


@pytest.mark.parametrize(
    ("trainer", "sides", "why"),
    [
        ("trl", ([],), "a prompt without a message"),
        ("trl", ([OFFER, ANSWER, {**USER, "tools": []}],), "offer different tools"),
        ("openrlhf", ([OFFER],), "tools that are offered"),
        ("axolotl", ([USER, CALLED, TOOL],), "a message with tool_calls"),
        ("axolotl", ([{"role": "developer", "content": "d"}, USER],), "the role 'developer'"),
        ("axolotl", ([USER], [ANSWER, USER, ANSWER]), "a response of 3 messages"),
        ("axolotl", ([USER], [{"role": "assistant", "content": None}]), "content is NoneType"),
        (
            "axolotl",
            ([USER], [{**ANSWER, "content": "mess"}]),
            "so short that it finds it in '\\[\\[dummy_message\\]\\]'",
        ),
        ("axolotl", ([USER], [OTHER], [{**ANSWER, "content": "["}]), "so short that it finds it"),
        ("axolotl", ([{"role": "user", "content": [{"type": "text", "text": "u"}]}],), "content is list"),
        ("llamafactory", ([USER, USER],), "turn 1 of the role 'user'"),
        ("llamafactory", ([ANSWER, USER],), "turn 0 of the role 'assistant'"),
        ("llamafactory", ([SYSTEM],), "ends with the role 'system'"),
        ("llamafactory", ([USER, ANSWER],), "ends with the role 'assistant'"),
        ("llamafactory", ([USER, SYSTEM, USER],), "turn 1 of the role 'system'"),
        ("llamafactory", ([USER, CALLED, TOOL, TOOL],), "turn 3 of the role 'tool'"),
        ("llamafactory", ([USER], [{**CALLED, "content": "let me see"}]), "both text and tool_calls"),
        ("llamafactory", ([USER], [{**ANSWER, "reasoning_content": "r"}]), "a message with reasoning_content"),
        ("llamafactory", ([{**USER, "name": "Ann"}],), "a message with name"),
        (
            "llamafactory",
            ([USER, {**CALLED, "tool_calls": [CALL, CALL]}, {**TOOL, "tool_call_id": "1"}],),
            "tool_call_id",
        ),
        ("llamafactory", ([USER], [{**CALLED, "tool_calls": [{**CALL, "index": 1}]}]), "a call with index"),
        ("llamafactory", ([USER], [{**CALLED, "tool_calls": [{"function": {"arguments": {}}}]}]), "without a name"),
        ("llamafactory", ([USER], [USER]), "chosen of the role 'user'"),
        (
            "llamafactory",
            ([USER], [{**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
            "a call of 'f' whose arguments are not JSON",
        ),
    ],
)
def test_what_a_trainer_has_no_place_for_is_refused(trainer: str, sides: Any, why: str) -> None:
    with pytest.raises(CannotHold, match=why):
        convert(trainer, *sides)


@pytest.mark.parametrize(
    "folder", ["out", "my data/out", 'it\'s "mine"', "a: b #c", "- x", "$HOME;ls", "123", "null", "ü"]
)
def test_the_lines_name_any_folder(folder: str) -> None:
    lines = {trainer: made.lines(folder, "1e3") for trainer, made in TRAINERS.items()}
    assert folder in [one.value for one in ast.walk(ast.parse(lines["trl"])) if isinstance(one, ast.Constant)]
    assert f"{folder}/train.parquet" in shlex.split(lines["openrlhf"].replace("\\\n", ""))
    assert yaml.safe_load(lines["axolotl"])["datasets"][0]["path"] == folder
    read = yaml.safe_load(lines["llamafactory"])
    assert (read["dataset_dir"], str(read["dataset"])) == (folder, "1e3")


@pytest.mark.parametrize(("text", "is_found"), [("mess", False), ("message]]", False), ("messages", True), ("B", True)])
def test_axolotl_gets_the_answers_that_it_finds(text: str, is_found: bool) -> None:
    """It cuts the conversation of a dummy prompt and the answer where the answer's text first stands in it."""
    conversation = f"<user>[[dummy_message]]</user><assistant>{text}</assistant>"
    assert (conversation[conversation.find(text) :] == f"{text}</assistant>") == is_found
    given = ([USER], [{**ANSWER, "content": text}])
    if is_found:
        assert convert("axolotl", *given)["chosen"]["content"] == text
    else:
        with pytest.raises(CannotHold, match="so short that it finds it"):
            convert("axolotl", *given)


@pytest.mark.parametrize("trainer", ["openrlhf", "axolotl", "llamafactory"])
def test_the_page_shows_the_lines(trainer: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/trainers.md").read_text(encoding="utf-8")
    made = TRAINERS[trainer]
    assert f"```{made.language}\n{made.lines(f'best30-{trainer}', 'best30')}\n```" in page
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(TRAINERS)
