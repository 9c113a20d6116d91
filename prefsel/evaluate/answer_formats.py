"""What the files of public judges hold, as questions and answers, and answers as what they read.

    alpaca_eval          {"instruction", "output", "generator", "dataset", "datasplit"}, a JSON list
    arena_hard           {"uid", "ans_id", "model", "messages": [{user}, {"content": {"answer"}}]}, an object a line
    arena_hard_choices   {"question_id", "model_id", "choices": [{"index", "turns": [{"content"}]}]}, an object a line,
                         as Arena-Hard wrote them until 2025; its prompts lie in the questions alone

Sources: tatsu-lab/alpaca_eval, example/outputs.json; lmarena/arena-hard-auto, gen_answer.py and gen_judgment.py, and
its data folders: what they read is written, and what they draw at random (names of answers) follows from the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from prefsel.pairs.trainers import CannotHold

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt of a benchmark."""

    prompt: tuple[Message, ...]
    question_id: str | None
    """None where the format has none: AlpacaEval's instructions are their own names."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file besides: category, cluster, dataset, …"""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    prompt: tuple[Message, ...] | None
    """None where the format does not hold it: `arena_hard_choices` names the question alone."""
    text: str
    generator: str
    """Name of the model."""
    question_id: str | None = None
    sample: int = 0
    """Which of its answers to the question."""
    num_tokens: int | None = None
    """By the model's own tokenizer; Arena-Hard shows their mean."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file besides."""


@dataclass(frozen=True)
class FileFormat:
    """How one kind of file is read and written; all of it raises `CannotHold`."""

    question: Callable[[Mapping[str, Any]], Question]
    answers: Callable[[Mapping[str, Any]], list[Answer]]
    key: Callable[[Answer], object]
    """What two answers of a file may not both have; raises `CannotHold`."""
    write: Callable[[Sequence[Answer]], str]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _answer_id(answer: Answer) -> str:
    """22 digits that follow from the answer, where Arena-Hard draws some at random."""
    given = json.dumps([answer.generator, answer.question_id, answer.sample, answer.text], ensure_ascii=False)
    return hashlib.blake2b(given.encode(), digest_size=11).hexdigest()


def _single_user(prompt: Sequence[Message] | None, *, may_have_system: bool = False) -> str:
    """The text of a prompt that is one user message."""
    if prompt is None:
        raise CannotHold("an answer without its prompt")
    rest = [one for one in prompt if one.get("role") != "system"]
    if len(rest) != len(prompt) and not (may_have_system and prompt[0].get("role") == "system" and len(prompt) == 2):
        raise CannotHold("a system prompt")
    if len(rest) != 1:
        raise CannotHold(f"a prompt of {len(rest)} turns")
    if rest[0].get("role") != "user" or set(rest[0]) != {"role", "content"} or not isinstance(rest[0]["content"], str):
        raise CannotHold("a prompt that is no user's text")
    return str(rest[0]["content"])


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(found := row.get(key), str):
        raise CannotHold(f"{key}: {'absent' if key not in row else type(found).__name__} where a text belongs")
    return found


