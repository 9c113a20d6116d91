"""Folders in a workspace (models, datasets), sealed by a ledger object that lists every file and its hash."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefsel.errors import IntegrityError
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage, digest

SEAL = "_ledger/files.json"


def read_seal(storage: Storage, path: str) -> dict[str, Any] | None:
    """The seal of a finished folder artifact (`files`, `content`, `info`), or None while it is unfinished."""
    return json.loads(storage.read(f"{path}/{SEAL}")) if storage.exists(f"{path}/{SEAL}") else None


def folder_content(storage: Storage, path: str) -> str | None:
    """The content hash of a finished folder artifact; None while it is unfinished."""
    seal = read_seal(storage, path)
    return seal["content"] if seal else None


def write_seal(storage: Storage, path: str, listed: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Seal files that already lie under `path`; `listed` holds name → bytes and blake2b."""
    content = hash_hex(*(f"{name}:{file['blake2b']}" for name, file in sorted(listed.items())))
    seal = {"content": content, "files": listed, "info": dict(info)}
    storage.write(f"{path}/{SEAL}", json.dumps(seal, indent=1).encode())
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
            listed[name] = {"bytes": len(data), "blake2b": digest(data)}
    return write_seal(storage, path, listed, info)


def seal_files(storage: Storage, path: str, files: Mapping[str, bytes], info: Mapping[str, Any]) -> dict[str, Any]:
    """Write `files` under `path` and seal them."""
    for name, data in files.items():
        storage.write(f"{path}/{name}", data)
    listed = {name: {"bytes": len(data), "blake2b": digest(data)} for name, data in files.items()}
    return write_seal(storage, path, listed, info)


def check_folder(storage: Storage, path: str, *, quick: bool) -> dict[str, str]:
    """What is wrong with a sealed folder: file → `missing` or `altered`."""
    seal = read_seal(storage, path)
    if seal is None:
        return {SEAL: "missing"}
    wrong = {}
    for name, file in seal["files"].items():
        size = storage.size(f"{path}/{name}")
        if size is None:
            wrong[name] = "missing"
        elif size != file["bytes"] or (not quick and digest(storage.read(f"{path}/{name}")) != file["blake2b"]):
            wrong[name] = "altered"
    return wrong


def fetch_folder(storage: Storage, path: str, patterns: Sequence[str] = ("*",)) -> Path:
    """A local directory with the files of a sealed folder: the folder itself when the workspace is local.

    Args:
        storage: The workspace.
        path: The folder.
        patterns: Of the names of the files that are needed; the others may be missing.

    Raises:
        IntegrityError: a fetched file does not match the seal.
    """
    if storage.is_local:
        return storage.local(path)
    seal = read_seal(storage, path)
    if seal is None:
        raise IntegrityError(f"{path}: not finished, it has no {SEAL}")
    folder = Path(tempfile.gettempdir()) / f"prefsel-{seal['content']}"
    for name, file in seal["files"].items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        target = folder / name
        if target.is_file() and digest(target.read_bytes()) == file["blake2b"]:
            continue
        data = storage.read(f"{path}/{name}")
        if digest(data) != file["blake2b"]:
            raise IntegrityError(f"{path}/{name}: altered since it was committed")
        Storage(str(folder)).write(name, data)
    return folder
