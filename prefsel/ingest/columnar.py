"""Rows of Parquet and Arrow files, batch by batch. The raw bytes of such a row are its canonical JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.ingest.rows import OVERSIZE_KEPT_BYTES, BadRow, RawRow

# Python objects of a row take several times its Arrow bytes; so many of them exist at once.
_STEP_BYTES = 4 << 20
_PARQUET_BATCH_ROWS = 1024
# What pyarrow raises for cut or corrupt bytes; a corrupt length is an absurd allocation, a corrupt name is bad UTF-8.
# A failing disk or network raises OSError too: `Watched` tells them apart.
BROKEN = (pa.ArrowInvalid, OSError, pa.ArrowKeyError, pa.ArrowIndexError, pa.ArrowMemoryError, UnicodeDecodeError)


class Watched:
    """A binary file that remembers a failed read, so that a lost connection is not taken for a corrupt file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, num_bytes: int | None = None) -> bytes:
        """As the file's own `read`."""
        try:
            return self._file.read(num_bytes)
        except OSError as error:
            self.failure = error
            raise

    def reraise(self) -> None:
        """Raise what a read raised, if one did."""
        if self.failure is not None:
            raise self.failure


def read_parquet(file: Any, *, max_row_bytes: int) -> Iterator[RawRow | BadRow]:
    """The rows of a Parquet file, one row group after the other.

    A file whose footer cannot be read is one `truncated_parquet` row; so is each row group that cannot be decoded; the
    next one is then read.

    Raises:
        OSError: the bytes could not be fetched (as opposed to: are wrong).
    """
    watched = Watched(file)
    try:
        parquet = pq.ParquetFile(watched, page_checksum_verification=True)
    except BROKEN as error:
        watched.reraise()
        yield BadRow(0, None, b"", "truncated_parquet", str(error))
        return
    row = 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group)
        batch_rows = _step(size.total_byte_size, size.num_rows, at_most=_PARQUET_BATCH_ROWS)

        # One row group per call: over several, the reader's buffers keep the whole file in memory.
        def batches(group: int = group, batch_rows: int = batch_rows) -> Iterator[pa.RecordBatch]:
            return parquet.iter_batches(batch_size=batch_rows, row_groups=[group], use_threads=False)

        detail = f"row group {group} of {parquet.num_row_groups}"
        for item in guarded(batches, watched, "truncated_parquet", detail, row, max_row_bytes):
            yield item
            row = item.row + 1


def read_arrow(file: Any, *, max_row_bytes: int) -> Iterator[RawRow | BadRow]:
    """The rows of an Arrow IPC file, Feather file or IPC stream; memory is one record batch of it.

    Broken data ends in one `truncated_arrow` row. A stream cut exactly between two batches reads as complete: the
    format does not ask for an end marker.

    Raises:
        OSError: the bytes could not be fetched (as opposed to: are wrong).
    """
    watched = Watched(file)

    def batches() -> Iterator[pa.RecordBatch]:
        is_file = watched.read(6) == b"ARROW1"
        watched.seek(0)
        if not is_file:
            yield from map(_validated, pa.ipc.open_stream(watched))
            return
        reader = pa.ipc.open_file(watched)
        for number in range(reader.num_record_batches):
            yield _validated(reader.get_batch(number))

    return guarded(batches, watched, "truncated_arrow", "Arrow data", 0, max_row_bytes)


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch`, its offsets known to stay inside their buffers: Arrow reads corrupt ones and crashes later.

    Text is checked as bytes, so that a text that is not UTF-8 costs its own row and not the batch.

    Raises:
        ArrowInvalid: some do not.
    """
    batch.validate()
    for column in batch.columns:
        column.view(_without_text(column.type)).validate(full=True)
    return batch


def _without_text(kind: pa.DataType) -> pa.DataType:
    """`kind` with bytes of the same layout in place of text."""
    flat = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if kind in flat:
        return flat[kind]
    if pa.types.is_struct(kind):
        return pa.struct([part.with_type(_without_text(part.type)) for part in kind])
    if pa.types.is_map(kind):
        return pa.map_(_without_text(kind.key_type), _without_text(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_text(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_text(kind.value_type)))
    return kind


def guarded(
    batches: Callable[[], Iterator[pa.RecordBatch | pa.Table]],
    watched: Watched | None,
    reason: str,
    detail: str,
    row: int,
    max_row_bytes: int,
) -> Iterator[RawRow | BadRow]:
    """The rows of `batches()`, numbered from `row`; data that cannot be decoded ends in one row with `reason`.

    Without a `watched` file nothing tells a lost connection from corrupt bytes, so then every `OSError` is raised.
    """
    try:
        for batch in batches():
            for item in rows_of(batch, row, max_row_bytes):
                yield item
                row = item.row + 1
    except BROKEN as error:
        if watched is not None:
            watched.reraise()
        elif isinstance(error, OSError):
            raise
        yield BadRow(row, None, b"", reason, f"{detail}: {error}")


def rows_of(batch: pa.RecordBatch | pa.Table, row: int, max_row_bytes: int) -> Iterator[RawRow | BadRow]:
    """The rows of one batch, numbered from `row`."""
    step = _step(batch.nbytes, batch.num_rows, at_most=batch.num_rows)
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        try:
            values = part.to_pylist()
        except UnicodeDecodeError:
            yield from _one_by_one(part, row + start, max_row_bytes)
            continue
        for offset, value in enumerate(values):
            yield row_of(row + start + offset, value, max_row_bytes)


def _step(num_bytes: int, num_rows: int, *, at_most: int) -> int:
    """Rows that hold about `_STEP_BYTES` of a stretch of `num_rows` in `num_bytes`."""
    return max(1, min(at_most, _STEP_BYTES * num_rows // max(1, num_bytes)))


def _one_by_one(part: pa.RecordBatch | pa.Table, row: int, max_row_bytes: int) -> Iterator[RawRow | BadRow]:
    for offset in range(part.num_rows):
        one = part.slice(offset, 1)
        try:
            yield row_of(row + offset, one.to_pylist()[0], max_row_bytes)
        except UnicodeDecodeError as error:
            # JSON cannot carry these bytes; an Arrow stream of the one row can.
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, one.schema) as writer:
                writer.write(one)
            raw = sink.getvalue().to_pybytes()
            detail = f"{error.reason} at byte {error.start} of a text; raw is the row as an Arrow stream"
            yield BadRow(row + offset, None, raw, "undecodable", detail)


def row_of(row: int, value: dict[str, Any], max_row_bytes: int) -> RawRow | BadRow:
    """A row of a file that is no JSON lines; its raw bytes are its canonical JSON."""
    raw = _encode(value).encode("utf-8")
    if len(raw) > max_row_bytes:
        detail = f"{len(raw)} bytes as JSON; the limit is {max_row_bytes}"
        return BadRow(row, None, raw[:OVERSIZE_KEPT_BYTES], "row_too_large", detail)
    return RawRow(row, None, raw, {key: _without_nulls(one) for key, one in value.items()})


def _without_nulls(found: Any) -> Any:
    """What a field holds without the keys that are null: a columnar file gives every object the keys of all."""
    if isinstance(found, dict):
        return {key: _without_nulls(one) for key, one in found.items() if one is not None}
    return [_without_nulls(one) for one in found] if isinstance(found, list) else found


def _plain(value: object) -> str:
    """JSON for what Arrow has and JSON has not: bytes in hex; dates, times and decimals as text."""
    return value.hex() if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=_plain).encode
