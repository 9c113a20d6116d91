"""JSON lines from a stream of bytes: flat memory however long a line or dense the compression."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from prefsel.ingest.compression import BrokenStream
from prefsel.ingest.rows import OVERSIZE_KEPT_BYTES, BadRow, RawRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


BYTES_A_VALUE, MIN_VALUES = 32, 200_000
"""A row may hold a value for so many bytes of the size limit: as Python objects `[[],[],…]` is thirty times as large.
Fewer values than the second number are always read."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class Line(NamedTuple):
    """One line without its line feed; `data` is only its beginning when `num_bytes` is over the limit."""

    byte_position: int
    data: bytes
    num_bytes: int


class LineSplitter:
    """Cuts chunks into lines and holds the unfinished one: never more of it than the limit and one chunk."""

    def __init__(self, max_row_bytes: int) -> None:
        self._limit = max_row_bytes
        self._parts: list[bytes] = []
        self._position = 0
        self._num_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that `chunk` completes; where there is nothing but white space, which is no row, it has none."""
        if chunk.isspace() and self._num_bytes + len(chunk) <= self._limit and all(map(_is_space, self._parts)):
            end = chunk.rfind(b"\n") + 1  # a gigabyte of empty lines, packed in a megabyte, took 17 minutes one by one
            if end:
                self._position += self._num_bytes + end
                self._parts, self._num_bytes = [], 0
            self._hold(chunk[end:])
            return
        first, *others = chunk.split(b"\n")
        self._hold(first)
        for piece in others:
            yield self.cut()
            self._position += 1
            self._hold(piece)

    def cut(self) -> Line:
        """What is held, as a line."""
        line = Line(self._position, b"".join(self._parts), self._num_bytes)
        self._position += self._num_bytes
        self._parts, self._num_bytes = [], 0
        return line

    def _hold(self, piece: bytes) -> None:
        self._num_bytes += len(piece)
        self._parts.append(piece)
        if self._num_bytes > self._limit:
            self._parts = [b"".join(self._parts)[:OVERSIZE_KEPT_BYTES]]


def _is_space(part: bytes) -> bool:
    return not part or part.isspace()


def read_jsonl(
    pieces: Iterator[bytes], *, max_row_bytes: int, broken: str, splitter: LineSplitter | None = None
) -> Iterator[RawRow | BadRow]:
    """The rows of a stream of JSON lines.

    Blank lines are not rows: they are skipped and not numbered. The last line needs no line feed, except in compressed
    data that breaks off: there it is the raw of the one row that ends the file.

    Args:
        pieces: the bytes, front to back.
        max_row_bytes: longest line that is parsed; a longer one is never held in memory whole.
        broken: the reason of the row that stands for compressed data that breaks off.
        splitter: what cuts the bytes into rows, where these are no lines.
    """
    splitter = splitter or LineSplitter(max_row_bytes)
    row = 0
    try:
        for chunk in pieces:
            for line in splitter.feed(chunk):
                if not _is_blank(line):
                    yield _parsed(row, line, max_row_bytes)
                    row += 1
    except BrokenStream as error:
        last = splitter.cut()
        yield BadRow(row, last.byte_position, last.data, broken, str(error))
        return
    last = splitter.cut()
    if not _is_blank(last):
        yield _parsed(row, last, max_row_bytes)


def _parsed(row: int, line: Line, max_row_bytes: int) -> RawRow | BadRow:
    position, raw, num_bytes = line
    if num_bytes > max_row_bytes:
        return BadRow(row, position, raw, "row_too_large", f"{num_bytes} bytes; the limit is {max_row_bytes}")
    most = max(MIN_VALUES, max_row_bytes // BYTES_A_VALUE)
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > most and (values := _num_values(raw)) > most:
        return BadRow(
            row, position, raw[:OVERSIZE_KEPT_BYTES], "row_too_large", f"{values} values; the limit is {most}"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(row, position, raw, "undecodable", f"{error.reason} at byte {error.start} of the row")
    if position == 0 and raw.startswith(BYTE_ORDER_MARK):
        text = text[1:]
    try:
        value = json.loads(text)
    except RecursionError:
        return BadRow(row, position, raw, "not_json", "nested too deeply")
    except ValueError as error:  # besides bad syntax: an integer of more than 4 300 digits
        return BadRow(row, position, raw, "not_json", str(error))
    if not isinstance(value, dict):
        return BadRow(row, position, raw, "wrong_type", f"a row is an object; got {type(value).__name__}")
    # Only an escape can make a lone surrogate, so rows without one (nearly all) skip the test that writes them out.
    if (b"\\ud" in raw or b"\\uD" in raw) and not is_encodable(value):
        return BadRow(row, position, raw, "undecodable", "the text holds a lone surrogate")
    return RawRow(row, position, raw, value)


def _num_values(raw: bytes) -> int:
    """About how many values a row of JSON holds, outside of its texts."""
    bare = _STRING.sub(b"", raw)
    return bare.count(b",") + bare.count(b"[") + bare.count(b"{")


def is_encodable(value: Any) -> bool:
    """Whether all text of a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_blank(line: Line) -> bool:
    """White space only; of a line over the limit only the beginning is known, so it is never taken for blank."""
    return line.num_bytes == len(line.data) and (not line.data or line.data.isspace())
