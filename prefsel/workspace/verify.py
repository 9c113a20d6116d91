"""`verify`: every object of a workspace against what was committed, and what is missing, altered or duplicated.

The same checks without reading data, listings and ledgers alone, are what a run looks at before it relies on something.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import DamagedError, PrefselError
from prefsel.workspace.catalog import PATH, read_catalog
from prefsel.workspace.documents import find_document
from prefsel.workspace.entries import LEDGER, Entry, checked_entries
from prefsel.workspace.folders import SEAL, added_files, check_folder, read_seal
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import (
    SUMMARY,
    StageReport,
    ledgers_in,
    listing_of,
    load_summary,
    summary_and_listing,
)
from prefsel.workspace.storage import Storage
from prefsel.workspace.withdrawals import WITHDRAWN

CORPUS = ("groups", "pairs", "quarantine")
SHARDED = (
    *(*CORPUS, "eligible", "columns", "pair_columns", "scores", "selections"),
    *("prompts", "rewritten", "verdicts", "diffs"),
)
POINTER = "current.json"
PUBLISHED = "published"
"""Versions of data sets below it, each sealed: what is served is never set aside, but published anew."""
SEALED = ("datasets", "models", "evaluations", "tangents", "reports")
SUMMED = ("eligible", "scores", "selections", "prompts", "datasets", "models", "evaluations", "tangents")
"""Those of which a summary says that they are complete."""
LOADED = ("models", "tangents")
"""Of these, those that libraries load as they lie there."""


def root_of(path: str) -> str:
    """The artifact that a path lies in: kind and name."""
    return "/".join(path.split("/")[:2])


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str
    """`missing`, `altered`, `duplicated`, `added` or `uncommitted`."""
    path: str
    detail: str = ""
    content: str = ""
    """Hash of the bytes that were committed there, where it is known."""

    @property
    def root(self) -> str:
        """The artifact it is of: kind and name."""
        return root_of(self.path)

    @property
    def is_harmless(self) -> bool:
        """Whether nothing reads it: data that was never committed."""
        return self.problem == "uncommitted"

    def __str__(self) -> str:
        return f"{self.problem:<11} {self.path}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Verification:
    """What `verify` read and found."""

    artifacts: int = 0
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    retried: int = 0
    """Shards begun more than once: not an error, a count."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Nothing missing, duplicated or altered; data that was never committed does no harm."""
        return all(finding.is_harmless for finding in self.findings)


def verify(storage: Storage, *, quick: bool = False) -> Verification:
    """Check a whole workspace.

    Args:
        storage: The workspace.
        quick: Compare sizes and ledgers only, read no data.
    """
    found = Verification()
    for kind in (*SHARDED, *SEALED):
        for name in storage.folders(kind):
            _check(storage, f"{kind}/{name}", found, quick=quick)
    for name in storage.folders(PUBLISHED):
        for version in storage.folders(f"{PUBLISHED}/{name}"):
            _check(storage, f"{PUBLISHED}/{name}/{version}", found, quick=quick)
    if not quick:
        for name in storage.folders("selections"):
            paths = [f"selections/{name}/{source}" for source in storage.folders(f"selections/{name}")]
            found.findings += _check_unique(f"selections/{name}", [Artifact(storage, path) for path in paths], found)
    found.findings += _check_datasets(storage)
    found.findings += _check_catalog(storage)
    found.findings += _check_runs(storage)
    found.findings += _check_pointers(storage)
    found.findings += _check_newest(storage)
    return found


def check_under(storage: Storage, root: str, *, quick: bool = True) -> list[Finding]:
    """What is wrong with one artifact, all that lies below `root`; data that was never committed is left out."""
    if root.split("/")[0] not in (*SHARDED, *SEALED):
        return []
    found = Verification()
    try:
        _check(storage, root, found, quick=quick)
    except DamagedError as error:  # nothing can be listed where a file lies in the place of a folder
        found.findings.append(as_finding(error))
    return [finding for finding in found.findings if not finding.is_harmless]


