"""A stream of Arrow batches → one file, batch by batch, in sight only when it is whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from prefsel.errors import UserError, invalid

KINDS = (".parquet", ".csv", ".jsonl")


def export_file(schema: pa.Schema, batches: Iterable[pa.RecordBatch], output: str) -> int:
    """Write batches to a file of the kind its name ends with; one batch is in memory at a time.

    Args:
        schema: Of the batches.
        batches: What to write.
        output: A local path that ends with `.parquet`, `.csv` (lists and maps as JSON text) or `.jsonl`.

    Returns:
        The rows written.

    Raises:
        UserError: The name ends otherwise, is a URI or a folder, or nothing can be written there.
    """
    target = Path(output).expanduser()
    if "://" in output or target.suffix not in KINDS:
        raise invalid("--output", output, f"a local file that ends with {', '.join(KINDS)}")
    if target.is_dir() or not target.parent.is_dir():
        what = target if target.is_dir() else target.parent
        raise invalid(
            "--output", output, f"a file in a folder; {str(what)!r} is {'a' if what.is_dir() else 'no'} folder"
        )
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        stream = temporary.open("wb")
    except OSError as error:
        raise UserError(f"--output: cannot write in {str(target.parent)!r}: {error.strerror}") from error
    try:
        with stream:
            rows = write_batches(schema, batches, stream, target.suffix)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def write_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], stream: BinaryIO, kind: str) -> int:
    """Write batches to an open stream as one of `KINDS`; returns the rows written."""
    rows = 0
    if kind == ".jsonl":
        for batch in batches:
            rows += batch.num_rows
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                stream.write(json.dumps(row, ensure_ascii=False, default=_text).encode() + b"\n")
        return rows
    flat = schema if kind == ".parquet" else _flat(schema)
    writer: Any = pq.ParquetWriter(stream, schema) if kind == ".parquet" else pa_csv.CSVWriter(stream, flat)
    with writer:
        for batch in batches:
            rows += batch.num_rows
            writer.write_batch(batch if kind == ".parquet" else _flattened(batch, flat))
    return rows


def _text(value: object) -> str:
    """Identifiers as hex, everything else (times, decimals) as it is printed."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _flat(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(one.name, pa.string() if pa.types.is_nested(one.type) else one.type) for one in schema])


def _flattened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Lists and maps as JSON text: CSV has none."""
    columns = [
        pa.array(
            [
                None if v is None else json.dumps(v, ensure_ascii=False)
                for v in column.to_pylist(maps_as_pydicts="strict")
            ],
            pa.string(),
        )
        if pa.types.is_nested(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
