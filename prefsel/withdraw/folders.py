"""Artifacts that go whole, pages that show rows, and sealed folders that go on without them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.errors import DamagedError
from prefsel.withdraw.tables import HEX_ID, ID_COLUMNS, is_among, scrubbed, without_rows
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.entries import LEDGER
from prefsel.workspace.folders import SEAL, described, read_seal
from prefsel.workspace.manifest import SUMMARY, load_summary
from prefsel.workspace.notes import DAMAGED, NOTE
from prefsel.workspace.parquet_bytes import to_bytes
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import PUBLISHED, verify
from prefsel.workspace.withdrawals import Gone

CORPUS_WIDE = ("eligible", "scores", "selections", "diffs")
"""What looks at the whole corpus has another name without the rows: it is removed whole, and the next run makes it."""
EVALUATION = "evaluation.json"
TEXT = (".json", ".jsonl", ".md")
"""Files of a sealed folder that may name a pair, as a card names the one that a threshold lies at."""


def remove_artifact(storage: Storage, path: str) -> None:
    """Remove an artifact, and first what says that it is complete: a kill leaves nothing half that looks whole."""
    storage.delete(f"{path}/{SUMMARY}")
    storage.delete(f"{path}/{SEAL}")
    storage.delete_tree(path)


def remove_pages(storage: Storage, gone: Gone) -> int:
    """Remove the pages of all runs, which show examples, and copies set aside; manifests stay without examples.

    Returns:
        How many pages there were.
    """
    for name in storage.files("runs"):
        try:
            manifest = find_document(storage, name)
        except DamagedError:  # it may say anything
            storage.delete(name)
            continue
        if manifest is not None:
            kept = {key: value for key, value in scrubbed(manifest, gone).items() if key != "report"}
            if kept != manifest:
                write_document(storage, name, kept, indent=1)
    pages = storage.folders("reports")
    for run in pages:
        remove_artifact(storage, f"reports/{run}")
    for name in storage.files(DAMAGED, recursive=True):
        if not name.endswith(f"/{NOTE}"):
            storage.delete(name)
    return len(pages)


def remove_artifacts(storage: Storage, gone: Gone, shards: frozenset[str]) -> int:
    """Remove scores, selections, their datasets and evaluations that were made with what is taken back.

    Args:
        storage: The workspace.
        gone: What is taken back.
        shards: `<source>/<shard>` of the groups that held something of it.

    Returns:
        How many there were.
    """
    paths, datasets = [], []
    for kind in CORPUS_WIDE:
        for name in storage.folders(kind):
            path = f"{kind}/{name}"
            is_of_them = any(f"{source}/{shard}" in shards for source, shard in _shards_of(storage, path))
            if is_of_them or _summary_names(storage, path, gone):
                paths.append(path)
                report = load_summary(storage, path) if kind == "selections" else None
                datasets += [report.details["dataset"]] if report and report.details.get("dataset") else []
    named = [f"{kind}/{name}" for kind in ("datasets", "evaluations") for name in storage.folders(kind)]
    paths += datasets
    for path in named:
        if path not in datasets and (path.startswith("datasets") or storage.exists(f"{path}/{EVALUATION}")):
            tables = (name for name in storage.files(path, recursive=True) if name.endswith(".parquet"))
            paths += [path] if any(_holds(storage, name, gone) for name in tables) else []
    # Datasets first: that of a selection is known by its selection alone.
    for path in sorted(set(paths), key=lambda path: not path.startswith("datasets/")):
        remove_artifact(storage, path)
    return len(set(paths))


def _summary_names(storage: Storage, path: str, gone: Gone) -> bool:
    """Whether a summary names something that is taken back, as a threshold may; one that cannot be read may."""
    try:
        return _names(find_document(storage, f"{path}/{SUMMARY}"), gone)
    except DamagedError:
        return True


def _shards_of(storage: Storage, path: str) -> list[tuple[str, str]]:
    """(source, shard) of everything under a folder of sources, by the names of its data alone."""
    files = (name.removeprefix(f"{path}/") for name in storage.files(path, recursive=True))
    data = (name.removesuffix(".parquet").split("/") for name in files if name.endswith(".parquet"))
    return [(parts[0], parts[1]) for parts in data if len(parts) == 2]


def _holds(storage: Storage, name: str, gone: Gone) -> bool:
    """Whether a Parquet file has a row of what is taken back; one that cannot be read may."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read(name)))
    except pa.ArrowInvalid:
        return True
    known = {"pair_id": gone.pairs}
    return any(
        bool(is_among(table[column], known.get(column, gone.prompts)).any())
        for column in ID_COLUMNS
        if column in table.column_names
    )


