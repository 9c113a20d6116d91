"""Answers as public judges read and write them: prompts of their benchmarks, and answers to be judged elsewhere.

    questions of a file  ─▶ `Question`, a prompt source
    answers of a file   ◀─▶ `Answer`, import and export

What a format has no place for (a system prompt, several turns, a second sample) is refused by name and number, never
written without it. Fields that only the file knows are kept and written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from prefsel.errors import UserError, invalid
from prefsel.evaluate.answer_formats import FORMATS, Answer, Question
from prefsel.pairs.trainers import CannotHold

Format: TypeAlias = Literal["alpaca_eval", "arena_hard", "arena_hard_choices"]
NAMED = 3


# ------------------------------------------------------------------------------------------------------------ reading


def read_questions(text: str, file_format: Format) -> list[Question]:
    """The prompts of a benchmark's file, in its order.

    Args:
        text: Of `alpaca_eval.json`, or of `question.jsonl`.
        file_format: Which.

    Raises:
        UserError: It is no such file, or questions cannot be one prompt (several turns to be answered in between, an
            image, an input apart); counts them and names the first.
    """
    return _each(_rows(text, file_format), FORMATS[file_format].question, f"{file_format} questions")


def read_answers(text: str, file_format: Format) -> list[Answer]:
    """A model's answers, in the order of their file.

    Args:
        text: Of `model_outputs.json`, or of `model_answer/<model>.jsonl`.
        file_format: Which.

    Raises:
        UserError: It is no such file, or rows hold what an `Answer` does not; counts them and names the first.
    """
    many = _each(_rows(text, file_format), FORMATS[file_format].answers, f"{file_format} answers")
    return [answer for answers in many for answer in answers]


def _rows(text: str, file_format: Format) -> list[Mapping[str, Any]]:
    if file_format not in FORMATS:
        raise invalid("format", file_format, FORMATS)
    try:
        if file_format == "alpaca_eval":
            rows = json.loads(text)
        else:
            # Not at what Unicode calls a line break: texts hold such, unescaped.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        shape = "a JSON list" if file_format == "alpaca_eval" else "a JSON object a line"
        raise UserError(f"{file_format}: no JSON: {error}; valid: {shape}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file_format}: got {type(rows).__name__}; valid: a list of objects")
    return rows


def _each(rows: Sequence[Any], convert: Callable[[Any], Any], what: str) -> list[Any]:
    """Every row converted; those that cannot be are refused together."""
    found, refused = [], []
    for number, row in enumerate(rows):
        try:
            found.append(convert(row))
        except CannotHold as error:
            refused.append((number, str(error)))
    if refused:
        causes = ", ".join(dict.fromkeys(reason for _, reason in refused))
        raise UserError(
            f"{what}: {len(refused)} of {len(rows)} rows cannot be read as one prompt and its answers ({causes}), "
            f"first rows {[number for number, _ in refused[:NAMED]]}; take them out, or another format"
        )
    return found


# ------------------------------------------------------------------------------------------------------------ writing


def unheld(answers: Iterable[Answer], file_format: Format) -> dict[int, str]:
    """What a format cannot hold: the answer's place → why. Who leaves these answers out does so knowingly."""
    found: dict[int, str] = {}
    seen: dict[object, int] = {}
    for place, answer in enumerate(answers):
        try:
            key = FORMATS[file_format].key(answer)
        except CannotHold as error:
            found[place] = str(error)
            continue
        if key in seen:
            found[place] = "a second answer to a question"
        seen.setdefault(key, place)
    return found


def write_answers(answers: Sequence[Answer], file_format: Format) -> str:
    """The text of a file of answers; equal answers give equal bytes.

    Args:
        answers: Of one model.
        file_format: Which file.

    Raises:
        UserError: The format cannot hold some of them (counts them and names the first), or several models answer.
    """
    if file_format not in FORMATS:
        raise invalid("format", file_format, FORMATS)
    if len(generators := {answer.generator for answer in answers}) > 1:
        raise UserError(
            f"answers: of {len(generators)} models ({sorted(generators)[:NAMED]}); valid: one file per model"
        )
    if refused := unheld(answers, file_format):
        causes = ", ".join(dict.fromkeys(refused.values()))
        first = [answers[place].question_id or place for place in list(refused)[:NAMED]]
        raise UserError(
            f"{file_format}: it has no place for {len(refused)} of {len(answers)} answers ({causes}), first {first}; "
            "leave them out (`unheld` names them all), or take another format"
        )
    return FORMATS[file_format].write(answers)
