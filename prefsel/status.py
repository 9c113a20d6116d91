"""What a workspace holds, what is missing, how large it is and what is being made, read from its ledgers alone.

No artifact is opened and no fingerprint computed: models, whose weights would have to be hashed for that, are not
needed. Where the configuration changed, several artifacts have one name; the newest stands for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.config.yaml_text import read_yaml
from prefsel.display import redact
from prefsel.errors import PrefselError, UserError
from prefsel.workspace.catalog import PATH, Catalog, read_catalog
from prefsel.workspace.entries import Entry
from prefsel.workspace.folders import read_seal
from prefsel.workspace.lease import holder
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import SEALED, SHARDED

CORPUS = ("groups", "pairs", "quarantine")
"""Made by ingest, one artifact per source; everything else carries a fingerprint."""
RECENT_S = 3600.0
"""Work that was begun longer ago and not committed is that of a run that ended; a shard takes minutes."""


@dataclass(frozen=True)
class ArtifactStatus:
    """One artifact."""

    kind: str
    name: str
    """Of a source, or `<name>@<fingerprint>`."""
    shards: int
    """Committed ones of the corpus as it is now; 1 for a folder that is finished."""
    of: int
    """Shards that make it complete."""
    rows: int | None
    bytes: int
    changed: float
    """When something was committed to it last, in seconds since 1970."""
    running: int = 0
    """Shards begun within `RECENT_S` and not committed."""
    begun_s: float | None = None
    """Seconds since the newest of them was begun."""
    is_newest: bool = True

    @property
    def path(self) -> str:
        """Where it lies in the workspace."""
        return f"{self.kind}/{self.name}"

    @property
    def is_complete(self) -> bool:
        """Whether nothing of it is missing."""
        return self.shards >= self.of


@dataclass(frozen=True)
class Status:
    """A workspace at one moment."""

    workspace: str
    name: str | None
    """Of the configuration that ran last."""
    artifacts: list[ArtifactStatus]
    missing: list[str]
    """What that configuration asks for and the workspace has not, or not wholly."""
    reports: list[str]
    """Pages, the newest last."""
    writer: str | None = None
    """Who writes to it now, or was killed while it did."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [asdict(one) | {"path": one.path, "is_complete": one.is_complete} for one in self.artifacts]
        return asdict(self) | {"artifacts": rows}


def status(storage: Storage) -> Status:
    """Look at a workspace.

    Raises:
        UserError: there is none.
    """
    config = _last_config(storage)
    catalog = read_catalog(storage) if storage.exists(PATH) else Catalog([])
    if config is None and not catalog.sources:
        raise UserError(f"status: {redact(storage.uri)!r} is not a workspace: no config.yaml, no catalog.json")
    artifacts = [_corpus(storage, catalog, kind, source) for kind in CORPUS for source in storage.folders(kind)]
    groups = {
        f"{source}/{shard}": entry.content
        for source in storage.folders("groups")
        for shard, entry in Artifact(storage, f"groups/{source}").entries().items()
    }
    for kind in (*(one for one in SHARDED if one not in (*CORPUS, "diffs")), *SEALED):
        look = _sharded if kind in SHARDED else _folder
        found = [look(storage, catalog, groups, kind, name) for name in storage.folders(kind) if kind != "reports"]
        artifacts += _newest(found)
    reports = [f"reports/{name}/index.html" for name in storage.folders("reports")]
    known = [path for path in reports if storage.exists(path)]
    named = config.name if config else None
    return Status(redact(storage.uri), named, artifacts, _missing(config, catalog, artifacts), known, _writer(storage))


def _writer(storage: Storage) -> str | None:
    try:
        lease = holder(storage)
    except PrefselError as error:
        return f"nobody knows: {error}"
    if lease is None:
        return None
    return f"{lease}" + ("; it has ended without a word" if lease.owner.is_dead() else f"; heartbeat {lease.beat:,}")