def finished(storage: Storage, artifact: str) -> StageReport | None:
    """The report of an artifact that is complete, of which everything lies there; None while it is incomplete.

    Raises:
        DamagedError: it was complete, and something of it is gone or has another size; nothing is read to see that.
    """
    report, listing = summary_and_listing(storage, artifact)
    if report is not None and listing != listing_of(storage.sizes(artifact, recursive=True)):
        require_whole(storage, artifact)
    return report


def finished_folder(storage: Storage, path: str) -> dict[str, Any] | None:
    """The seal of a folder of which everything lies there; None while it is unfinished.

    Raises:
        DamagedError: something that it lists is gone or has another size.
    """
    seal = read_seal(storage, path)
    if seal is not None:
        require_whole(storage, path)
    return seal


def require_whole(storage: Storage, artifact: str) -> None:
    """Refuse an artifact of which something that was committed is gone or has another size; no data is read.

    Raises:
        DamagedError: names the first of them.
    """
    for finding in check_under(storage, artifact):
        raise storage.damaged(finding.path, finding.problem, finding.detail)


def as_finding(error: DamagedError) -> Finding:
    """What a reader found."""
    return Finding(error.problem, error.path, error.detail)


def _check(storage: Storage, root: str, found: Verification, *, quick: bool) -> None:
    """Check one artifact of any kind: its ledgers and seals, the data they name, and whether it is complete."""
    sizes = storage.sizes(root, recursive=True)
    sealed = sorted(name.removesuffix(f"/{SEAL}") for name in sizes if name.endswith(f"/{SEAL}"))
    committed: dict[str, Mapping[str, Entry]] = {}
    named: set[str] = set()
    for path in ledgers_in(sizes):
        entries, damage = checked_entries(storage, path)
        committed[path] = entries
        found.findings += map(as_finding, damage)
        found.artifacts += path not in sealed
        found.shards += len(entries)
        found.rows += sum(entry.rows for entry in entries.values())
        found.bytes += sum(entry.bytes for entry in entries.values())
        artifact = Artifact(storage, path)
        found.retried += sum(count > 1 for count in artifact.attempts(entries).values())
        for entry in entries.values():
            named.add(artifact.file(entry.shard))
            if wrong := artifact.check(entry, quick=quick, sizes=sizes):
                found.findings.append(Finding(wrong[0], artifact.file(entry.shard), wrong[1], entry.content))
    for path in sealed:
        found.artifacts += 1
        named |= _check_sealed(storage, path, found, committed, quick=quick)
    for name in sorted(sizes):
        if name.endswith(".parquet") and name not in named and f"/{LEDGER}/" not in name:
            detail = "data without a ledger object: an attempt that died; harmless"
            found.findings.append(Finding("uncommitted", name, detail))
    try:
        records = [name for name in sizes if name.startswith(f"{root}/_files/") and name.endswith(".json")]
        for name in records:
            find_document(storage, name)
        summary = load_summary(storage, root) if f"{root}/{SUMMARY}" in sizes else None
    except DamagedError as error:
        found.findings.append(as_finding(error))
        return
    if summary is not None:
        found.findings += _check_complete(root, summary, committed, sealed)