def remove_uncommitted(storage: Storage) -> int:
    """Remove data that no ledger and no seal names, which an attempt that died left: they may hold any row.

    Returns:
        How many files there were.
    """
    names = [one.path for one in verify(storage, quick=True).findings if one.is_harmless]
    for name in names:
        storage.delete(name)
    return len(names)


def rewrite_folders(storage: Storage, gone: Gone) -> int:
    """Take rows and ids out of what models were trained on, the margins of held-out pairs, and published versions.

    A folder keeps the content that its seal says: of a model that is the identity of its weights, which stay as they
    are, and numbers that were computed with it are named by that.

    Returns:
        How many folders changed.
    """
    paths = [f"{kind}/{name}" for kind in ("models", "tangents", "evaluations") for name in storage.folders(kind)]
    paths += [f"{PUBLISHED}/{name}/{one}" for name in storage.folders(PUBLISHED) for one in _versions(storage, name)]
    return sum(_rewrite_folder(storage, path, gone) for path in paths)


def _versions(storage: Storage, name: str) -> list[str]:
    return [one for one in storage.folders(f"{PUBLISHED}/{name}") if one != LEDGER]


def _rewrite_folder(storage: Storage, path: str, gone: Gone) -> bool:
    """Rewrite the files of one folder; the seal first, so a kill between the two does not pass for the former file."""
    summary = find_document(storage, f"{path}/{SUMMARY}")
    if summary is not None and (kept := scrubbed(summary, gone)) != summary and _names(summary, gone):
        write_document(storage, f"{path}/{SUMMARY}", kept, indent=1)
    is_published = path.startswith(f"{PUBLISHED}/")
    try:
        seal = read_seal(storage, path)
    except DamagedError:
        if not is_published:
            raise  # a run sets it aside, and finishes the withdrawal
        remove_artifact(storage, path)  # nobody can tell what it holds, and it is published anew
        return True
    if seal is None:
        return False
    changed = {}
    for name in seal["files"]:
        if not name.endswith((".parquet", *TEXT)) or not storage.exists(f"{path}/{name}"):
            continue
        data = storage.read(f"{path}/{name}")
        try:
            kept_data = _without(name, data, gone)
        except pa.ArrowInvalid as error:
            if not is_published:
                raise storage.damaged(f"{path}/{name}", "altered", str(error)) from error
            storage.delete(f"{path}/{name}")
            continue
        if kept_data is not data:
            changed[name] = kept_data
    new = seal | {"files": seal["files"] | {name: described(data) for name, data in changed.items()}}
    new = scrubbed(new, gone) if _names(seal, gone) else new
    if new != seal:
        write_document(storage, f"{path}/{SEAL}", new, indent=1)
    for name, data in changed.items():
        storage.write(f"{path}/{name}", data)
    return bool(changed)


def _without(name: str, data: bytes, gone: Gone) -> bytes:
    """A file without what is taken back; itself where it has none of it."""
    if name.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        kept = without_rows(table, gone)
        return data if kept is table else to_bytes(kept)
    text = data.decode(errors="surrogateescape")
    return scrubbed(text, gone).encode(errors="surrogateescape") if _names(text, gone) else data


def _names(document: object, gone: Gone) -> bool:
    """Whether a document names something that is taken back, as examples of a training do."""
    return any(one in gone.hex_ids for one in HEX_ID.findall(str(document)))
