from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from prefsel.errors import UserError
from prefsel.evaluate.answer_formats import FORMATS, Answer
from prefsel.evaluate.answers import Format, read_answers, read_questions, unheld, write_answers

USER = ({"role": "user", "content": "Who is it?"},)
SYSTEM = ({"role": "system", "content": "Be brief."}, *USER)
TURNS = (*USER, {"role": "assistant", "content": "Me."}, {"role": "user", "content": "Who?"})

ALPACA = """[
  {"instruction": "What is jazz?", "output": "Music,\\n\\u2028loud.", "generator": "m",
   "dataset": "helpful_base", "datasplit": "eval"},
  {"instruction": "Who is Ann?", "output": "", "generator": "m", "dataset": "koala", "time_per_example": 1.5}
]"""
CHOICES = (
    '{"question_id": "96d2", "answer_id": "ndKL", "model_id": "m", "choices": [{"index": 0, "turns": '
    '[{"content": "Yes.", "token_len": 2}]}], "tstamp": 1711397284.101236}\n'
    '{"question_id": "4f8b", "answer_id": "ZXTn", "model_id": "m", "choices": [{"index": 0, "turns": '
    '[{"content": "A"}]}, {"index": 1, "turns": [{"content": "B"}]}], "tstamp": 1711397070.4}\n'
)
ARENA = (
    '{"uid": "0001", "ans_id": "kpYH", "model": "m", "messages": [{"role": "user", "content": "Hỏi\u2028gì"}, '
    '{"role": "assistant", "content": {"answer": "Đáp."}}], "tstamp": 1745605748.43, "metadata": '
    '{"token_len": 621, "header_count": {"h1": 0}}}\n'
    '{"uid": "00a3", "ans_id": "Y5mV", "model": "m", "messages": [{"role": "system", "content": "Be brief."}, '
    '{"role": "user", "content": "Q"}, {"role": "assistant", "content": {"answer": "A", "thought": "hm"}}], '
    '"tstamp": 1745605588.03}\n'
)