def _last_config(storage: Storage) -> Config | None:
    if not storage.exists("config.yaml"):
        return None
    table = read_yaml(storage.read("config.yaml"), f"status: {redact(storage.uri)}/config.yaml")
    if not isinstance(table, dict):
        place = f"status: {redact(storage.uri)}/config.yaml"
        raise UserError(f"{place}: got {type(table).__name__}; valid: the keys of a configuration")
    return parse_config(table)


def _corpus(storage: Storage, catalog: Catalog, kind: str, source: str) -> ArtifactStatus:
    if source not in {one.name for one in catalog.sources}:
        return _made(storage, kind, source)
    artifact = Artifact(storage, f"{kind}/{source}")
    entries = artifact.entries()
    live = {shard for one in catalog.sources if one.name == source for file in one.files for shard in file.shards}
    of = len(live) if kind != "quarantine" else len(entries)
    there = [entry for entry in entries.values() if kind == "quarantine" or entry.shard in live]
    return _with_attempts(_summed(kind, source, of, there), [(artifact, entries)])


def _sharded(storage: Storage, catalog: Catalog, groups: dict[str, str], kind: str, name: str) -> ArtifactStatus:
    """An artifact with a folder per source; columns must be those of the groups (key → content) that are there now."""
    sources = catalog.sources_of()
    if not sources.keys() & set(storage.folders(f"{kind}/{name}")):
        return _made(storage, kind, name)
    parts = [Artifact(storage, f"{kind}/{name}/{source}") for source in sources]
    read = [(artifact, artifact.entries()) for artifact in parts]
    there = [
        entries[shard.shard]
        for (_, entries), shards in zip(read, sources.values())
        for shard in shards
        if shard.shard in entries and (kind != "columns" or entries[shard.shard].input == groups.get(shard.key))
    ]
    return _with_attempts(_summed(kind, name, len(catalog.shards), there), read)


def _made(storage: Storage, kind: str, name: str) -> ArtifactStatus:
    """An artifact of corpora that models answered: how many shards it is to have is known when they are asked for."""
    path = f"{kind}/{name}"
    folders = [folder for folder in storage.folders(path) if folder != "_ledger"]
    parts = [Artifact(storage, path), *(Artifact(storage, f"{path}/{folder}") for folder in folders)]
    read = [(artifact, artifact.entries()) for artifact in parts]
    there = [entry for _, entries in read for entry in entries.values()]
    return _with_attempts(_summed(kind, name, len(there), there), read)


def _summed(kind: str, name: str, of: int, entries: Sequence[Entry]) -> ArtifactStatus:
    rows, size = sum(entry.rows for entry in entries), sum(entry.bytes for entry in entries)
    return ArtifactStatus(kind, name, len(entries), of, rows, size, 0.0)


def _with_attempts(one: ArtifactStatus, parts: Sequence[tuple[Artifact, dict[str, Entry]]]) -> ArtifactStatus:
    """Attempts at shards that nobody committed, and when the ledgers changed last."""
    changed = 0.0
    open_at: dict[str, float] = {}
    for artifact, entries in parts:
        ledger = f"{artifact.path}/_ledger"
        changed = max([changed, *artifact.storage.modified(ledger).values()])
        for name, when in artifact.storage.modified(f"{ledger}/attempts").items():
            shard = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
            if shard not in entries:
                open_at[f"{artifact.path}/{shard}"] = max(when, open_at.get(f"{artifact.path}/{shard}", 0.0))
    recent = [when for when in open_at.values() if time.time() - when < RECENT_S]
    begun_s = max(0.0, time.time() - max(recent)) if recent else None
    return replace(one, changed=changed, running=len(recent), begun_s=begun_s)


