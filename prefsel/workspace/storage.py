"""Bytes of a workspace: one directory, local or in an object store, addressed by relative paths.

Nothing written here is ever visible in part: local files are written beside their target and renamed, objects are
sent by one call after all their bytes exist. A storage that carries an epoch (`lease.hold` gives it) writes and deletes
only while the lease of that epoch is in force.

Between that check and the write lies a window, which a process would have to be stopped in for as long as a lease takes
to expire. In a directory it is the time between two system calls, and closed where the new writer has begun: it removes
the unfinished files of the old one, whose rename then fails. In a store it is the time of one PUT. What may be written
in it does no harm: shards and sealed folders are named by what they were made from, so that the new writer would write
the same, and the catalog and the pointers to published versions are swapped against what was read.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from prefsel.display import redact
from prefsel.errors import DamagedError, UserError
from prefsel.workspace import fence
from prefsel.workspace.patience import READS, as_input
from prefsel.workspace.places import checked_place, readable_names
from prefsel.workspace.stores import open_store

THREADS = 16
"""That read, write and delete the objects of a store."""
DELETED_TOGETHER = 1000
"""Files that are removed on one look at the lease."""


def digest(data: bytes | memoryview) -> str:
    """blake2b-128 of `data` as 32 hex digits: the content hash used everywhere in a workspace."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Storage:
    """A directory given as a path or a URI (`s3://`, `gs://`, `file://`). Cheap to pickle: only its fields travel."""

    uri: str
    epoch: int | None = None
    """Of the lease that this process writes under; None: nobody checks."""

    def __post_init__(self) -> None:
        # Workers have another working directory: a relative path must not travel.
        checked_place(self.uri, "workspace")
        if "://" not in self.uri:
            object.__setattr__(self, "uri", os.path.abspath(os.path.expanduser(self.uri)))

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "epoch": self.epoch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def require_epoch(self) -> None:
        """Check, before something is changed, that the lease this process writes under is in force.

        Raises:
            LostLeaseError: it is not.
        """
        if self.epoch is not None:
            fence.require_epoch(self.uri, self.epoch, self.read)

    @cached_property
    def _root(self) -> tuple[pafs.FileSystem, str]:
        if "://" not in self.uri:
            return pafs.LocalFileSystem(), self.uri
        try:
            filesystem, path = open_store(self.uri)
        except (ValueError, OSError) as error:
            raise UserError(f"workspace: cannot open {redact(self.uri)!r}: {redact(str(error))}") from error
        return filesystem, path.rstrip("/")

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The Arrow file system the workspace lies on."""
        return self._root[0]

    @property
    def is_local(self) -> bool:
        """Whether the workspace is a directory of this machine."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def require_folder(self) -> None:
        """Refuse a workspace that is a file, a folder that cannot be written, or a store that does not answer.

        Raises:
            UserError: says which.
            StoreError: the store fails in a way that passes.
        """
        try:
            with as_input("workspace"):
                kind = self.filesystem.get_file_info(self._root[1]).type
        except OSError as error:
            raise UserError(f"workspace: cannot reach {redact(self.uri)!r}: {redact(str(error))}") from error
        if kind == pafs.FileType.File:
            raise UserError(f"workspace: {redact(self.uri)!r} is a file; valid: a directory or a URI")
        if self.is_local:
            above = next(one for one in (self.local(""), *self.local("").parents) if one.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise UserError(f"workspace: cannot write {self.full('')!r}: no permission in {str(above)!r}")

    def full(self, path: str) -> str:
        """`path` as the file system names it."""
        return f"{self._root[1]}/{path}" if path else self._root[1]

    def local(self, path: str) -> Path:
        """`path` on this machine. Only for a local workspace."""
        assert self.is_local, f"{redact(self.uri)} is not a local workspace"
        return Path(self.full(path))

    def exists(self, path: str) -> bool:
        """Whether a file lies at `path`."""
        return self._info(path).type == pafs.FileType.File

    def is_taken(self, path: str) -> bool:
        """Whether anything lies at `path`: a file, or in a directory also a folder or a link that leads nowhere."""
        return os.path.lexists(self.local(path)) if self.is_local else self.exists(path)

    def size(self, path: str) -> int | None:
        """Bytes of the file at `path`; None when there is none."""
        info = self._info(path)
        return info.size if info.type == pafs.FileType.File else None

    def files(self, path: str, *, recursive: bool = False) -> list[str]:
        """Relative paths of the files under `path`, sorted; unfinished temporary files are not listed."""
        prefix = len(self._root[1]) + 1
        with readable_names(self.full(path)):
            found = [info.path[prefix:] for info in self._listing(path, recursive=recursive) if info.is_file]
        return sorted(name for name in found if not name.rsplit("/", 1)[-1].startswith(".tmp-"))

    def sweep(self) -> int:
        """Remove the unfinished files that writers left in a directory when they were killed; returns how many.

        Only for the holder of the lease, before it writes: younger ones than the lease object are another's, who will
        find that out. Parts of an upload that a store never completed are not objects; its lifecycle rules remove them.
        """
        if not self.is_local:
            return 0
        taken = self.local(fence.LEASE).stat().st_mtime_ns
        count = 0
        for folder, _, names in os.walk(self.local("")):
            for file in (Path(folder) / name for name in names if name.startswith(".tmp-")):
                with suppress(FileNotFoundError):
                    if file.stat().st_mtime_ns <= taken:
                        file.unlink()
                        count += 1
        return count

    def modified(self, path: str, *, recursive: bool = False) -> dict[str, float]:
        """When each file under `path` was written last, in seconds since 1970, by its relative path."""
        prefix = len(self._root[1]) + 1
        infos = [info for info in self._listing(path, recursive=recursive) if info.is_file]
        with readable_names(self.full(path)):
            return {info.path[prefix:]: (info.mtime_ns or 0) / 1e9 for info in infos}

    def sizes(self, path: str, *, recursive: bool = False) -> dict[str, int]:
        """Bytes of each file under `path`, by its relative path, in one listing."""
        prefix = len(self._root[1]) + 1
        return {info.path[prefix:]: info.size for info in self._listing(path, recursive=recursive) if info.is_file}

    def size_of(self, path: str, sizes: Mapping[str, int]) -> int | None:
        """Bytes of the file at `path` by a listing; what a store does not list it is asked for by name.

        A listing may be behind what was just written.
        """
        return sizes.get(path) if path in sizes or self.is_local else self.size(path)

    def holds(self, path: str, content: str) -> bool:
        """Whether the file at `path` has this content hash; a store that says no is asked once more, or a few times."""
        return any(digest(self.read(path)) == content for _ in range(1 if self.is_local else READS))

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly under `path`, sorted."""
        infos = self._listing(path)
        with readable_names(self.full(path)):
            return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def read(self, path: str) -> bytes:
        """All bytes of the file at `path`.

        Raises:
            FileNotFoundError: nothing lies there.
        """
        with self.opened(path) as file:  # as a stream it would come in requests of 256 KiB
            return file.read(file.size())

    @contextmanager
    def opened(self, path: str) -> Iterator[pa.NativeFile]:
        """The file at `path`, read anywhere in it; what the operating system says of a local file names it.

        Raises:
            FileNotFoundError: nothing lies there.
            DamagedError: what lies there is no file.
        """
        with self._naming(path), self.filesystem.open_input_file(self.full(path)) as file:
            yield file

    def _info(self, path: str) -> pafs.FileInfo:
        with self._naming(path):
            return self.filesystem.get_file_info(self.full(path))

    def _listing(self, path: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        with self._naming(f"{path}/"):
            selector = pafs.FileSelector(self.full(path), allow_not_found=True, recursive=recursive)
            found: list[pafs.FileInfo] = self.filesystem.get_file_info(selector)
            return found

    @contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """Give errors of the operating system the file they are about, of which Arrow makes a sentence."""
        try:
            yield
        except OSError as error:
            self._require_in_place(path)
            if self.is_local and error.errno is not None:
                error.filename, error.strerror = self.full(path.rstrip("/")), os.strerror(error.errno)
            raise

    def _require_in_place(self, path: str) -> None:
        """Say, after a failure, that a file lies where a folder should, or anything else where a file should.

        Raises:
            DamagedError: names it.
        """
        if not self.is_local:
            return
        *above, name = path.split("/")
        for count in range(1, len(above) + 1):
            if self.local(folder := "/".join(above[:count])).is_file():
                raise self.damaged(folder, "altered", "a file lies in the place of a folder")
        if name and self.is_taken(path) and not self.local(path).is_file():
            raise self.damaged(path, "altered", "what lies there is no file")

    def write(self, path: str, data: bytes) -> None:
        """Put `data` at `path`, wholly or not at all, replacing what was there.

        Raises:
            LostLeaseError: the workspace has another writer now.
            DamagedError: what lies there is no file.
        """
        if not self.is_local:
            self.require_epoch()
            # The bytes exist before the stream opens: an object store shows an object only when its upload is closed.
            with self.filesystem.open_output_stream(self.full(path), compression=None) as stream:
                stream.write(data)
            return
        target = self.local(path)
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                stream.write(data)
                if data:  # an empty file is a name alone, such as that of an attempt: nothing to wait for the disk for
                    stream.flush()
                    os.fsync(stream.fileno())
            self.require_epoch()
            os.replace(temporary, target)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):  # a full disk names no file, the rest the temporary one
                self._require_in_place(path)
                error.filename, error.filename2 = str(target), None
            raise

    def move(self, source: str, target: str) -> None:
        """Put the file at `source` at `target`: a rename on disk, a copy and a deletion in an object store."""
        self.require_epoch()
        if self.is_local:
            self.local(target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.local(source), self.local(target))
        else:
            self.filesystem.copy_file(self.full(source), self.full(target))
            self.filesystem.delete_file(self.full(source))

    def damaged(self, path: str, problem: str, detail: str = "") -> DamagedError:
        """The error of an object that is gone or is not what was committed."""
        return DamagedError(redact(self.uri), path, problem, detail)

    def delete(self, path: str) -> None:
        """Remove the file at `path`; nothing happens when there is none."""
        self.require_epoch()
        self._delete(path)

    def delete_many(self, paths: Sequence[str]) -> None:
        """Remove files, those that are there; the lease is looked at once for every thousand."""
        for start in range(0, len(paths), DELETED_TOGETHER):
            self.require_epoch()
            part = paths[start : start + DELETED_TOGETHER]
            if self.is_local:
                for path in part:
                    self.local(path).unlink(missing_ok=True)
                continue
            with ThreadPoolExecutor(max_workers=THREADS) as pool:
                deque(pool.map(self._delete, part), maxlen=0)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.full(path))

    def delete_tree(self, path: str) -> None:
        """Remove everything under `path`; nothing happens when there is none."""
        if self.filesystem.get_file_info(self.full(path)).type == pafs.FileType.Directory:
            self.require_epoch()
            self.filesystem.delete_dir(self.full(path))
