"""The pairs of a selection → a folder that a trainer opens: one data file, and a page with the lines that read it."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.errors import UserError, invalid
from prefsel.models.writer import as_they_came
from prefsel.pairs.card import folder_page
from prefsel.pairs.trainers import FILE, TRAINERS, CannotHold, Trainer, dataset_info
from prefsel.report.opened import Workspace
from prefsel.schema import FLIPPED, MESSAGES

TEXTS = ("prompt", "chosen", "rejected")
IDENTITY = ("pair_id", "prompt_id", "source", "aspect", "label_margin", FLIPPED)
NUMBERS = ("rm_", "logps_", "dlogps_", "num_tokens_", "score_", "percentile_")
"""Beginnings of the columns of numbers that go along."""


@dataclass
class Written:
    """What became of the pairs of a selection."""

    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Pairs that the trainer cannot hold, by what it has no place for."""
    first: dict[str, str] = field(default_factory=dict)
    """The pair_id of the first pair of each reason."""

    def reasons(self) -> str:
        """The reasons with their counts and first pairs, in words."""
        return "; ".join(f"{count:,} × {why} (first {self.first[why]})" for why, count in self.refused.most_common())


def write_folder(opened: Workspace, selection: str, trainer: str, output: str, *, leave_out: bool = False) -> Written:
    """Write the pairs that a selection kept as a trainer takes them; one shard is in memory at a time.

    Args:
        opened: The workspace.
        selection: Of the selection or control.
        trainer: A name of `TRAINERS`.
        output: A local folder, new or empty. Its path holds no "@" and no comma, where trainers cut paths.
        leave_out: Leave out what the trainer cannot hold instead of refusing.

    Returns:
        The rows written, and what was left out.

    Raises:
        UserError: The trainer, the selection or the folder is none of these, or the trainer cannot hold some pair.
    """
    if trainer not in TRAINERS:
        raise invalid("--for", trainer, TRAINERS)
    made, pairs = TRAINERS[trainer], opened.pairs(selection=selection)
    folder = _folder(output)
    beside = [one for one in pairs.schema if one.name in IDENTITY or one.name.startswith(NUMBERS)]
    schema = pa.schema([*_columns(made, opened.contents.has_rest), *beside])
    written = Written()
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        stream = temporary.open("wb")
    except OSError as error:
        raise UserError(f"--output: cannot write in {str(folder)!r}: {error.strerror}") from error
    try:
        with stream, pq.ParquetWriter(stream, schema) as writer:
            for batch in pairs:
                writer.write_batch(_converted(batch, schema, made, written))
        if written.refused and not leave_out:
            raise UserError(
                f"export --for {trainer}: {made.title} cannot hold {written.refused.total():,} of "
                f"{written.rows + written.refused.total():,} pairs: {written.reasons()}; "
                "add --leave-out to write the others, or export for another trainer"
            )
        if not written.rows:
            raise UserError(f"export --for {trainer}: no pair is left to write: {written.reasons() or 'none was kept'}")
        os.replace(temporary, folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    if trainer == "llamafactory":
        entry = json.dumps(dataset_info(selection, schema.names), indent=1)
        (folder / "dataset_info.json").write_text(entry, encoding="utf-8")
    page = folder_page(
        made, folder=str(folder), name=selection, rows=written.rows, columns=schema.names, left=written.reasons()
    )
    (folder / "README.md").write_text(page, encoding="utf-8")
    return written


def _folder(output: str) -> Path:
    folder = Path(output).expanduser()
    if "://" in output or "@" in output or "," in output:
        raise invalid("--output", output, 'a local folder without "@" and "," in its path: trainers cut paths there')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise invalid("--output", output, "a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make {str(folder)!r}: {error.strerror}") from error
    return folder


def _columns(trainer: Trainer, has_rest: bool) -> list[pa.Field]:
    """The columns of messages. Where some hold more than text, each message is JSON as it came, which `datasets` reads
    as an object: a struct would give every message every key, and templates ask which keys there are."""
    if not trainer.has_lists:
        message = MESSAGES.value_type
        columns = [("messages", MESSAGES), ("chosen", message), ("rejected", message)]
    else:
        kind = pa.list_(pa.json_()) if has_rest else MESSAGES
        columns = [(name, kind) for name in TEXTS]
    if has_rest and "tools" in trainer.convert(*([{"role": role, "content": role}] for role in _ROLES)):
        columns.append(("tools", pa.string()))
    return [pa.field(name, kind) for name, kind in columns]


_ROLES = ("user", "assistant", "assistant")


def _converted(batch: pa.RecordBatch, schema: pa.Schema, trainer: Trainer, written: Written) -> pa.RecordBatch:
    rows: list[dict[str, Any]] = []
    kept = []
    for number, (pair_id, *sides) in enumerate(_texts(batch)):
        try:
            rows.append(trainer.convert(*sides))
            kept.append(number)
        except CannotHold as refused:
            written.refused[str(refused)] += 1
            written.first.setdefault(str(refused), pair_id)
    written.rows += len(rows)
    taken = batch.take(pa.array(kept, pa.int64()))
    columns = []
    for one in schema:
        if one.name in taken.schema.names and one.name not in TEXTS:
            columns.append(taken[one.name])
        else:
            columns.append(_array([row[one.name] for row in rows], one.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _texts(batch: pa.RecordBatch) -> Iterator[tuple[str, Any, Any, Any]]:
    sides = [[as_they_came(messages) for messages in batch[name].to_pylist()] for name in TEXTS]
    return zip(batch["pair_id"].to_pylist(), *sides)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not (pa.types.is_list(kind) and isinstance(kind.value_type, pa.BaseExtensionType)):
        return pa.array(values, kind)
    texts = pa.array(
        [[json.dumps(one, ensure_ascii=False) for one in messages] for messages in values], pa.list_(pa.string())
    )
    flat = pa.ExtensionArray.from_storage(kind.value_type, texts.values)
    return pa.ListArray.from_arrays(texts.offsets, flat, type=kind)
