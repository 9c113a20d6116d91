"""One JSON array of rows, or rows that are indented over several lines: streamed, one row in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ijson

from prefsel.ingest.columnar import row_of
from prefsel.ingest.compression import BrokenStream
from prefsel.ingest.jsonl import is_encodable
from prefsel.ingest.rows import BadRow, RawRow


def read_json_values(stream: Any, *, max_row_bytes: int, is_array: bool) -> Iterator[RawRow | BadRow]:
    """The rows of a stream of JSON: the elements of its one array, or its values one after the other.

    Args:
        stream: A binary file, read front to back.
        max_row_bytes: A row that is longer as canonical JSON becomes `row_too_large`.
        is_array: Whether the stream is one array.
    """
    row = 0
    try:
        for value in ijson.items(stream, "item" if is_array else "", use_float=True, multiple_values=not is_array):
            yield _row(row, value, max_row_bytes)
            row += 1
    except BrokenStream as error:
        yield BadRow(row, None, b"", "truncated_stream", str(error))
    except (ijson.JSONError, UnicodeDecodeError) as error:
        yield BadRow(row, None, b"", "not_json", f"the JSON breaks off here: {error}")


def _row(row: int, value: Any, max_row_bytes: int) -> RawRow | BadRow:
    if not isinstance(value, dict):
        return BadRow(row, None, b"", "wrong_type", f"a row is an object; got {type(value).__name__}")
    if not is_encodable(value):
        return BadRow(row, None, b"", "undecodable", "the text holds a lone surrogate")
    return row_of(row, value, max_row_bytes)
