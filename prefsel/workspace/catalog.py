"""The catalog: which shards are the corpus now. Ingest writes it last; every later stage begins by reading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from prefsel.errors import UserError
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.recipes import corpus_fingerprint
from prefsel.workspace.storage import Storage, digest

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


def quarantine_name(shard: str, uri: str) -> str:
    """The quarantine shard of a window: it names the file in its rows, so equal windows of two files have one each."""
    return f"{shard}-{digest(uri.encode())[:8]}"


@dataclass(frozen=True)
class SourceRecord:
    """One source of the configuration, files in order."""

    name: str
    role: str
    """`train`: selected from; `holdout`: its prompts are only evaluated on; `exclude`: its prompts are used nowhere."""
    files: list[FileRecord]


@dataclass(frozen=True)
class ShardRef:
    """A live shard of the corpus, in corpus order."""

    source: str
    shard: str
    role: str
    number: int

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
        """Every live shard except those of `exclude` sources, sources and files in configuration order."""
        found = [
            (source.name, shard, source.role)
            for source in self.sources
            if source.role != "exclude"
            for file in source.files
            for shard in file.shards
        ]
        return [ShardRef(name, shard, role, number) for number, (name, shard, role) in enumerate(found)]

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

    def entries(self, storage: Storage, kind: str) -> dict[str, Entry]:
        """Ledger entries of the live shards of `groups` or `pairs`, by shard key."""
        entries = {}
        for source, shards in self.sources_of().items():
            known = Artifact(storage, f"{kind}/{source}").entries()
            entries.update({shard.key: known[shard.shard] for shard in shards})
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


def write_catalog(storage: Storage, catalog: Catalog) -> None:
    """Make `catalog` the corpus; nothing is written when it already is."""
    data = json.dumps([asdict(source) for source in catalog.sources], indent=1).encode()
    if not storage.exists(PATH) or storage.read(PATH) != data:
        storage.write(PATH, data)


def _record(row: dict[str, Any]) -> SourceRecord:
    return SourceRecord(row["name"], row["role"], [FileRecord(**file) for file in row["files"]])


def read_catalog(storage: Storage) -> Catalog:
    """The corpus of a workspace.

    Raises:
        UserError: nothing was ingested yet.
    """
    if not storage.exists(PATH):
        raise UserError(f"workspace: {storage.uri} holds no corpus yet; run `prefsel ingest` first")
    return Catalog([_record(row) for row in json.loads(storage.read(PATH))])
