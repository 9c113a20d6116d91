"""JSON documents of a workspace: ledger objects, seals, summaries, the catalog, records of files, manifests.

The last key of each, `digest`, covers the path and every byte before it: what was cut, altered, or copied from another
place is found when it is read. Documents of earlier versions have no digest: they are known by the keys they have, so
that another file in the place of one is found too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from prefsel.workspace.patience import confirmed
from prefsel.workspace.storage import Storage, digest

_LAST = re.compile(rb'(?:, |,\n +)"digest": "([0-9a-f]{32})"\n?\}\Z')
_TAIL_BYTES = 100
"""The last key lies within them."""
_EARLIER: tuple[tuple[str, type, set[str]], ...] = (
    ("/catalog.json", list, {"name", "role", "files"}),
    ("/_ledger/all.json", list, {"shard", "rows", "bytes", "content", "input", "attempt"}),
    ("/_ledger/files.json", dict, {"content", "files", "info"}),
    ("/_ledger/", dict, {"shard", "rows", "bytes", "content", "input", "attempt"}),
    ("/_files/", dict, {"uri", "shards", "seconds"}),
    ("/summary.json", dict, {"stage", "name", "unit", "rows_in", "rows_out", "dropped", "shards", "artifact"}),
    ("/runs/", dict, {"run", "config_yaml", "artifacts", "stages"}),
)
"""What documents without a digest are, by what stands in their path: a table or a list of such, and keys of a table."""


def to_document(path: str, table: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """`table`, which is not empty, as the bytes of the document at `path`."""
    body = json.dumps(table, indent=indent).encode()[:-1].rstrip()
    before, after = (b",\n" + b" " * indent, b"\n}") if indent else (b", ", b"}")
    return b"".join((body, before, b'"digest": "', _digest_of(path, body).encode(), b'"', after))


def parse_document(path: str, data: bytes) -> Any:
    """What `to_document` was given: a table, or of an earlier version's document any JSON.

    Raises:
        ValueError: says what is wrong with the bytes.
    """
    has_digest = _compare(path, data)
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{len(data):,} bytes that are no JSON") from error
    if has_digest:
        del table["digest"]
    elif isinstance(table, dict) and ("digest" in table or any(_is_digest(one) for one in list(table.values())[-1:])):
        raise ValueError("its last key is no digest any more")
    elif not _is_earlier(path, table):
        raise ValueError("another file lies in its place")
    return table


def _compare(path: str, data: bytes) -> bool:
    """Compare a document with its digest; whether it has one.

    Raises:
        ValueError: it is empty, or not what was written.
    """
    if not data:
        raise ValueError("it is empty")
    last = _LAST.search(data, max(0, len(data) - _TAIL_BYTES))
    if last is not None and _digest_of(path, data[: last.start()]) != last[1].decode():
        raise ValueError("its digest is not that of its bytes and its path")
    return last is not None


def write_document(storage: Storage, path: str, table: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a document, wholly or not at all."""
    storage.write(path, to_document(path, table, indent=indent))


def read_document(storage: Storage, path: str) -> Any:
    """A document that must be there.

    Raises:
        DamagedError: it is gone, or not what was written.
    """

    def read() -> Any:
        found = find_document(storage, path)
        if found is None:
            raise storage.damaged(path, "missing")
        return found

    return confirmed(storage.is_local, read)


def find_document(storage: Storage, path: str) -> Any | None:
    """A document, or None where nothing lies at `path`.

    Raises:
        DamagedError: it is not what was written.
    """

    return _found(storage, path, lambda data: parse_document(path, data))


def check_document(storage: Storage, path: str) -> bool:
    """Compare a document with its digest, without making anything of it; whether there is one.

    Raises:
        DamagedError: it is not what was written.
    """
    return (
        _found(storage, path, lambda data: _compare(path, data) or parse_document(path, data) is not None) is not None
    )


def _found(storage: Storage, path: str, parse: Callable[[bytes], Any]) -> Any | None:
    def read() -> Any | None:
        try:
            data = storage.read(path)
        except FileNotFoundError:
            return None
        try:
            return parse(data)
        except ValueError as error:
            raise storage.damaged(path, "altered", str(error)) from error

    return confirmed(storage.is_local, read)


def _digest_of(path: str, body: bytes) -> str:
    return digest(path.encode() + b"\0" + body)


def _is_earlier(path: str, table: Any) -> bool:
    """Whether a document without a digest is what an earlier version wrote at `path`."""
    kind, keys = next((known[1:] for known in _EARLIER if known[0] in f"/{path}"), (None, set()))
    rows = table if isinstance(table, list) else [table]
    return type(table) is kind and bool(rows) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None