def _objects(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = row.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise CannotHold(f"{key}: absent or empty, or no list of objects")
    return found


def _without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def _asked(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


# -------------------------------------------------------------------------------------------------------- AlpacaEval


def _alpaca_question(row: Mapping[str, Any]) -> Question:
    if row.get("input"):
        raise CannotHold("an input beside the instruction")
    return Question(_asked(_text(row, "instruction")), None, _without(row, "instruction", "output", "generator"))


def _alpaca_answers(row: Mapping[str, Any]) -> list[Answer]:
    question = _alpaca_question(row)
    return [Answer(question.prompt, _text(row, "output"), _text(row, "generator"), rest=question.rest)]


def _alpaca_write(answers: Sequence[Answer]) -> str:
    rows = [
        {
            "instruction": _single_user(answer.prompt),
            "output": answer.text,
            "generator": answer.generator,
            **answer.rest,
        }
        for answer in answers
    ]
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"


# ------------------------------------------------------------------------------------------ Arena-Hard with choices


def _choices_question(row: Mapping[str, Any]) -> Question:
    turns = _objects(row, "turns")
    if len(turns) > 1:
        raise CannotHold(f"{len(turns)} turns, which the model answers one by one")
    return Question(
        _asked(_text(turns[0], "content")), _text(row, "question_id"), _without(row, "turns", "question_id")
    )


def _choices_answers(row: Mapping[str, Any]) -> list[Answer]:
    rest = _without(row, "question_id", "model_id", "choices")
    answers = []
    for choice in _objects(row, "choices"):
        turns = _objects(choice, "turns")
        if len(turns) != 1 or set(choice) - {"index", "turns"}:
            raise CannotHold(f"an answer of {len(turns)} turns")
        if set(turns[0]) - {"content", "token_len"}:
            raise CannotHold(f"a turn with {', '.join(sorted(set(turns[0]) - {'content', 'token_len'}))}")
        count = turns[0].get("token_len")
        names = _text(row, "model_id"), _text(row, "question_id")
        answers.append(Answer(None, _text(turns[0], "content"), *names, int(choice.get("index", 0)), count, rest))
    return answers


def _choices_key(answer: Answer) -> object:
    if answer.prompt is not None:
        _single_user(answer.prompt)
    return _identified(answer), answer.sample


def _choices_write(answers: Sequence[Answer]) -> str:
    by_question: dict[str, list[Answer]] = {}
    for answer in answers:
        by_question.setdefault(_identified(answer), []).append(answer)
    return _lines(
        {
            "question_id": question,
            "answer_id": _answer_id(many[0]),
            "model_id": many[0].generator,
            "choices": [{"index": one.sample, "turns": [_turn(one)]} for one in many],
            **many[0].rest,
        }
        for question, many in by_question.items()
    )


def _turn(answer: Answer) -> dict[str, Any]:
    counted = {} if answer.num_tokens is None else {"token_len": answer.num_tokens}
    return {"content": answer.text, **counted}


def _identified(answer: Answer) -> str:
    if not answer.question_id:
        raise CannotHold("an answer without the id of its question")
    return answer.question_id


# --------------------------------------------------------------------------------------------------- Arena-Hard


def _arena_question(row: Mapping[str, Any]) -> Question:
    return Question(_asked(_text(row, "prompt")), _text(row, "uid"), _without(row, "prompt", "uid"))


def _arena_answers(row: Mapping[str, Any]) -> list[Answer]:
    messages = _objects(row, "messages")
    if messages[-1].get("role") != "assistant":
        raise CannotHold("messages that do not end with an answer")
    _single_user(messages[:-1], may_have_system=True)
    content = messages[-1].get("content")
    if not isinstance(content, dict):
        raise CannotHold(f"an answer whose content is {type(content).__name__}")
    metadata = row.get("metadata")
    count = metadata.get("token_len") if isinstance(metadata, dict) else None
    names = _text(row, "model"), _text(row, "uid")
    rest = _without(row, "uid", "model", "messages")
    if thought := _without(content, "answer"):  # a model that reasons says it beside its answer
        rest["content"] = thought
    return [Answer(tuple(messages[:-1]), _text(content, "answer"), *names, 0, count, rest)]


def _arena_key(answer: Answer) -> object:
    _single_user(answer.prompt, may_have_system=True)
    if answer.sample:
        raise CannotHold("a second answer to a question")
    return _identified(answer)


def _arena_write(answers: Sequence[Answer]) -> str:
    return _lines(
        {
            "uid": answer.question_id,
            "ans_id": _answer_id(answer),
            "model": answer.generator,
            "messages": [*(answer.prompt or ()), {"role": "assistant", "content": _content(answer)}],
            **({} if answer.num_tokens is None else {"metadata": {"token_len": answer.num_tokens}}),
            **_without(answer.rest, "content"),
        }
        for answer in answers
    )


def _content(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text, **answer.rest.get("content", {})}


FORMATS: dict[str, FileFormat] = {
    "alpaca_eval": FileFormat(
        _alpaca_question, _alpaca_answers, lambda answer: _single_user(answer.prompt), _alpaca_write
    ),
    "arena_hard_choices": FileFormat(_choices_question, _choices_answers, _choices_key, _choices_write),
    "arena_hard": FileFormat(_arena_question, _arena_answers, _arena_key, _arena_write),
}