def parsed(text: str, file_format: str) -> Any:
    return json.loads(text) if file_format == "alpaca_eval" else [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize(
    ("text", "file_format"), [(ALPACA, "alpaca_eval"), (CHOICES, "arena_hard_choices"), (ARENA, "arena_hard")]
)
def test_what_is_read_is_written_again(text: str, file_format: Format) -> None:
    answers = read_answers(text, file_format)
    written = write_answers(answers, file_format)
    assert parsed(written, file_format) == parsed(text, file_format)
    assert read_answers(written, file_format) == answers


def test_what_stands_in_the_files() -> None:
    first, second = read_answers(ALPACA, "alpaca_eval")
    assert first == Answer(
        ({"role": "user", "content": "What is jazz?"},),
        "Music,\n\u2028loud.",
        "m",
        rest={"dataset": "helpful_base", "datasplit": "eval"},
    )
    assert second.rest == {"dataset": "koala", "time_per_example": 1.5}
    yes, a, b = read_answers(CHOICES, "arena_hard_choices")
    assert (yes.text, yes.question_id, yes.num_tokens, yes.prompt) == ("Yes.", "96d2", 2, None)
    assert [(one.text, one.question_id, one.sample) for one in (a, b)] == [("A", "4f8b", 0), ("B", "4f8b", 1)]
    one, other = read_answers(ARENA, "arena_hard")
    assert (one.text, one.num_tokens, one.prompt) == ("Đáp.", 621, ({"role": "user", "content": "Hỏi\u2028gì"},))
    assert other.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"})
    assert other.rest["content"] == {"thought": "hm"}


def test_questions_are_prompts_with_their_fields() -> None:
    (jazz, _) = read_questions(ALPACA, "alpaca_eval")
    assert (jazz.prompt[0]["content"], jazz.question_id) == ("What is jazz?", None)
    assert jazz.rest == {"dataset": "helpful_base", "datasplit": "eval"}
    old = '{"question_id": "96d2", "category": "arena-hard-v0.1", "cluster": "Keys", "turns": [{"content": "Why?"}]}\n'
    new = '{"uid": "2edb", "category": "hard_prompt", "subcategory": "coding", "prompt": "Why?"}\n'
    (one,), (other,) = read_questions(old, "arena_hard_choices"), read_questions(new, "arena_hard")
    assert one.prompt == other.prompt == ({"role": "user", "content": "Why?"},)
    assert (one.question_id, other.question_id) == ("96d2", "2edb")
    assert (one.rest, other.rest) == (
        {"category": "arena-hard-v0.1", "cluster": "Keys"},
        {"category": "hard_prompt", "subcategory": "coding"},
    )


@pytest.mark.parametrize("file_format", get_args(Format))
def test_own_answers_are_read_as_they_were_written(file_format: Format) -> None:
    answers = [Answer(USER, "It is me.", "own", "q1", num_tokens=4)]
    (found,) = read_answers(write_answers(answers, file_format), file_format)
    assert (found.text, found.generator) == ("It is me.", "own")
    if file_format == "alpaca_eval":
        assert found.prompt == USER
    else:
        assert (found.question_id, found.num_tokens) == ("q1", 4)
        assert write_answers(answers, file_format) == write_answers(answers, file_format)
    assert set(FORMATS) == set(get_args(Format))


@pytest.mark.parametrize(
    ("file_format", "answer", "reason"),
    [
        ("alpaca_eval", Answer(SYSTEM, "x", "m", "q"), "a system prompt"),
        ("alpaca_eval", Answer(TURNS, "x", "m", "q"), "a prompt of 3 turns"),
        ("alpaca_eval", Answer(None, "x", "m", "q"), "an answer without its prompt"),
        ("arena_hard_choices", Answer(SYSTEM, "x", "m", "q"), "a system prompt"),
        ("arena_hard_choices", Answer(TURNS, "x", "m", "q"), "a prompt of 3 turns"),
        ("arena_hard_choices", Answer(USER, "x", "m"), "an answer without the id of its question"),
        ("arena_hard", Answer(TURNS, "x", "m", "q"), "a prompt of 3 turns"),
        ("arena_hard", Answer(None, "x", "m", "q"), "an answer without its prompt"),
        ("arena_hard", Answer(USER, "x", "m", "q", sample=1), "a second answer to a question"),
        ("arena_hard", Answer((*SYSTEM[:1], *TURNS), "x", "m", "q"), "a system prompt"),
        ("alpaca_eval", Answer(({**USER[0], "name": "Ann"},), "x", "m"), "a prompt that is no user's text"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_its_number(file_format: Format, answer: Answer, reason: str) -> None:
    fine = Answer(({"role": "user", "content": "Fine?"},), "y", "m", "fine")
    assert unheld([fine, answer], file_format) == {1: reason}
    with pytest.raises(UserError, match=rf"no place for 1 of 2 answers \({reason}\), first"):
        write_answers([fine, answer], file_format)


def test_a_second_answer_needs_a_place() -> None:
    many = [Answer(USER, text, "m", "q", sample=sample) for sample, text in enumerate("ab")]
    assert len(read_answers(write_answers(many, "arena_hard_choices"), "arena_hard_choices")) == 2
    assert unheld(many, "alpaca_eval") == {1: "a second answer to a question"}
    twice = [many[0], many[0]]
    assert unheld(twice, "arena_hard_choices") == {1: "a second answer to a question"}


def test_answers_of_two_models_are_two_files() -> None:
    with pytest.raises(UserError, match=r"of 2 models \(\['a', 'b'\]\); valid: one file per model"):
        write_answers([Answer(USER, "x", name, name) for name in "ab"], "arena_hard")


@pytest.mark.parametrize(
    ("text", "file_format", "said"),
    [
        ("[1, 2]", "alpaca_eval", "valid: a list of objects"),
        ('{"instruction": "x"}', "alpaca_eval", "got dict; valid: a list of objects"),
        ("[{", "alpaca_eval", "no JSON: .*valid: a JSON list"),
        ("{}\n{", "arena_hard", "no JSON: .*valid: a JSON object a line"),
        ("[]", "alpaca", "format: got 'alpaca'; valid: alpaca_eval, arena_hard_choices, arena_hard"),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, file_format: Any, said: str) -> None:
    for read in (read_questions, read_answers):
        with pytest.raises(UserError, match=said):
            read(text, file_format)


def test_rows_that_cannot_be_read_are_counted_and_named() -> None:
    turn, two = {"content": "x"}, '{"question_id": "b", "turns": [{"content": "x"}, {"content": "y"}]}'
    text = "\n".join([json.dumps({"question_id": "a", "turns": [turn]}), two, two])
    with pytest.raises(UserError, match=r"2 of 3 rows .*\(2 turns, which .* one by one\), first rows \[1, 2"):
        read_questions(text, "arena_hard_choices")
    with pytest.raises(UserError, match="an input beside the instruction"):
        read_questions('[{"instruction": "Add", "input": "1 2"}]', "alpaca_eval")
    with pytest.raises(UserError, match="output: absent where a text belongs"):
        read_answers('[{"instruction": "Add"}]', "alpaca_eval")
    image = json.dumps({"question_id": "a", "turns": [{"content": ["x", ["image"]]}]})
    with pytest.raises(UserError, match="content: list where a text belongs"):
        read_questions(image, "arena_hard_choices")
    with pytest.raises(UserError, match="messages that do not end with an answer"):
        read_answers('{"uid": "a", "model": "m", "messages": [{"role": "user", "content": "x"}]}', "arena_hard")


@pytest.mark.parametrize(
    ("row", "file_format", "said"),
    [
        ({"uid": "a", "model": "m", "messages": ["x"]}, "arena_hard", "messages: absent or empty, or no list of obj"),
        ({"uid": "a", "model": "m"}, "arena_hard", "messages: absent"),
        ({"question_id": "a", "model_id": "m", "choices": []}, "arena_hard_choices", "choices: absent or empty"),
        ({"question_id": "a", "model_id": "m", "choices": [{"turns": [3]}]}, "arena_hard_choices", "turns: absent or"),
        (
            {"question_id": "a", "model_id": "m", "choices": [{"turns": [{"content": "x"}, {"content": "y"}]}]},
            "arena_hard_choices",
            "an answer of 2 turns",
        ),
        (
            {"question_id": "a", "model_id": "m", "choices": [{"turns": [{"content": "x", "tool": "y"}]}]},
            "arena_hard_choices",
            "a turn with tool",
        ),
        (
            {"uid": "a", "model": "m", "messages": [*USER, {"role": "assistant", "content": "x"}]},
            "arena_hard",
            "an answer whose content is str",
        ),
    ],
)
def test_broken_rows_are_refused_with_what_is_wrong(row: Any, file_format: Format, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_answers(json.dumps(row), file_format)
