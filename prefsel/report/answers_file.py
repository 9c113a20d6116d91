"""What a model answered in its evaluation, as a file that a public judge reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from prefsel.display import redact
from prefsel.errors import UserError, invalid
from prefsel.evaluate.answer_formats import FORMATS, Answer
from prefsel.evaluate.answers import Format, read_questions, write_answers
from prefsel.report.examples import transcript
from prefsel.workspace.documents import read_document
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, load_summary
from prefsel.workspace.storage import Storage

NAMED = 3


def write_answers_file(
    storage: Storage, model: str, file_format: str, output: str, *, questions: str | None = None
) -> int:
    """Write the answers of an evaluated model; returns how many.

    Args:
        storage: The workspace.
        model: Its name.
        file_format: Of `prefsel.evaluate.answers`.
        output: The file.
        questions: The benchmark's file of questions: only these are written, in their order, with their ids and
            further fields. None: all answers, each question called by its prompt_id.

    Raises:
        UserError: The model was not evaluated here, its evaluation lacks an answer to a question, the format cannot
            hold what it answered, or a file cannot be read or written.
    """
    if file_format not in FORMATS:
        raise invalid("--for", file_format, FORMATS)
    kind = cast(Format, file_format)
    report = find_evaluation(storage, model)
    answers = list(_answers(storage, report, model))
    if questions is not None:
        answers = _asked(answers, questions, kind)
    text = write_answers(answers, kind)
    try:
        Path(output).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}") from error
    return len(answers)


def find_evaluation(storage: Storage, model: str) -> StageReport:
    """The newest evaluation of a model.

    Raises:
        UserError: There is none; names the models that were evaluated.
    """
    found: dict[str, list[StageReport]] = {}
    for folder in storage.folders("evaluations"):
        report = load_summary(storage, f"evaluations/{folder}")
        if report is not None and report.stage == "evaluate":
            found.setdefault(report.name, []).append(report)
    if model not in found:
        raise invalid("model", model, sorted(found) or f"none: nothing was evaluated in {redact(storage.uri)}")
    if len(found[model]) == 1:
        return found[model][0]
    runs = sorted(storage.files("runs"), key=lambda name: name.rsplit("-", 3)[-3:])
    for run in reversed(runs):
        artifacts = {stage["artifact"] for stage in read_document(storage, run)["stages"]}
        if named := [report for report in found[model] if report.artifact in artifacts]:
            return named[0]
    folders = [report.artifact for report in found[model]]
    raise UserError(f"model {model!r}: {len(folders)} evaluations and no run that names one of them: {folders[:NAMED]}")


def _answers(storage: Storage, report: StageReport, model: str) -> Iterator[Answer]:
    """All answers of a model, in the order of its shards; a question is called by its prompt_id."""
    artifact = Artifact(storage, report.details["groups"][model])
    for shard in report.details["shards"]:
        for row in artifact.read(shard, ["prompt_id", "prompt", "completions", "responses"]).to_pylist():
            prompt = tuple({key: value for key, value in one.items() if value is not None} for one in row["prompt"])
            for completion, response in zip(row["completions"], row["responses"]):
                said = transcript(completion["messages"])
                number: int = response["sample"]
                yield Answer(prompt, said, model, row["prompt_id"].hex(), number, response["num_tokens"])


def _asked(answers: list[Answer], questions: str, file_format: Format) -> list[Answer]:
    """The answers to the questions of a file, in its order, with its ids and its fields."""
    try:
        text = Path(questions).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions: cannot read {questions}: {error}") from error
    by_prompt: dict[str, list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(_key(answer.prompt or ()), []).append(answer)
    found, lacking = [], []
    for question in read_questions(text, file_format):
        many = by_prompt.get(_key(question.prompt), [])
        if not many:
            lacking.append(str(question.question_id or question.prompt[-1]["content"])[:40])
        found += [
            replace(answer, rest=question.rest, question_id=question.question_id or answer.question_id)
            for answer in many
        ]
    if lacking:
        raise UserError(
            f"--questions: {len(lacking)} of them have no answer in the evaluation, first: {lacking[:NAMED]}; valid: "
            "questions whose prompts were evaluated, all of them with an answer of use"
        )
    return found


def _key(prompt: Any) -> str:
    return json.dumps([[one["role"], one["content"]] for one in prompt])
