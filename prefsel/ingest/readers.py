"""One input file → its rows, streaming in flat memory. What cannot be read comes out as `BadRow`, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from prefsel.errors import invalid
from prefsel.ingest import hub
from prefsel.ingest.columnar import guarded, read_arrow, read_parquet
from prefsel.ingest.jsonl import read_jsonl
from prefsel.ingest.locations import kind_of, list_files, open_random, open_stream
from prefsel.ingest.rows import OVERSIZE_KEPT_BYTES, BadRow, RawRow

__all__ = ["OVERSIZE_KEPT_BYTES", "BadRow", "RawRow", "list_files", "read_rows"]


def read_rows(uri: str, *, max_row_bytes: int, filesystem: pafs.FileSystem | None = None) -> Iterator[RawRow | BadRow]:
    """The rows of one file, in order; rows are numbered from 0, blank lines of JSONL left out.

    Args:
        uri: a path, a URI of any file system pyarrow knows (`s3://`, `gs://`, `hf://`, …), or a `datasets:` name. Its
            ending says how it is read, see `locations.KINDS`.
        max_row_bytes: a row that is longer (as JSON) becomes `row_too_large`.
        filesystem: where `uri` is a path, if not a URI or a local file.

    Returns:
        An iterator of `RawRow` and `BadRow`. A lost connection raises `OSError` from it: retrying can help there.

    Raises:
        UserError: nothing readable lies at `uri`, or its ending is unknown.
    """
    if max_row_bytes < 1:
        raise invalid("max_row_bytes", max_row_bytes, "at least 1")
    kind = kind_of(uri)
    if kind == "datasets":
        tables = hub.read_tables(uri)
        return guarded(lambda: tables, None, "truncated_arrow", "data set", 0, max_row_bytes)
    if kind == "jsonl" or kind == "jsonl.gz":
        file = open_stream(uri, filesystem)
        return _closing(file, read_jsonl(file, max_row_bytes=max_row_bytes, is_gzip=kind == "jsonl.gz"))
    file = open_random(uri, filesystem)
    read = read_parquet if kind == "parquet" else read_arrow
    return _closing(file, read(file, max_row_bytes=max_row_bytes))


def _closing(file: Any, rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    with file:
        yield from rows