def _check_sealed(
    storage: Storage, path: str, found: Verification, committed: Mapping[str, Mapping[str, Entry]], *, quick: bool
) -> set[str]:
    """Check the files of a sealed folder; returns their paths."""
    try:
        seal = read_seal(storage, path)
    except DamagedError as error:
        found.findings.append(as_finding(error))
        return set()
    assert seal is not None, "it was listed"
    known = {finding.path for finding in found.findings}
    for name, (problem, detail) in check_folder(storage, path, quick=quick).items():
        if f"{path}/{name}" not in known:
            found.findings.append(Finding(problem, f"{path}/{name}", detail, seal["files"][name]["blake2b"]))
    if path.startswith(tuple(f"{kind}/" for kind in LOADED)):
        added = added_files(storage, path, seal)
        found.findings += [Finding("added", f"{path}/{name}", "its seal does not name it") for name in added]
    margins = f"evaluations/{path.removeprefix('models/')}/{SEAL}"
    if seal["info"].get("num_margins") and not storage.exists(margins):
        found.findings.append(Finding("missing", margins, f"{path} was measured pair by pair"))
    shards = committed.get(f"{path}/data")
    for name in seal["files"]:
        if path.startswith("datasets/") and name.startswith("data/") and name.endswith(".parquet"):
            shard = name.removeprefix("data/").removesuffix(".parquet")
            if shards is None or shard not in shards:
                found.findings.append(Finding("missing", f"{path}/data/{LEDGER}/{shard}.json", "its seal names it"))
    return {f"{path}/{name}" for name in seal["files"]}


def _check_complete(
    root: str, summary: StageReport, committed: Mapping[str, Mapping[str, Entry]], sealed: list[str]
) -> Iterable[Finding]:
    """An artifact with a summary is complete: its seal is there, or as many committed shards as the summary counts."""
    kind = root.split("/")[0]
    if kind in SEALED:
        if root not in sealed:
            yield Finding("missing", f"{root}/{SEAL}", "it has a summary")
        return
    count = sum(len(entries) for entries in committed.values())
    if count != summary.shards:
        yield Finding("missing", root, f"{count:,} of {summary.shards:,} shards in its ledgers")


def _check_datasets(storage: Storage) -> Iterable[Finding]:
    """The dataset that the summary of a selection names must be finished."""
    for name in storage.folders("selections"):
        try:
            summary = load_summary(storage, f"selections/{name}")
        except DamagedError:
            continue  # told already
        dataset = summary.details.get("dataset") if summary is not None else None
        if dataset is not None and not storage.exists(f"{dataset}/{SEAL}"):
            yield Finding("missing", f"{dataset}/{SEAL}", f"selections/{name} names it")


def _check_unique(selection: str, artifacts: list[Artifact], found: Verification) -> list[Finding]:
    """A pair may be selected once, over all sources and shards of a selection; damaged ones were told already."""
    if any(finding.path.startswith(f"{selection}/") and not finding.is_harmless for finding in found.findings):
        return []
    columns = [artifact.read(shard, ["pair_id"])["pair_id"] for artifact in artifacts for shard in artifact.entries()]
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.binary(16)).combine_chunks()
    words_N2 = np.frombuffer(ids.buffers()[1] or b"", ">u8")[2 * ids.offset :][: 2 * len(ids)].reshape(-1, 2)
    order_N = np.lexsort((words_N2[:, 1], words_N2[:, 0]))
    is_again_N = (words_N2[order_N[1:]] == words_N2[order_N[:-1]]).all(axis=1)
    twice = order_N[1:][is_again_N]
    if not len(twice):
        return []
    return [Finding("duplicated", selection, f"{len(twice)} pairs, first {ids[int(twice[0])].as_py().hex()}")]


def _check_catalog(storage: Storage) -> list[Finding]:
    """Every shard of the corpus must be committed, and stand in the catalog once."""
    try:
        if not storage.exists(PATH):
            return [Finding("missing", PATH, "there is a corpus")] if storage.folders("groups") else []
        catalog = read_catalog(storage)
    except DamagedError as error:
        return [as_finding(error)]
    findings = []
    for source in catalog.sources:
        known = {kind: checked_entries(storage, f"{kind}/{source.name}")[0] for kind in CORPUS}
        for file in source.files:
            for shard in file.shards:
                names = {"groups": shard, "pairs": shard, "quarantine": file.quarantine_of(shard)}
                lost = [
                    f"{kind}/{source.name}/{name}.parquet" for kind, name in names.items() if name not in known[kind]
                ]
                findings += [Finding("missing", path, "in the catalog, not in its ledger") for path in lost]
    counted = Counter(shard.key for shard in catalog.shards)
    return findings + [
        Finding("duplicated", PATH, f"{key} stands in it {n} times") for key, n in counted.items() if n > 1
    ]