def _folder(storage: Storage, catalog: Catalog, groups: dict[str, str], kind: str, name: str) -> ArtifactStatus:
    """A sealed folder; one without a seal is being made, or was left when its run ended."""
    path = f"{kind}/{name}"
    seal = read_seal(storage, path)
    files = storage.modified(path, recursive=True)
    changed = max(files.values(), default=0.0)
    if seal is not None:
        size = sum(file["bytes"] for file in seal["files"].values())
        rows = seal["info"].get("rows", seal["info"].get("num_pairs"))
        return ArtifactStatus(kind, name, 1, 1, rows, size, changed)
    age = time.time() - changed
    is_running = age < RECENT_S
    size = sum(storage.size(file) or 0 for file in files)
    return ArtifactStatus(kind, name, 0, 1, None, size, changed, int(is_running), age if is_running else None)


def _newest(found: Sequence[ArtifactStatus]) -> list[ArtifactStatus]:
    """Several fingerprints of one name: only the one that changed last is in force."""
    last: dict[str, float] = {}
    for one in found:
        name = one.name.rsplit("@", 1)[0]
        last[name] = max(one.changed, last.get(name, 0.0))
    return [replace(one, is_newest=one.changed == last[one.name.rsplit("@", 1)[0]]) for one in found]


def _missing(config: Config | None, catalog: Catalog, artifacts: Sequence[ArtifactStatus]) -> list[str]:
    """What the configuration names, as `kind name`, and which is not complete."""
    done = {
        f"{one.kind} {one.name.rsplit('@', 1)[0]}" for one in artifacts if one.is_newest and one.is_complete and one.of
    }
    return [name for name in _wanted(config, catalog) if name not in done] if config else []


def _wanted(config: Config, catalog: Catalog) -> Iterator[str]:
    yield from (f"groups {source.name}" for source in config.sources)
    yield "eligible all"
    yield from (f"models {spec.name}" for spec in config.models if spec.is_made_here)
    for scorer in (one for spec in config.scorers for one in spec.expanded(config)):
        yield f"{'pair_columns' if scorer.unit == 'pairs' else 'columns'} {scorer.label}"
    yield from (f"tangents {spec.name}" for spec in config.tangents)
    yield from (f"scores {spec.name}" for spec in config.metrics)
    for selection in config.selections:
        for name in selection.names:
            yield f"selections {name}"
            if selection.dataset == "always":
                yield f"datasets {name}"
    yield from (f"models {member.label}" for spec in config.train for member in spec.trained_models)


# ----------------------------------------------------------------------------------------------------- for people


def lines(found: Status) -> Iterator[str]:
    """The status as text."""
    yield f"workspace {found.workspace}" + (f", configuration {found.name!r}" if found.name else "")
    width = max((len(one.path) for one in found.artifacts), default=0)
    for one in found.artifacts:
        rows = f"{one.rows:>12,} rows" if one.rows is not None else " " * 17
        yield f"  {one.path:<{width}}  {_state(one):<15} {rows} {size_text(one.bytes):>12}{_remark(one)}"
    total = sum(one.bytes for one in found.artifacts)
    yield f"  {len(found.artifacts):,} artifacts, {size_text(total)}"
    running = [one for one in found.artifacts if one.running]
    yield f"running   {'; '.join(_running(one) for one in running) or 'nothing was begun and left open lately'}"
    yield f"writer    {found.writer or 'none'}"
    yield f"missing   {', '.join(found.missing) or 'nothing that the configuration asks for'}"
    yield f"report    {found.reports[-1] if found.reports else 'none yet'}"


def _state(one: ArtifactStatus) -> str:
    if one.kind in SEALED:
        return "complete" if one.is_complete else "unfinished"
    return f"{one.shards:,}/{one.of:,} shards"


def _remark(one: ArtifactStatus) -> str:
    return "" if one.is_newest else "  older: of another configuration or corpus"


def _running(one: ArtifactStatus) -> str:
    what = f"{one.running:,} shards of {one.path}, the last" if one.kind not in SEALED else f"{one.path}, last written"
    return f"{what} {one.begun_s or 0.0:,.0f} s ago" + (" begun" if one.kind not in SEALED else "")


def size_text(size: float) -> str:
    """Bytes as people read them.

    >>> size_text(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
