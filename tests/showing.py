"""Which files of a workspace hold an id or a text: a search over all bytes, Parquet without its compression."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.workspace.storage import Storage


def showing(storage: Storage, ids: Collection[bytes], texts: Collection[str] = ()) -> set[str]:
    """Files, records of withdrawals aside, that hold an id, raw or in hex, or a text."""
    needles = [*ids, *(one.hex().encode() for one in ids), *(text.encode() for text in texts)]
    root = Path(storage.uri)
    files = [file for file in root.rglob("*") if file.is_file() and "withdrawn" not in file.relative_to(root).parts]
    return {str(file.relative_to(root)) for file in files if any(one in _readable(file) for one in needles)}


def _readable(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix != ".parquet":
        return data
    sink = pa.BufferOutputStream()
    table = pq.read_table(file)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
