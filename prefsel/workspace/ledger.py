"""Artifacts and their ledgers: what was committed, from what, with which content.

An artifact is a folder of shards, `<path>/<shard>.parquet`. A shard is done when `<path>/_ledger/<shard>.json` names
the content hash of the input it was made from. Data first, then the ledger object: a reader that trusts ledgers alone
never sees partial output. Attempts are logged before computing, so that "computed once" can be counted.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import DamagedError, IntegrityError
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.entries import ATTEMPTS, FOLDED_FROM, LEDGER, Entry, Proof, compact, entries_of, proof_of
from prefsel.workspace.notes import left
from prefsel.workspace.parquet_bytes import checks_of, read_checked, to_bytes
from prefsel.workspace.patience import confirmed
from prefsel.workspace.storage import Storage, digest


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


def _entry(
    shard: str, table: pa.Table, data: bytes, *, made_from: str, attempt: str, info: Mapping[str, Any] | None
) -> Entry:
    """What a ledger says of a table that is written as `data`."""
    return Entry(
        shard=shard,
        rows=table.num_rows,
        bytes=len(data),
        content=digest(data),
        input=made_from,
        attempt=attempt,
        checks=checks_of(data),
        columns=_column_summary(table),
        info=dict(info or {}),
    )


@dataclass(frozen=True)
class Artifact:
    """A folder of shards with a ledger."""

    storage: Storage
    path: str

    def file(self, shard: str) -> str:
        """Where the data of `shard` lies, relative to the workspace."""
        return f"{self.path}/{shard}.parquet"

    def ledger_file(self, shard: str) -> str:
        """Where the ledger object of `shard` lies until it is compacted, relative to the workspace."""
        return f"{self.path}/{LEDGER}/{shard}.json"

    def entries(self, expected: Iterable[str] = ()) -> dict[str, Entry]:
        """Every committed shard by name: of the compacted objects, and of what was committed after them.

        Args:
            expected: Shards that may be committed though the listing of a store does not show it yet.

        Raises:
            DamagedError: an object of the ledger is not what was written.
        """
        return entries_of(self.storage, self.path, expected)

    def there(self) -> set[str]:
        """The committed shards whose data lie there with as many bytes as were committed: one listing, nothing read."""
        sizes = self.storage.sizes(self.path)
        return {entry.shard for entry in self.entries().values() if self.check(entry, quick=True, sizes=sizes) is None}

    def done(self, inputs: Mapping[str, str]) -> dict[str, Entry]:
        """The shards of `inputs` (shard → input hash) that are committed for exactly that input, and are there.

        Raises:
            DamagedError: one of them is not there, and was not set aside: made again it is to be compared.
        """
        entries, sizes = self.entries(inputs), self.storage.sizes(self.path)
        done = {s: entries[s] for s, made_from in inputs.items() if s in entries and entries[s].input == made_from}
        wrong = {s: self.check(entry, quick=True, sizes=sizes) for s, entry in done.items()}
        lost = {s: found for s, found in wrong.items() if found is not None}
        aside = {note.path for note in left(self.storage)} if lost else set()
        for shard, found in lost.items():
            if self.file(shard) not in aside:
                raise self.storage.damaged(self.file(shard), *found)
        return {s: entry for s, entry in done.items() if s not in lost}

    def is_done(self, shard: str, made_from: str) -> bool:
        """Whether `shard` has a ledger object of its own for exactly this input, and data: what a repeated task asks.

        Compacted entries are not read, so it costs two requests whatever the corpus; only the driver compacts, when
        no worker is at work.
        """
        found = find_document(self.storage, self.ledger_file(shard))
        if found is None or found["input"] != made_from:
            return False
        return self.storage.size(self.file(shard)) == found["bytes"]

    def log_attempt(self, shard: str) -> str:
        """Record, before any work, that somebody begins `shard`; returns the attempt's name."""
        attempt = uuid.uuid4().hex[:12]
        self.storage.write(f"{self.path}/{LEDGER}/{ATTEMPTS}/{shard}.{attempt}", b"")
        return attempt

    def attempts(self, entries: Mapping[str, Entry] | None = None) -> Counter[str]:
        """How often each shard was begun.

        Args:
            entries: Of the artifact, where they were read already: they name the attempts that committed, whose logs
                are gone once a ledger is folded.
        """
        names = [name.rsplit("/", 1)[-1] for name in self.storage.files(f"{self.path}/{LEDGER}/{ATTEMPTS}")]
        committed = (self.entries() if entries is None else entries).values()
        return Counter(name.rsplit(".", 1)[0] for name in {*names, *(f"{e.shard}.{e.attempt}" for e in committed)})

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

        `plain_numbers` is for tables of integers that hardly repeat: three times as fast to write, see `to_bytes`.
        """
        data = to_bytes(table, plain_numbers)
        entry = _entry(shard, table, data, made_from=made_from, attempt=attempt, info=info)
        self.storage.write(self.file(shard), data)
        write_document(self.storage, self.ledger_file(shard), asdict(entry))
        return entry

    def replace(self, entry: Entry, table: pa.Table, data: bytes, *, made_from: str, info: Mapping[str, Any]) -> Entry:
        """Put another table in the place of a committed one: the same work, of which something was taken back.

        Its ledger object is written first: what a kill leaves between the two does not pass for the former table.
        `data` are the bytes of `table`.
        """
        new = _entry(entry.shard, table, data, made_from=made_from, attempt=entry.attempt, info=info)
        write_document(self.storage, self.ledger_file(entry.shard), asdict(new))
        self.storage.write(self.file(entry.shard), data)
        return new

    def compact(self, *, at_least: int = FOLDED_FROM) -> None:
        """Fold the ledger objects into few when there are `at_least` of them; see `entries.compact`."""
        compact(self.storage, self.path, at_least=at_least)

    def read(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """The committed table of `shard`, projected on `columns`; every byte it is made of was compared with its hash.

        Raises:
            DamagedError: the shard is gone, or is not what was committed.
        """
        seen = proof_of(self.storage, self.path, shard)
        if seen is not None:
            try:
                return self._read(shard, columns, seen)
            except DamagedError:
                pass  # or committed anew since its proof was read
        return confirmed(self.storage.is_local, lambda: self._read_anew(shard, columns))

    def _read_anew(self, shard: str, columns: list[str] | None) -> pa.Table:
        proof = proof_of(self.storage, self.path, shard, anew=True)
        if proof is None:
            raise self.storage.damaged(self.file(shard), "missing", "it is not in its ledger")
        return self._read(shard, columns, proof)

    def _read(self, shard: str, columns: list[str] | None, proof: Proof) -> pa.Table:
        size, checks, content = proof
        return read_checked(self.storage, self.file(shard), columns, size=size, checks=checks, content=content)

    def check(self, entry: Entry, *, quick: bool, sizes: Mapping[str, int]) -> tuple[str, str] | None:
        """What is wrong with the data of a shard, missing or altered, and how it shows; None where nothing is.

        Args:
            entry: Of the shard.
            quick: Compare its size only.
            sizes: Of the files of the artifact, by path.
        """
        size = self.storage.size_of(self.file(entry.shard), sizes)
        if size is None:
            return "missing", ""
        if size != entry.bytes:
            return "altered", f"{entry.bytes:,} bytes were committed, found {size:,}"
        if not quick and not self.storage.holds(self.file(entry.shard), entry.content):
            return "altered", "its hash is not the committed one"
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