def _check_runs(storage: Storage) -> list[Finding]:
    """Every manifest and every record of a withdrawal must be what was written, and the report of a run there."""
    findings = []
    for name in (*storage.files("runs"), *storage.files(WITHDRAWN, recursive=True)):
        try:
            manifest = find_document(storage, name)
        except DamagedError as error:
            findings.append(as_finding(error))
            continue
        report = manifest.get("report") if isinstance(manifest, dict) else None
        if report is not None and not storage.exists(f"{report}/{SEAL}"):
            findings.append(Finding("missing", f"{report}/{SEAL}", f"{name} names it"))
    return findings


def _check_pointers(storage: Storage) -> Iterable[Finding]:
    """The pointer of every published name must say which finished version is current."""
    for name in storage.folders(PUBLISHED):
        path = f"{PUBLISHED}/{name}/{POINTER}"
        if not any(
            storage.exists(f"{PUBLISHED}/{name}/{one}/{SEAL}") for one in storage.folders(f"{PUBLISHED}/{name}")
        ):
            continue  # the first version was never finished
        if not storage.exists(path):
            yield Finding("missing", path, "there are versions; publish once more")
            continue
        try:
            seal = f"{json.loads(storage.read(path))['path']}/{SEAL}"
        except (ValueError, TypeError, KeyError):
            yield Finding("altered", path, "it names no version; remove it and publish again")
            continue
        if not storage.exists(seal):
            yield Finding("missing", seal, f"{path} names it")


def _check_newest(storage: Storage) -> Iterable[Finding]:
    """What the newest run of every name was made with must be there: shards of its columns, summaries of the rest."""
    newest = {name.rsplit("-", 3)[0]: name for name in sorted(storage.files("runs"), key=_moment)}
    for name in newest.values():
        try:
            manifest = find_document(storage, name) or {}
        except DamagedError:
            continue  # told already
        if "report" not in manifest:  # rows of it were taken back since, and all that looked at them with them
            continue
        sources = sorted({key.rpartition("/")[0] for key in manifest.get("shards", ())})
        paths, made = ([one["path"] for one in rows] for rows in _artifacts(manifest))
        for path in (*paths, *made):
            if path.split("/")[0] in SUMMED and not storage.exists(f"{path}/{SUMMARY}"):
                yield Finding("missing", f"{path}/{SUMMARY}", f"{name} names it")
            elif "@" in path and not storage.files(path, recursive=True):
                yield Finding("missing", path, f"{name} names it")
        for path in paths:
            if path.split("/")[0] in ("columns", "pair_columns"):
                known = {f"{one}/{shard}" for one in sources for shard in checked_entries(storage, f"{path}/{one}")[0]}
                lost = [key for key in manifest.get("shards", ()) if key not in known]
                yield from (Finding("missing", f"{path}/{key}.parquet", f"{name} was made with it") for key in lost)


def _artifacts(manifest: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a manifest says of the artifacts of its run: those of the corpus, and of corpora that models answered."""
    made = [row for one in manifest.get("made", ()) for row in one["artifacts"]]
    return list(manifest.get("artifacts", ())), made


def _moment(run: str) -> list[str]:
    """Date and time in the name of a manifest, `<name>-<date>-<time>-<hash>.json`."""
    return run.rsplit("-", 3)[1:3]


def require_clean(result: Verification) -> None:
    """Refuse a workspace that is not as it was committed.

    Raises:
        PrefselError: it is not.
    """
    if not result.is_clean:
        raise PrefselError("verify: the workspace does not match its ledgers; --repair sets aside and makes again")
