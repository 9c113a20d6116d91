"""One input file → its rows, streaming in flat memory. What cannot be read comes out as `BadRow`, in place.

datasets: name ─▶ tables       file ─▶ first bytes ─▶ compression ─▶ content ─▶ Parquet · Arrow · JSON · CSV
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from prefsel.display import redact
from prefsel.errors import UserError, invalid
from prefsel.ingest import hub
from prefsel.ingest.columnar import guarded, read_arrow, read_parquet
from prefsel.ingest.compression import MAGIC, BrokenStream, Unread, chunks, compression_of, decompressed
from prefsel.ingest.delimited import read_delimited
from prefsel.ingest.json_array import ValueSplitter
from prefsel.ingest.jsonl import BYTE_ORDER_MARK, read_jsonl
from prefsel.ingest.locations import is_dataset_name, list_files, open_random, open_stream, plain_name
from prefsel.ingest.remote import reachable, reached
from prefsel.ingest.rows import OVERSIZE_KEPT_BYTES, BadRow, RawRow

__all__ = ["OVERSIZE_KEPT_BYTES", "BadRow", "RawRow", "list_files", "read_rows"]

HEAD_BYTES = 1 << 16
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_OTHERS = {b"PK\x03\x04": "a ZIP archive", b"SQLite format 3": "an SQLite file", b"\x89HDF": "an HDF5 file"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
TABLES = {".csv": ",", ".tsv": "\t"}


def read_rows(uri: str, *, max_row_bytes: int, filesystem: pafs.FileSystem | None = None) -> Iterator[RawRow | BadRow]:
    """The rows of one file, in order; rows are numbered from 0, blank lines left out.

    Args:
        uri: a path, a URI of any file system pyarrow knows (`s3://`, `gs://`, `hf://`, …), or a `datasets:` name. What
            a file is follows from its first bytes; only CSV and TSV are known by their names.
        max_row_bytes: a row that is longer (as JSON) becomes `row_too_large`.
        filesystem: where `uri` is a path, if not a URI or a local file.

    Returns:
        An iterator of `RawRow` and `BadRow`. A lost connection raises `PrefselError` from it: retrying can help there.

    Raises:
        UserError: nothing readable lies at `uri`.
    """
    if max_row_bytes < 1:
        raise invalid("max_row_bytes", max_row_bytes, "at least 1")
    with reachable(uri):
        return reached(uri, _rows(uri, max_row_bytes, filesystem))


def _rows(uri: str, max_row_bytes: int, filesystem: pafs.FileSystem | None) -> Iterator[RawRow | BadRow]:
    if is_dataset_name(uri):
        tables = hub.read_tables(uri)
        return guarded(lambda: tables, None, "truncated_arrow", "data set", 0, max_row_bytes)
    file = open_stream(uri, filesystem)
    head = file.read(HEAD_BYTES)
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)) or _ends_as(
        uri, ".parquet", ".pq", ".arrow", ".feather"
    ):
        file.close()
        read = read_parquet if head.startswith(_PARQUET) or _ends_as(uri, ".parquet", ".pq") else read_arrow
        random = open_random(uri, filesystem)
        return _closing(random, read(random, max_row_bytes=max_row_bytes))
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        file.close()
        raise UserError(
            f"source: {redact(uri)!r} is UTF-16; convert it to UTF-8, for example with iconv -f utf-16 -t utf-8"
        )
    if what := next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None):
        file.close()
        raise UserError(f"source: {redact(uri)!r} is {what}; unpack it, or convert it to JSON lines or Parquet")
    return _closing(file, _text_rows(Unread(head, file), head, uri, max_row_bytes))


def _text_rows(stream: Unread, head: bytes, uri: str, max_row_bytes: int) -> Iterator[RawRow | BadRow]:
    """The rows of a file of text, compressed or not.

    Raises:
        OSError: its bytes could not be fetched (as opposed to: are wrong).
    """
    compression = compression_of(head)
    if compression is None and (packed := _cut_before_it_began(uri, head)) is not None:
        yield BadRow(0, None, b"", _broken(packed), "the compressed data ends before it began")
        return
    if compression is None:
        yield from _by_content(stream, head, uri, max_row_bytes, broken="not_json")
        return
    plain = Unread(b"", decompressed(stream, compression))
    broken = _broken(compression)
    try:
        first = plain.read(HEAD_BYTES)
    except BrokenStream as error:
        if stream.failure is not None:
            raise stream.failure from error
        yield BadRow(0, None, b"", broken, str(error))
        return
    for item in _by_content(Unread(first, plain), first, uri, max_row_bytes, broken=broken):
        if isinstance(item, BadRow) and item.reason == broken and stream.failure is not None:
            raise stream.failure
        yield item


def _broken(compression: str) -> str:
    return "truncated_gzip" if compression == "gzip" else "truncated_stream"


def _cut_before_it_began(uri: str, head: bytes) -> str | None:
    """The compression that a file's name promises, where the file holds less than the first bytes of it."""
    named = next((how for ending, how in COMPRESSIONS.items() if uri.lower().endswith(ending)), None)
    return named if any(how == named and magic.startswith(head) for magic, how in MAGIC.items()) else None


def _by_content(stream: Unread, head: bytes, uri: str, max_row_bytes: int, *, broken: str) -> Iterator[RawRow | BadRow]:
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    delimiter = next((mark for ending, mark in TABLES.items() if plain_name(uri).endswith(ending)), None)
    is_array, is_indented = text.startswith(b"[") and not _are_lines(text), re.match(rb"\{\s*\n", text) is not None
    if (is_array or is_indented) and head.startswith(BYTE_ORDER_MARK):
        stream.read(len(BYTE_ORDER_MARK))
    if is_array or is_indented:  # rows over several lines each
        splitter = ValueSplitter(max_row_bytes, is_array=is_array)
        yield from read_jsonl(chunks(stream), max_row_bytes=max_row_bytes, broken=broken, splitter=splitter)
    elif delimiter is not None and not text.startswith(b"{"):
        yield from read_delimited(stream, max_row_bytes=max_row_bytes, delimiter=delimiter)
    else:
        yield from read_jsonl(chunks(stream), max_row_bytes=max_row_bytes, broken=broken)


def _are_lines(text: bytes) -> bool:
    """Whether a text that begins with a list holds more than that list: lines, the first of which is no row."""
    first, _, rest = text.partition(b"\n")
    try:
        json.loads(first)
    except ValueError:
        return False
    return bool(rest.strip())


def _ends_as(uri: str, *endings: str) -> bool:
    return plain_name(uri).endswith(endings)


def _closing(file: Any, rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    with file:
        yield from rows
