"""What a reader yields: a parsed row, or a row that could not be read, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is kept of a row over the size limit: enough to recognise it, and a file of nothing else stays harmless.
OVERSIZE_KEPT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row that was read.

    `row` counts from 0, blank lines left out. `byte_position` is where the line starts, in the decompressed stream for
    gzip, None for columnar files. `raw` is the line without its line feed, or the columnar row as canonical JSON.
    All text in `value` can be written as UTF-8.
    """

    row: int
    byte_position: int | None
    raw: bytes
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or a stretch of a file, that could not be read; `raw` has `OVERSIZE_KEPT_BYTES` of an oversize row."""

    row: int
    byte_position: int | None
    raw: bytes
    reason: str
    detail: str
