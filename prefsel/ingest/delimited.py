"""CSV and TSV: a header, then rows of text; a cell may hold line breaks and quotes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any

from prefsel.errors import UserError
from prefsel.ingest.columnar import row_of
from prefsel.ingest.compression import BrokenStream
from prefsel.ingest.rows import BadRow, RawRow

DELIMITERS = (",", "\t", ";")
"""What stands between cells; spreadsheets write the last where a comma is the decimal mark."""


def read_delimited(stream: Any, *, max_row_bytes: int, delimiter: str) -> Iterator[RawRow | BadRow]:
    """The rows of a table of text; an empty cell is null, a row of another width than the header is refused.

    Args:
        stream: A binary file, read front to back.
        max_row_bytes: A row that is longer as JSON, and a cell that is longer alone, become `row_too_large`.
        delimiter: What stands between two cells; another of `DELIMITERS` where the header holds that one alone.

    Raises:
        UserError: Two columns have one name, or a name begins with a space.
    """
    csv.field_size_limit(max_row_bytes)
    # Bytes that are no UTF-8 become lone surrogates, which the row is then refused for.
    lines = io.TextIOWrapper(io.BufferedReader(_Readable(stream)), "utf-8-sig", errors="surrogateescape", newline="")
    first = lines.readline(max_row_bytes)
    if delimiter not in first:
        delimiter = next((mark for mark in DELIMITERS if mark in first), delimiter)
    table = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header = next(table, [])
    if spaced := next((name for name in header if name != name.strip()), None):
        raise UserError(
            f"source: a column of the table is called {spaced!r}, with a space around it; quotes after a space do not "
            "count in CSV, so write the table without spaces beside its commas"
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"source: two columns of the table are called {twice!r}; rename one")
    row = 0
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            reason = "row_too_large" if "field larger" in str(error) else "not_delimited"
            yield BadRow(row, None, b"", reason, str(error))
            return
        except BrokenStream as error:
            yield BadRow(row, None, b"", "truncated_stream", str(error))
            return
        if cells is None:
            return
        if cells:  # a blank line is no row
            yield _row(row, header, cells, max_row_bytes)
            row += 1


def _row(row: int, header: list[str], cells: list[str], max_row_bytes: int) -> RawRow | BadRow:
    raw = "\t".join(cells).encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        return BadRow(row, None, raw, "not_delimited", f"{len(cells)} cells; the header has {len(header)}")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return BadRow(row, None, raw, "undecodable", "the bytes are not UTF-8")
    return row_of(row, {name: cell or None for name, cell in zip(header, cells)}, max_row_bytes)


class _Readable(io.RawIOBase):
    """A stream as `io` wants it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
