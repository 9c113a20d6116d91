"""One JSON array of rows, or rows indented over several lines: cut into the values, which are read as lines are.

Only strings, brackets and commas are looked at, so that a value that is no JSON costs itself and not the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from prefsel.ingest.jsonl import Line, LineSplitter

_MARK = re.compile(rb'["\[\]{},]')
_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
"""The inside of a string, as far as it is there."""


class ValueSplitter(LineSplitter):
    """Cuts chunks into the elements of an array, or into objects that follow each other."""

    def __init__(self, max_row_bytes: int, *, is_array: bool) -> None:
        """`is_array`: whether the stream is one array."""
        super().__init__(max_row_bytes)
        self._is_array = is_array
        self._depth, self._is_text, self._rest = 0, False, b""

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The values that `chunk` completes."""
        data, self._rest = self._rest + chunk, b""
        begin = place = 0
        while place < len(data):
            if self._is_text:
                match = _TEXT.match(data, place)
                assert match is not None, "it may be empty"
                place = match.end()
                if place < len(data) and data[place : place + 1] == b"\\":  # what it escapes comes with the next chunk
                    self._rest = data[place:]
                    data = data[:place]
                elif place < len(data):
                    self._is_text, place = False, place + 1
                continue
            mark = _MARK.search(data, place)
            if mark is None:
                break
            place = mark.end()
            ends = self._turn(mark[0])
            if ends is not None:
                self._hold(data[begin : place - 1 + ends])
                yield self.cut()
                self._position += 1 - ends
                begin = place
        self._hold(data[begin:])

    def _turn(self, mark: bytes) -> int | None:
        """Follow a mark outside of strings; where it ends a value: how many of its bytes belong to the value."""
        base = int(self._is_array)
        if mark == b'"':
            self._is_text = True
        elif mark in b"[{":
            self._depth += 1
            if self._is_array and self._depth == 1:  # what stands before the array is no value
                return 0
        elif mark in b"]}":
            self._depth = max(0, self._depth - 1)
            if self._depth < base:
                return 0
            if self._depth == base == 0:
                return 1
        elif self._is_array and self._depth == 1:
            return 0
        return None
