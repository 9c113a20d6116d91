"""`verify`: re-read every artifact against its ledger, and say what is missing, duplicated or altered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.workspace.catalog import PATH, quarantine_name, read_catalog
from prefsel.workspace.folders import SEAL, check_folder
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.storage import Storage

SHARDED = (
    *("groups", "pairs", "quarantine", "eligible", "columns", "pair_columns", "scores", "selections"),
    *("prompts", "rewritten", "verdicts"),
)
SEALED = ("datasets", "models", "evaluations", "tangents", "reports")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str
    """`missing`, `altered`, `duplicated` or `uncommitted`."""
    path: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.problem:<11} {self.path}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Verification:
    """What `verify` read and found."""

    artifacts: int
    shards: int
    rows: int
    bytes: int
    retried: int
    """Shards begun more than once: not an error, a count."""
    findings: list[Finding]

    @property
    def is_clean(self) -> bool:
        """Nothing missing, duplicated or altered; data that was never committed does no harm."""
        return all(finding.problem == "uncommitted" for finding in self.findings)


def verify(storage: Storage, *, quick: bool = False) -> Verification:
    """Check a whole workspace.

    Args:
        storage: the workspace.
        quick: compare sizes and ledgers only, read no data.
    """
    findings, entries, retried, artifacts = [], [], 0, 0
    files = [name for kind in SHARDED for name in storage.files(kind, recursive=True)]
    for path in sorted({name.split("/_ledger/")[0] for name in files if "/_ledger/" in name}):
        artifact = Artifact(storage, path)
        known = artifact.entries()
        artifacts += 1
        entries += list(known.values())
        retried += sum(count > 1 for count in artifact.attempts().values())
        findings += _check_artifact(artifact, known, files, quick=quick)
    if not quick:
        for name in storage.folders("selections"):
            paths = [f"selections/{name}/{source}" for source in storage.folders(f"selections/{name}")]
            findings += _check_unique(f"selections/{name}", [Artifact(storage, path) for path in paths])
    sealed = [name for kind in SEALED for name in storage.files(kind, recursive=True) if name.endswith(SEAL)]
    for path in (name.removesuffix(f"/{SEAL}") for name in sealed):
        artifacts += 1
        wrong = check_folder(storage, path, quick=quick)
        findings += [Finding(problem, f"{path}/{name}") for name, problem in wrong.items()]
    if storage.exists(PATH):
        findings += _check_catalog(storage)
    for kind in ("eligible", "scores", "selections"):
        findings += _check_complete(storage, kind)
    total_bytes = sum(entry.bytes for entry in entries)
    return Verification(artifacts, len(entries), sum(e.rows for e in entries), total_bytes, retried, findings)


def _check_artifact(artifact: Artifact, known: dict[str, Entry], files: list[str], *, quick: bool) -> list[Finding]:
    findings = []
    for entry in known.values():
        problem = artifact.check(entry, quick=quick)
        if problem is None and not quick:
            problem = _check_rows(artifact, entry)
        if problem:
            findings.append(Finding(problem, artifact.file(entry.shard)))
    data = {n for n in files if n.startswith(f"{artifact.path}/") and n.endswith(".parquet") and "/_ledger/" not in n}
    for name in sorted(data - {artifact.file(shard) for shard in known}):
        findings.append(Finding("uncommitted", name, "data without a ledger object: an attempt that died; harmless"))
    return findings


def _check_rows(artifact: Artifact, entry: Entry) -> str | None:
    with artifact.storage.filesystem.open_input_file(artifact.storage.full(artifact.file(entry.shard))) as source:
        return None if pq.ParquetFile(source).metadata.num_rows == entry.rows else "altered"


def _check_unique(selection: str, artifacts: list[Artifact]) -> list[Finding]:
    """A pair may be selected once, over all sources and shards of a selection."""
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
    catalog = read_catalog(storage)
    findings = []
    for source in catalog.sources:
        kinds = ("groups", "pairs", "quarantine")
        known = {kind: Artifact(storage, f"{kind}/{source.name}").entries() for kind in kinds}
        for file in source.files:
            for shard in file.shards:
                names = {"groups": shard, "pairs": shard, "quarantine": quarantine_name(shard, file.uri)}
                lost = [f"{kind}/{source.name}/{name}" for kind, name in names.items() if name not in known[kind]]
                findings += [Finding("missing", path, "in the catalog, not in its ledger") for path in lost]
    counted = Counter(shard.key for shard in catalog.shards)
    return findings + [Finding("duplicated", key, "in the catalog") for key, n in counted.items() if n > 1]


def _check_complete(storage: Storage, kind: str) -> list[Finding]:
    """An artifact with a summary is complete: it has as many committed shards as the summary counts."""
    findings = []
    for name in storage.folders(kind):
        root = f"{kind}/{name}"
        summary = load_summary(storage, root)
        if summary is not None:
            sources = (folder for folder in storage.folders(root) if folder != "_ledger")
            found = sum(len(Artifact(storage, f"{root}/{source}").entries()) for source in sources)
            if found != summary.shards:
                findings.append(Finding("missing", root, f"{found} of {summary.shards} shards in its ledgers"))
    return findings
