"""The first rows of a source, read as ingest reads them: what is in them, what is missing, what nothing reads.

P: labelled pairs of the rows looked at.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prefsel.config import FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.field_use import Asked
from prefsel.ingest.formats import FORMATS
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.row_error import RowError
from prefsel.ingest.rows import BadRow, RawRow
from prefsel.ingest.windows import Window, ingest_windows

MAX_ROWS = 5000
MAX_BYTES = 64 << 20
"""Of raw rows: what is looked at is one window, so that equal rows are found wherever they stand in it."""
MAX_ROW_BYTES = 16 << 20
QUANTILES = (0.5, 0.95, 1.0)


@dataclass(frozen=True)
class FieldUse:
    """A field of the rows, `completions[].model` for one inside a list."""

    name: str
    present: int
    """Rows, or elements of the list, in which it is there and not null."""
    of: int
    use: Literal["read", "number", "ignored"]
    """`read`: text or label that ingest takes; `number`: kept beside the completions; `ignored`: nobody looks."""


@dataclass(frozen=True)
class Sniffed:
    """What the first rows of one source hold."""

    path: str
    num_files: int
    num_rows: int
    is_all: bool
    """Whether these are all rows of the source."""
    format: str
    reasons: dict[str, int]
    """Rows that ingest would quarantine, by reason."""
    num_duplicate: int
    """Rows that add nothing: the same text was there already."""
    num_ties: int
    num_prompts: int
    num_completions: int
    num_pairs: int
    num_contradictions: int
    """Pairs that are also there with the opposite label."""
    aspects: dict[str, int]
    """Pairs by the aspect they are labelled for; those without one are left out."""
    numbers: dict[str, int]
    """Pairs of which both completions came with a number, by what it is called."""
    characters: dict[str, tuple[int, ...]]
    """Of prompt, chosen and rejected: characters at `QUANTILES`."""
    longer_share: float
    """Share of pairs whose chosen completion is the longer one."""
    fields: list[FieldUse]


def sniff(path: str) -> Sniffed:
    """Look at the first `MAX_ROWS` rows of a path, folder, glob or URI.

    Raises:
        UserError: nothing readable there, or no row that looks like a format of ingest.
    """
    files = list_files(path)
    rows, is_all = _first_rows(files)
    if not rows:
        raise UserError(f"{path}: no row in {len(files)} file(s)")
    window = _window(rows, path)
    values = [row.value for row in rows if isinstance(row, RawRow)]
    pairs = _pairs(window)
    sizes_P3 = np.array([[pair[side] for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    ids = {pair["pair_id"] for pair in pairs}
    return Sniffed(
        path=path,
        num_files=len(files),
        num_rows=len(rows),
        is_all=is_all,
        format=window.format,
        reasons=window.reasons,
        num_duplicate=window.num_duplicate,
        num_ties=window.num_ties,
        num_prompts=window.groups.num_rows,
        num_completions=sum(len(one) for one in window.groups["completions"].to_pylist()),
        num_pairs=len(pairs),
        num_contradictions=sum(pair["mirror_id"] in ids for pair in pairs),
        aspects=dict(sorted(Counter(pair["aspect"] for pair in pairs if pair["aspect"] is not None).items())),
        numbers=dict(sorted(Counter(name for pair in pairs for name in pair["numbers"]).items())),
        characters=_quantiles(sizes_P3),
        longer_share=float(np.mean(sizes_P3[:, 1] > sizes_P3[:, 2])) if len(pairs) else 0.0,
        fields=_fields(values, window.format, set().union(*(pair["numbers"] for pair in pairs))),
    )


def _first_rows(files: Sequence[str]) -> tuple[list[RawRow | BadRow], bool]:
    """Rows up to the limits, and whether there are no more."""
    rows: list[RawRow | BadRow] = []
    size = 0
    for row in itertools.chain.from_iterable(read_rows(file, max_row_bytes=MAX_ROW_BYTES) for file in files):
        if len(rows) == MAX_ROWS or size > MAX_BYTES:
            return rows, False
        rows.append(row)
        size += len(row.raw)
    return rows, True


def _window(rows: Sequence[RawRow | BadRow], path: str) -> Window:
    windows = list(
        ingest_windows(iter(rows), file=path, format="auto", options=FormatOptions(), rows_per_shard=len(rows))
    )
    assert len(windows) == 1, "as many rows as were given, and fewer bytes than a window holds, are one window"
    return windows[0]


def _pairs(window: Window) -> list[dict[str, Any]]:
    """Identifiers, aspect, characters of prompt and sides, and names of the numbers that both sides came with."""
    groups = {group["prompt_id"]: group for group in window.groups.to_pylist()}
    found = []
    for pair in window.pairs.to_pylist():
        group = groups[pair["prompt_id"]]
        chosen, rejected = (group["completions"][pair[side]] for side in ("chosen", "rejected"))
        found.append(
            {
                **{key: pair[key] for key in ("pair_id", "mirror_id", "aspect")},
                "prompt": _size(group["prompt"]),
                "chosen": _size(chosen["messages"]),
                "rejected": _size(rejected["messages"]),
                "numbers": dict(chosen["ratings"]).keys() & dict(rejected["ratings"]).keys(),
            }
        )
    return found


def _size(messages: Sequence[Mapping[str, str | None]]) -> int:
    return sum(len(message["content"] or "") for message in messages)


def _quantiles(sizes_P3: np.ndarray) -> dict[str, tuple[int, ...]]:
    if not len(sizes_P3):
        return {}
    found = np.quantile(sizes_P3, QUANTILES, axis=0, method="higher").astype(int)
    return {side: tuple(found[:, place].tolist()) for place, side in enumerate(("prompt", "chosen", "rejected"))}


# ---------------------------------------------------------------------------------------------- who reads which field


def _fields(values: Sequence[dict[str, Any]], format: str, numbers: set[str]) -> list[FieldUse]:
    """Every field of the rows in order of appearance; what an adapter asks for is known by watching it."""
    asked: set[str] = set()
    for value in values:
        try:
            FORMATS[format](Asked(value, asked), FormatOptions())
        except RowError:
            continue  # counted by reason
    present: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for value in values:
        for name, holder in _named(value):
            present[name] += holder is not None
        of.update(_lengths(value))
    ignored = {name for name in present if "[]." not in name and name not in asked}
    kept = {f"{name}{side}" for name in numbers for side in ("_chosen", "_rejected")}
    return [
        FieldUse(
            name,
            count,
            of[name.rpartition("[].")[0]] if "[]." in name else len(values),
            "number" if name in kept else "read" if name in asked else "ignored",
        )
        for name, count in present.items()
        if "[]." not in name or name.rpartition("[].")[0] not in ignored
    ]


def _named(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a row and of the rows in its lists, messages left out: a message is role and content."""
    for key, found in value.items():
        yield key, found
        if isinstance(found, list) and not _are_messages(found):
            for one in found:
                if isinstance(one, dict):
                    yield from ((f"{key}[].{name}", inside) for name, inside in one.items())


def _lengths(value: Mapping[str, Any]) -> dict[str, int]:
    return {key: len(found) for key, found in value.items() if isinstance(found, list) and not _are_messages(found)}


def _are_messages(found: Sequence[Any]) -> bool:
    return all(isinstance(one, dict) and "role" in one and "content" in one for one in found)
