"""The groups of a workspace with the pairs of each, whether files gave them or models answered them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.workspace.documents import find_document
from prefsel.workspace.entries import LEDGER, Entry
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Corpus:
    """Groups, and what is named like them."""

    source: str
    groups: Artifact
    pairs: tuple[Artifact, ...]
    """One of files; of answers one for every way they were paired."""

    @property
    def is_made(self) -> bool:
        """Whether a model answered."""
        return "@" in self.source


def corpora(storage: Storage) -> list[Corpus]:
    """Every groups artifact of a workspace, also those that no catalog names any more."""
    pairs: dict[str, list[Artifact]] = {}
    for name in storage.folders("pairs"):
        below = [one for one in storage.folders(f"pairs/{name}") if one != LEDGER] if "@" in name else []
        for source in below:
            pairs.setdefault(source, []).append(Artifact(storage, f"pairs/{name}/{source}"))
        if not below:
            pairs.setdefault(name, []).append(Artifact(storage, f"pairs/{name}"))
    return [
        Corpus(name, Artifact(storage, f"groups/{name}"), tuple(pairs.get(name, ())))
        for name in storage.folders("groups")
    ]


def beside(storage: Storage, kind: str, source: str) -> Iterator[Artifact]:
    """The artifacts of a kind with a folder per source, such as columns, that have shards of a source."""
    for name in storage.folders(kind):
        if source in storage.folders(f"{kind}/{name}"):
            yield Artifact(storage, f"{kind}/{name}/{source}")


def file_records(storage: Storage, source: str) -> dict[str, dict[str, object]]:
    """The records of the files of a source, by path: each with `uri` and its `shards`.

    Raises:
        DamagedError: one is not what was written.
    """
    found: dict[str, dict[str, object]] = {}
    for name in storage.files(f"groups/{source}/_files"):
        if (record := find_document(storage, name)) is not None:
            found[name] = record
    return found


def uris_of(records: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """Shard → the files that it is a window of."""
    found: dict[str, list[str]] = {}
    for record in records.values():
        shards = record["shards"]
        assert isinstance(shards, list), "a record lists its shards"
        for row in shards:
            found.setdefault(row["shard"], []).append(str(record["uri"]))
    return found


def table_there(artifact: Artifact, entry: Entry) -> pa.Table | None:
    """A shard as it lies there, also where its ledger says already what is to be left of it; None: nothing lies there.

    Raises:
        DamagedError: it is no Parquet file.
    """
    try:
        table = pq.read_table(pa.BufferReader(artifact.storage.read(artifact.file(entry.shard))))
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise artifact.storage.damaged(artifact.file(entry.shard), "altered", str(error)) from error
    return table.cast(pa.schema([one.with_type(_as_made(one.type)) for one in table.schema]))


def _as_made(kind: pa.DataType) -> pa.DataType:
    """A type with the names that Arrow gives to the values of lists: those of Parquet would stand in the file's schema.

    With them the same rows would be other bytes than those of a stage that makes the shard again.
    """
    if pa.types.is_list(kind):
        return pa.list_(_as_made(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, _as_made(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_as_made(one.type)) for one in kind])
    return kind
