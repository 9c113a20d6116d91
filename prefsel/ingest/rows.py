"""What a reader yields: a parsed row, or a row that could not be read, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is kept of a row over the size limit: enough to recognise it, and a file of nothing else stays harmless.
OVERSIZE_KEPT_BYTES = 64 * 1024

REASONS = {
    "not_json": "the line is not JSON",
    "missing_field": "a field the format needs is absent or null",
    "wrong_type": "a field, or the row itself, has another type than the format says",
    "empty_prompt": "the prompt has no text",
    "empty_completion": "a completion, or a message of it, has no text",
    "identical_completions": "chosen and rejected, or all completions, are the same text",
    "too_few_completions": "fewer than two completions",
    "prompt_mismatch": "chosen and rejected do not answer the same prompt",
    "non_finite_score": "a score is NaN or infinite",
    "undecodable": "the bytes are not UTF-8, or the text holds lone surrogates",
    "row_too_large": "the row is over the size limit",
    "truncated_gzip": "the gzip data ends early or is corrupt; stands for the rest of the file",
    "truncated_parquet": "the Parquet file, or one of its row groups, is cut or corrupt; stands for all rows of it",
    "truncated_arrow": "the Arrow data is cut or corrupt; stands for the rest of the file",
}
"""Every reason a row can be quarantined for."""


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
