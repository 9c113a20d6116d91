"""The catalog: which shards are the corpus now. Ingest writes it last; every later stage begins by reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from prefsel.display import redact
from prefsel.errors import UserError
from prefsel.workspace.documents import find_document, read_document, to_document
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.patience import confirmed
from prefsel.workspace.recipes import corpus_fingerprint
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.swap import read, swap

PATH = "catalog.json"


@dataclass(frozen=True)
class FileRecord:
    """One input file: its content, and what became of its rows."""

    uri: str
    content: str
    shards: list[str]
    counts: dict[str, int]
    """rows, accepted, quarantined, duplicate, ties, groups, pairs."""
    reasons: dict[str, int]
    """Quarantined rows by reason."""
    format: str = ""
    examples: dict[str, str] = field(default_factory=dict)
    """The first quarantined row of each reason: its number and what was wrong with it."""
    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    """Accepted rows in which each field was `used`, `kept` or `ignored`."""
    read_as: str = ""
    """What it was called when it was read, where an equal file of another name was; its quarantine is named by that."""

    def quarantine_of(self, shard: str) -> str:
        """The quarantine shard of one of its windows."""
        return quarantine_name(shard, self.read_as or self.uri)


def quarantine_name(shard: str, uri: str) -> str:
    """The quarantine shard of a window: it names the file in its rows, so equal windows of two files have one each."""
    return f"{shard}-{digest(uri.encode())[:8]}"


@dataclass(frozen=True)
class SourceRecord:
    """One source of the configuration, files in order."""

    name: str
    role: str
    """`train`: selected from; `holdout`: its prompts are only evaluated on; `exclude`: its prompts are used nowhere;
    `prompts`: its prompts are answered by models."""
    files: list[FileRecord]
    pairs: str = ""
    """Folder of its pairs below `pairs/`, where they were made of judged groups; empty: that of its name."""


WITHOUT_PAIRS = ("exclude", "prompts")
"""Roles of sources whose prompts alone are read."""


@dataclass(frozen=True)
class ShardRef:
    """A live shard of the corpus, in corpus order."""

    source: str
    shard: str
    role: str
    number: int
    pairs: str = ""
    """As of its `SourceRecord`."""

    @property
    def pairs_path(self) -> str:
        """The artifact that its pairs lie in."""
        return f"pairs/{self.pairs or self.source}"

    @property
    def key(self) -> str:
        """Unique within a workspace."""
        return f"{self.source}/{self.shard}"


@dataclass(frozen=True)
class Catalog:
    """All sources of the workspace."""

    sources: list[SourceRecord]

    @cached_property
    def shards(self) -> list[ShardRef]:
        """Every live shard that has pairs, sources and files in configuration order."""
        return self._shards_of([source for source in self.sources if source.role not in WITHOUT_PAIRS])

    @cached_property
    def prompt_shards(self) -> list[ShardRef]:
        """Every live shard whose prompts may be answered, those of sources of prompts alone included."""
        return self._shards_of([source for source in self.sources if source.role != "exclude"])

    @cached_property
    def excluded_shards(self) -> list[ShardRef]:
        """Every live shard whose prompts must be used nowhere else than in evaluations."""
        return self._shards_of([source for source in self.sources if source.role == "exclude"])

    def _shards_of(self, sources: list[SourceRecord]) -> list[ShardRef]:
        found = [(source, shard) for source in sources for file in source.files for shard in file.shards]
        return [ShardRef(one.name, shard, one.role, n, one.pairs) for n, (one, shard) in enumerate(found)]

    def to_json(self) -> list[dict[str, Any]]:
        """As JSON holds it; `from_json` gives it back."""
        return [_plain(source) for source in self.sources]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]]) -> Catalog:
        """The catalog that `to_json` gave."""
        return cls([_record(row) for row in rows])

    def file_of(self, shard: ShardRef) -> FileRecord:
        """The input file a shard was made from."""
        files = (file for source in self.sources if source.name == shard.source for file in source.files)
        return next(file for file in files if shard.shard in file.shards)

    def sources_of(self) -> dict[str, list[ShardRef]]:
        """Live shards by source."""
        by_source: dict[str, list[ShardRef]] = {}
        for shard in self.shards:
            by_source.setdefault(shard.source, []).append(shard)
        return by_source

    def entries(self, storage: Storage, kind: Literal["groups", "pairs"]) -> Mapping[str, Entry]:
        """Ledger entries of the live shards of `groups` or `pairs`, by shard key; read once."""
        if (storage.uri, kind) not in self._entries:
            self._entries[storage.uri, kind] = self._read_entries(storage, kind)
        return self._entries[storage.uri, kind]

    @cached_property
    def _entries(self) -> dict[tuple[str, str], Mapping[str, Entry]]:
        return {}

    def _read_entries(self, storage: Storage, kind: Literal["groups", "pairs"]) -> Mapping[str, Entry]:
        entries: dict[str, Entry] = {}
        for source, shards in self.sources_of().items():
            path = f"groups/{source}" if kind == "groups" else shards[0].pairs_path
            known = required_entries(storage, path, [shard.shard for shard in shards])
            entries |= {shard.key: known[shard.shard] for shard in shards}
        return entries

    def has_rest(self, storage: Storage) -> bool:
        """Whether some message of the corpus holds more than role and content."""
        return any(entry.info.get("has_rest") for entry in self.entries(storage, "groups").values())

    def carried(self, storage: Storage) -> tuple[str, ...]:
        """The fields of rows that pairs of the corpus carry, each once."""
        found = (name for entry in self.entries(storage, "pairs").values() for name in entry.info.get("carried", ()))
        return tuple(dict.fromkeys(found))

    def fingerprint(self, storage: Storage) -> str:
        """The corpus fingerprint, over the pairs shards."""
        entries = self.entries(storage, "pairs")
        return corpus_fingerprint((s.source, s.shard, entries[s.key].content) for s in self.shards)


def required_entries(storage: Storage, path: str, shards: Sequence[str]) -> dict[str, Entry]:
    """The ledger entries of the artifact at `path`, those of all `shards` among them.

    Raises:
        DamagedError: one of the shards is not in the ledger.
    """

    def read() -> dict[str, Entry]:
        known = Artifact(storage, path).entries(shards)
        for shard in shards:
            if shard not in known:
                raise storage.damaged(f"{path}/{shard}.parquet", "missing", "it is not in its ledger")
        return known

    return confirmed(storage.is_local, read)


def write_catalog(storage: Storage, catalog: Catalog) -> None:
    """Make `catalog` the corpus; nothing is written when it already is.

    Raises:
        DamagedError: the one that is there is not what was written.
        Conflict: another writer changed it meanwhile.
    """
    data = to_document(PATH, {"sources": catalog.to_json()}, indent=1)
    there, version = read(storage, PATH) or (None, None)
    if there is not None:
        read_document(storage, PATH)
    if there != data:
        swap(storage, PATH, data, version)


def _plain(source: SourceRecord) -> dict[str, Any]:
    """A source as JSON holds it; the folder of pairs and what a file was read as only where they are others."""
    table = {key: value for key, value in asdict(source).items() if key != "pairs" or value}
    files = [{key: value for key, value in file.items() if key != "read_as" or value} for file in table["files"]]
    return table | {"files": files}


def _record(row: Mapping[str, Any]) -> SourceRecord:
    return SourceRecord(**({**row} | {"files": [FileRecord(**file) for file in row["files"]]}))


def read_catalog(storage: Storage) -> Catalog:
    """The corpus of a workspace.

    Raises:
        UserError: nothing was ingested yet.
    """
    found = find_document(storage, PATH)
    if found is None:
        raise UserError(f"workspace: {redact(storage.uri)} holds no corpus yet; run `prefsel ingest` first")
    return Catalog.from_json(found["sources"] if isinstance(found, dict) else found)
