"""Artifacts and their ledgers: what was committed, from what, with which content.

An artifact is a folder of shards, `<path>/<shard>.parquet`. A shard is done when `<path>/_ledger/<shard>.json` names
the content hash of the input it was made from. Data first, then the ledger object: a reader that trusts ledgers alone
never sees partial output. Attempts are logged before computing, so that "computed once" can be counted.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefsel.errors import IntegrityError
from prefsel.workspace.storage import Storage, digest

ROW_GROUP_ROWS = 1 << 20
"""A shard is one row group: its columns are read whole, and two groups took 1.15 of the time of one."""
COMPACTED = "all.json"


@dataclass(frozen=True)
class Entry:
    """One ledger object."""

    shard: str
    rows: int
    bytes: int
    content: str
    """blake2b-128 of the data file, 32 hex digits."""
    input: str
    """Hash of what the shard was made from; the shard is done for exactly this input."""
    attempt: str
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per numeric column: min, max, nulls."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the stage adds: counts, drops by reason, histogram, counters, seconds."""


def _column_summary(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Minimum, maximum and null count of each float column, lists flattened."""
    summary = {}
    for name, column in zip(table.column_names, table.columns):
        if pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type):
            column = pc.list_flatten(column)
        if pa.types.is_floating(column.type):
            bounds = pc.min_max(column).as_py()
            summary[name] = {"min": bounds["min"], "max": bounds["max"], "nulls": column.null_count}
    return summary


def _table_bytes(table: pa.Table, plain_numbers: bool = False) -> bytes:
    """`table` as one Parquet file: float64 and identifiers as they are, everything else compressed.

    Of 100 000 scores with ids, plain ones took 24.4 bytes a row, 5.6 ms to write and 0.19 ms to read (ids 0.22);
    with dictionaries and zstd 27.8 bytes, 11.7 ms, 1.23 ms (1.41): neither hashes nor float64 scores repeat or shrink.
    Splitting their bytes before zstd saved 0.8 bytes and doubled the reading.

    With `plain_numbers` integers that hardly repeat are taken as they are too, and no page has statistics: the 30 000
    rows that a selection keeps of such a shard took 1.5 ms to write instead of 3.6, and 56 bytes a row instead of 51.
    """
    compression: dict[str, str] = {}
    with_dictionary: list[str] = []
    for path, kind in leaves(table.schema):
        is_plain = pa.types.is_floating(kind) or pa.types.is_fixed_size_binary(kind)
        is_plain |= plain_numbers and pa.types.is_integer(kind)
        compression[path] = "none" if is_plain else "zstd"
        with_dictionary += [] if is_plain else [path]
    options: dict[str, Any] = {"compression": compression, "use_dictionary": with_dictionary or False}
    options["write_statistics"] = not plain_numbers
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, **options)
    return sink.getvalue().to_pybytes()


def leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """The columns of values that Parquet makes of a schema, by path."""

    def below(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            yield from below(f"{path}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for child in kind:
                yield from below(f"{path}.{child.name}", child.type)
        else:
            yield path, kind

    for column in schema:
        yield from below(column.name, column.type)


@dataclass(frozen=True)
class Artifact:
    """A folder of shards with a ledger."""

    storage: Storage
    path: str

    def file(self, shard: str) -> str:
        """Where the data of `shard` lies, relative to the workspace."""
        return f"{self.path}/{shard}.parquet"

    def _object(self, shard: str) -> str:
        return f"{self.path}/_ledger/{shard}.json"

    def entries(self) -> dict[str, Entry]:
        """Every committed shard by name. Reads one compacted object and whatever was committed after it."""
        names = [name for name in self.storage.files(f"{self.path}/_ledger") if name.endswith(".json")]
        compacted = f"{self.path}/_ledger/{COMPACTED}"
        entries = {}
        if compacted in names:
            entries = {row["shard"]: Entry(**row) for row in json.loads(self.storage.read(compacted))}
            names.remove(compacted)
        with ThreadPoolExecutor(max_workers=16) as pool:
            for data in pool.map(self.storage.read, names):
                entry = Entry(**json.loads(data))
                entries[entry.shard] = entry
        return dict(sorted(entries.items()))

    def done(self, inputs: Mapping[str, str]) -> dict[str, Entry]:
        """The shards of `inputs` (shard → input hash) that are committed for exactly that input."""
        entries = self.entries()
        return {s: entries[s] for s, made_from in inputs.items() if s in entries and entries[s].input == made_from}

    def is_done(self, shard: str, made_from: str) -> bool:
        """Whether `shard` has a ledger object of its own for exactly this input: what a repeated task asks.

        Compacted entries are not read, so it costs two requests whatever the corpus; only the driver compacts, when
        no worker is at work.
        """
        if not self.storage.exists(self._object(shard)):
            return False
        return json.loads(self.storage.read(self._object(shard)))["input"] == made_from

    def log_attempt(self, shard: str) -> str:
        """Record, before any work, that somebody begins `shard`; returns the attempt's name."""
        attempt = uuid.uuid4().hex[:12]
        self.storage.write(f"{self.path}/_ledger/attempts/{shard}.{attempt}", b"")
        return attempt

    def attempts(self) -> Counter[str]:
        """How often each shard was begun."""
        names = self.storage.files(f"{self.path}/_ledger/attempts")
        return Counter(name.rsplit("/", 1)[-1].rsplit(".", 1)[0] for name in names)

    def commit(
        self,
        shard: str,
        table: pa.Table,
        *,
        made_from: str,
        attempt: str,
        info: Mapping[str, Any] | None = None,
        plain_numbers: bool = False,
    ) -> Entry:
        """Write the data of `shard` under its final name, then its ledger object.

        `plain_numbers` is for tables of integers that hardly repeat: three times as fast to write, see `_table_bytes`.
        """
        data = _table_bytes(table, plain_numbers)
        self.storage.write(self.file(shard), data)
        entry = Entry(
            shard=shard,
            rows=table.num_rows,
            bytes=len(data),
            content=digest(data),
            input=made_from,
            attempt=attempt,
            columns=_column_summary(table),
            info=dict(info or {}),
        )
        self.storage.write(self._object(shard), json.dumps(asdict(entry)).encode())
        return entry

    def compact(self, *, at_least: int = 64) -> None:
        """Fold the ledger objects into one when there are `at_least` of them. Only the driver calls this, when no
        worker is committing: a later commit of a shard overrides its compacted entry."""
        names = [n for n in self.storage.files(f"{self.path}/_ledger") if not n.endswith(f"/{COMPACTED}")]
        if len(names) < at_least:
            return
        rows = [asdict(entry) for entry in self.entries().values()]
        self.storage.write(f"{self.path}/_ledger/{COMPACTED}", json.dumps(rows).encode())
        for name in names:
            self.storage.delete(name)

    def read(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """The committed table of `shard`, projected on `columns`."""
        with self.storage.filesystem.open_input_file(self.storage.full(self.file(shard))) as source:
            # Projects inside lists, unlike read_table. A task has one CPU; Arrow's own threads slow one column down.
            return pq.ParquetFile(source).read(columns=columns, use_threads=False)

    def check(self, entry: Entry, *, quick: bool) -> str | None:
        """What is wrong with the data of `entry`: missing, altered, or nothing (None)."""
        size = self.storage.size(self.file(entry.shard))
        if size is None:
            return "missing"
        if size != entry.bytes or (not quick and digest(self.storage.read(self.file(entry.shard))) != entry.content):
            return "altered"
        return None


def require_flow(stage: str, rows_in: int, rows_out: int, dropped: Mapping[str, int]) -> None:
    """Check `rows_in = rows_out + Σ dropped`, the law every stage obeys.

    Raises:
        IntegrityError: rows were lost or doubled.
    """
    if rows_in != rows_out + sum(dropped.values()):
        raise IntegrityError(f"{stage}: {rows_in} rows in, but {rows_out} out + {dict(dropped)} dropped")


def merge_counts(many: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several count tables, keys sorted."""
    total: Counter[str] = Counter()
    for counts in many:
        total.update(counts)
    return dict(sorted(total.items()))
