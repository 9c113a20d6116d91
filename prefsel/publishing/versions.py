"""Versions and the pointer to the current one: what is there, moving it, removing what nobody reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from prefsel.errors import DamagedError, IntegrityError, UserError, invalid
from prefsel.workspace import swap
from prefsel.workspace.folders import SEAL, check_folder, read_seal, read_sealed
from prefsel.workspace.storage import Storage

GRACE_H = 24.0
"""How long a version stays after it was current: whoever opened it then may still read it."""


@dataclass(frozen=True)
class Move:
    """A version became current."""

    version: str
    at: str
    """When, as ISO 8601 in UTC."""
    how: str
    """`publish` or `rollback`."""


@dataclass(frozen=True)
class Pointer:
    """What `current.json` holds."""

    version: str
    path: str
    """Folder of the version, relative to the workspace."""
    moves: Sequence[Move]
    """Every move, the last one to `version`."""


def folder(name: str, version: str = "") -> str:
    """Where a published name, or one of its versions, lies in the workspace.

    Raises:
        UserError: it is no name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise invalid("name", name, "letters, digits, '.', '_' and '-', a letter or digit first")
    return f"published/{name}/{version}" if version else f"published/{name}"


def read_pointer(storage: Storage, name: str) -> tuple[Pointer, swap.Version] | None:
    """The pointer of a name with its version for a swap; None while nothing is published.

    Raises:
        IntegrityError: it was written by something else.
    """
    path = f"{folder(name)}/current.json"
    found = swap.read(storage, path)
    if found is None:
        return None
    try:
        fields = json.loads(found[0])
        return Pointer(**fields | {"moves": [Move(**move) for move in fields["moves"]]}), found[1]
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(
            f"{path}: not what `prefsel publish` writes; remove it and publish again: {error}"
        ) from error


def require_pointer(storage: Storage, name: str) -> tuple[Pointer, swap.Version]:
    """`read_pointer`, of a name that must be published.

    Raises:
        UserError: it is not.
    """
    found = read_pointer(storage, name)
    if found is None:
        raise invalid("name", name, storage.folders("published") or "none: nothing is published here")
    return found


def versions(storage: Storage, name: str) -> list[str]:
    """The finished versions of a name, oldest first."""
    return [one for one in _folders(storage, name) if storage.exists(f"{folder(name, one)}/{SEAL}")]


def files_of(storage: Storage, name: str, version: str) -> dict[str, dict[str, Any]]:
    """What the seal of a version says of its files, by name.

    Raises:
        IntegrityError: there is none, or it is not what was written.
    """
    with _as_published(storage, name, version):
        if (seal := read_seal(storage, folder(name, version))) is None:
            raise storage.damaged(f"{folder(name, version)}/{SEAL}", "missing")
        files: dict[str, dict[str, Any]] = seal["files"]
        return files


def read_file(storage: Storage, name: str, version: str, file: str) -> bytes:
    """A file of a version, as it was published.

    Raises:
        IntegrityError: it is gone or altered.
    """
    files = files_of(storage, name, version)
    with _as_published(storage, name, version):
        if file not in files:
            raise storage.damaged(f"{folder(name, version)}/{file}", "missing", "its seal does not name it")
        return read_sealed(storage, folder(name, version), file, files[file])


def require_whole(storage: Storage, name: str, version: str) -> None:
    """Compare every file of a version with its seal.

    Raises:
        IntegrityError: names what is gone or altered.
    """
    with _as_published(storage, name, version):
        for file, (problem, detail) in check_folder(storage, folder(name, version), quick=False).items():
            raise storage.damaged(f"{folder(name, version)}/{file}", problem, detail)


@contextmanager
def _as_published(storage: Storage, name: str, version: str) -> Iterator[None]:
    """Tell of damage what mends it: no run makes a version again."""
    try:
        yield
    except DamagedError as error:
        raise IntegrityError(
            f"{error.path}: {error.problem}; publish once more, or roll back {name} to a version that is whole"
        ) from error


def _folders(storage: Storage, name: str) -> list[str]:
    found = [one for one in storage.folders(folder(name)) if re.fullmatch(r"v\d{4,}", one)]
    return sorted(found, key=_number)


def _number(version: str) -> int:
    return int(version[1:])


def new_version(storage: Storage, name: str) -> str:
    """The name of the next version; what a publishing that was killed left unfinished is removed."""
    sealed = versions(storage, name)
    for one in set(_folders(storage, name)) - set(sealed):
        storage.delete_tree(folder(name, one))
    found = read_pointer(storage, name)
    seen = [*sealed, *(move.version for move in found[0].moves)] if found else sealed
    return f"v{max(map(_number, seen), default=0) + 1:04}"


def point(storage: Storage, name: str, version: str, how: str) -> None:
    """Make a version the current one.

    Raises:
        Conflict: the pointer was moved meanwhile.
    """
    pointer, known = read_pointer(storage, name) or (None, None)
    moves = [*(pointer.moves if pointer else ()), Move(version, _now().isoformat(timespec="seconds"), how)]
    made = Pointer(version, folder(name, version), moves)
    swap.swap(storage, f"{folder(name)}/current.json", json.dumps(asdict(made), indent=1).encode(), known)


def rollback(storage: Storage, name: str, to: str | None = None) -> tuple[str, str]:
    """Make an earlier version the current one again, after its files were checked against its seal.

    Args:
        storage: The workspace, held.
        name: What is published.
        to: The version; None: the newest one that is older than the current one.

    Returns:
        The version that was current, and the one that is now.

    Raises:
        UserError: there is no such version.
        IntegrityError: its files are not what was published.
    """
    pointer, _ = require_pointer(storage, name)
    there = versions(storage, name)
    if to is None:
        before = [one for one in there if _number(one) < _number(pointer.version)]
        if not before:
            raise UserError(f"rollback {name}: {pointer.version} is current, and no version before it is left")
        to = before[-1]
    if to not in there:
        raise invalid("--to", to, there)
    require_whole(storage, name, to)
    if to != pointer.version:
        point(storage, name, to, "rollback")
    return pointer.version, to


def prune(storage: Storage, name: str, keep: int, grace_h: float = GRACE_H) -> list[str]:
    """Remove old versions.

    Nobody can know who reads a folder, but a reader comes through the pointer: a version that it has not named for
    `grace_h` is opened by nobody anew, and what was opened before has had that long.

    Args:
        storage: The workspace, held.
        name: What is published.
        keep: How many of the newest versions stay; the current one stays in any case.
        grace_h: Hours that a version stays after it was current.

    Returns:
        What was removed.
    """
    pointer, _ = require_pointer(storage, name)
    since = _now() - timedelta(hours=grace_h)
    ends = [datetime.fromisoformat(move.at) for move in pointer.moves[1:]]
    recent = {move.version for move, end in zip(pointer.moves, ends) if end > since}
    there = versions(storage, name)
    gone = [one for one in there[: max(0, len(there) - keep)] if one not in {pointer.version, *recent}]
    for one in gone:
        storage.delete(f"{folder(name, one)}/{SEAL}")  # first, so that half a version is none
        storage.delete_tree(folder(name, one))
    return gone


def _now() -> datetime:
    return datetime.now(UTC)
