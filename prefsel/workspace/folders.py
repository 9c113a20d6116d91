"""Folders in a workspace (models, datasets), sealed by a ledger object that lists every file and its hashes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.entries import LEDGER, SEAL_NAME
from prefsel.workspace.manifest import SUMMARY
from prefsel.workspace.patience import confirmed
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage, digest

SEAL = f"{LEDGER}/{SEAL_NAME}"
TRAINING = "training"
"""Folder inside a model's of what its training keeps until it is sealed."""


def described(data: bytes) -> dict[str, Any]:
    """What a seal says of a file: its size, its content hash, and one that is compared whenever it is read.

    A read compares xxh3, which takes a tenth of the time that blake2b takes, and less than reading the file.
    """
    return {"bytes": len(data), "blake2b": digest(data), "xxh3": xxh3_128_hexdigest(data)}


def read_seal(storage: Storage, path: str) -> dict[str, Any] | None:
    """The seal of a finished folder artifact (`files`, `content`, `info`), or None while it is unfinished.

    Raises:
        DamagedError: the seal is not what was written.
    """
    seal: dict[str, Any] | None = find_document(storage, f"{path}/{SEAL}")
    if seal is not None and not (isinstance(seal, dict) and {"content", "files"} <= seal.keys()):
        raise storage.damaged(f"{path}/{SEAL}", "altered", "it is no seal")
    return seal


def folder_content(storage: Storage, path: str) -> str | None:
    """The content hash of a finished folder artifact; None while it is unfinished."""
    seal = read_seal(storage, path)
    return seal["content"] if seal else None


def write_seal(storage: Storage, path: str, listed: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Seal files that already lie under `path`; `listed` holds what is known of each: bytes and blake2b at least."""
    content = hash_hex(*(f"{name}:{file['blake2b']}" for name, file in sorted(listed.items())))
    seal = {"content": content, "files": listed, "info": dict(info)}
    write_document(storage, f"{path}/{SEAL}", seal, indent=1)
    return seal


def commit_folder(storage: Storage, folders: Mapping[str, Path], path: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """Copy local folders (name inside the artifact, "" for its root → folder) under `path` and seal them.

    One file is in memory at a time.
    """
    listed = {}
    for inside, folder in folders.items():
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = file.read_bytes()
            name = (Path(inside) / file.relative_to(folder)).as_posix()
            storage.write(f"{path}/{name}", data)
            listed[name] = described(data)
    return write_seal(storage, path, listed, info)


def seal_files(storage: Storage, path: str, files: Mapping[str, bytes], info: Mapping[str, Any]) -> dict[str, Any]:
    """Write `files` under `path` and seal them."""
    for name, data in files.items():
        storage.write(f"{path}/{name}", data)
    return write_seal(storage, path, {name: described(data) for name, data in files.items()}, info)


def check_folder(storage: Storage, path: str, *, quick: bool) -> dict[str, tuple[str, str]]:
    """What is wrong with the files of a sealed folder: file → `missing` or `altered`, and how it shows.

    Raises:
        DamagedError: the seal is not what was written.
    """
    seal = read_seal(storage, path)
    if seal is None:
        return {SEAL: ("missing", "")}
    sizes = storage.sizes(path, recursive=True)
    wrong = {}
    for name, file in seal["files"].items():
        size = storage.size_of(f"{path}/{name}", sizes)
        if size is None:
            wrong[name] = ("missing", "")
        elif size != file["bytes"]:
            wrong[name] = ("altered", f"{file['bytes']:,} bytes were committed, found {size:,}")
        elif not quick and not storage.holds(f"{path}/{name}", file["blake2b"]):
            wrong[name] = ("altered", "its hash is not the committed one")
    return wrong


def added_files(storage: Storage, path: str, seal: Mapping[str, Any]) -> list[str]:
    """Names of files in a sealed folder that its seal does not name: who loads the folder as it lies would use them."""
    names = [name.removeprefix(f"{path}/") for name in storage.files(path, recursive=True)]
    ours = (f"{LEDGER}/", f"{TRAINING}/")
    return [name for name in names if name not in seal["files"] and name != SUMMARY and not name.startswith(ours)]


def read_sealed(storage: Storage, path: str, name: str, file: Mapping[str, Any]) -> bytes:
    """A file of a sealed folder, compared with what its seal says of it.

    Raises:
        DamagedError: it is gone or altered.
    """
    return confirmed(storage.is_local, lambda: _read_sealed(storage, f"{path}/{name}", file))


def _read_sealed(storage: Storage, full: str, file: Mapping[str, Any]) -> bytes:
    try:
        data = storage.read(full)
    except FileNotFoundError:
        raise storage.damaged(full, "missing") from None
    if len(data) != file["bytes"]:
        raise storage.damaged(full, "altered", f"{file['bytes']:,} bytes were committed, found {len(data):,}")
    if not _is_same(data, file):
        raise storage.damaged(full, "altered", "its hash is not the committed one")
    return data


def _is_same(data: bytes, file: Mapping[str, Any]) -> bool:
    """Whether these bytes are those of a seal; seals of earlier versions know blake2b alone."""
    return xxh3_128_hexdigest(data) == file["xxh3"] if "xxh3" in file else digest(data) == file["blake2b"]


def fetch_folder(storage: Storage, path: str, patterns: Sequence[str] = ("*",)) -> Path:
    """A local directory with the files of a sealed folder: the folder itself when the workspace is local.

    Args:
        storage: The workspace.
        path: The folder.
        patterns: Of the names of the files that are needed; the others may be missing.

    Raises:
        DamagedError: a file that is needed is gone, or is not what was sealed; or another one lies among them.
    """
    seal = read_seal(storage, path)
    if seal is None:
        raise storage.damaged(f"{path}/{SEAL}", "missing", "the folder is not finished")
    for name in added_files(storage, path, seal) if storage.is_local else ():
        raise storage.damaged(f"{path}/{name}", "added", "its seal does not name it")
    folder = Path(tempfile.gettempdir()) / f"prefsel-{seal['content']}"
    for name, file in seal["files"].items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        target = folder / name
        if not storage.is_local and target.is_file() and _is_same(target.read_bytes(), file):
            continue
        data = read_sealed(storage, path, name, file)
        if not storage.is_local:
            Storage(str(folder)).write(name, data)
    return storage.local(path) if storage.is_local else folder
