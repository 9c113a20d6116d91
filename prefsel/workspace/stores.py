"""Arrow's file systems of object stores, with patience: what fails and passes is tried again, whoever asks.

The file system that `open_store` gives is an ordinary one of Arrow, so stages, Ray's workers and Ray Train use the
same one. It is pickled as its URI. Nothing here renames: a move is a copy and a deletion.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from prefsel.display import redact
from prefsel.workspace.patience import patiently

Result = TypeVar("Result")

STORES = ("s3", "gcs", "abfs")
"""As Arrow calls them; a disk needs no patience, and the hub's client has its own."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 10.0
"""A request of which nothing came for as long has failed."""
PART_ATTEMPTS = 5
"""Of each part of a large upload, by Arrow's own client; everything else is repeated here."""
LARGE_BYTES = 8 << 20
"""Uploads from here on are sent in parts; until they are closed they wait in memory, or on disk."""
GCS_RETRY = timedelta(seconds=30)
"""How long Google's client, which cannot be told to try once, repeats a request itself."""


@lru_cache(maxsize=16)
def open_store(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of `uri`, and the path in it.

    Raises:
        ValueError: The URI cannot be understood.
        StoreError: The store does not say where the bucket lies.
    """
    found, path = patiently(f"opening {redact(uri)}", lambda: pafs.FileSystem.from_uri(uri))
    if found.type_name not in STORES:
        return found, path
    return pafs.PyFileSystem(PatientFiles(uri, found)), path


def _built(found: pafs.FileSystem, attempts: int) -> pafs.FileSystem:
    """`found` with our timeouts, which cannot stand in a URI, and with as many attempts of its own."""
    if isinstance(found, pafs.S3FileSystem):
        _, (options,) = found.__reduce__()
        options |= {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": SILENCE_S}
        # A small object is then sent by one request instead of three.
        options |= {"allow_delayed_open": True}
        return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts))
    if isinstance(found, pafs.GcsFileSystem):
        rebuild, (options,) = found.__reduce__()
        return rebuild(options | {"retry_time_limit": options.get("retry_time_limit") or GCS_RETRY})
    return found


class PatientFiles(pafs.FileSystemHandler):
    """Every operation of a store's file system, each repeated while it fails in a way that passes."""

    def __init__(self, uri: str, found: pafs.FileSystem) -> None:
        """A store.

        Args:
            uri: Of anything in it.
            found: Its file system as Arrow makes it.
        """
        self.uri = uri
        self.scheme = uri.split("://")[0]
        self.files, self.for_parts = _built(found, 1), _built(found, PART_ATTEMPTS)

    def __reduce__(self) -> tuple[Any, ...]:
        """The URI alone travels: Arrow's own pickle forgets how often its client tries."""
        return _handler_of, (self.uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFiles) and self.files.equals(other.files)

    def __hash__(self) -> int:
        return hash(self.uri)

    def patiently(self, doing: str, path: str, attempt: Callable[[], Result]) -> Result:
        """Repeat `attempt`, which does something with the object at `path`."""
        return patiently(f"{doing} {self.scheme}://{path}", attempt)

    def get_type_name(self) -> str:
        """`s3` or `gcs`, as Arrow calls it."""
        return str(self.files.type_name)

    def normalize_path(self, path: str) -> str:
        """The path as the store has it."""
        return str(self.files.normalize_path(path))

    def get_file_info(self, paths: Iterable[str]) -> list[pafs.FileInfo]:
        """What lies at each path."""
        return [self.patiently("looking for", path, partial(self.files.get_file_info, path)) for path in paths]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """What lies under a folder."""
        return self.patiently("listing", selector.base_dir, lambda: self.files.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Make a folder: an empty object, which nothing here needs."""
        self.patiently("making", path, lambda: self.files.create_dir(path, recursive=recursive))

    def delete_file(self, path: str) -> None:
        """Remove an object. Found gone when it is asked for again: the answer to an attempt was lost."""
        asked = 0

        def attempt() -> None:
            nonlocal asked
            asked += 1
            try:
                self.files.delete_file(path)
            except FileNotFoundError:
                if asked == 1:
                    raise

        self.patiently("deleting", path, attempt)

    def delete_dir(self, path: str) -> None:
        """Remove a folder with what is under it."""
        self.delete_dir_contents(path, missing_dir_ok=True)
        with suppress(FileNotFoundError):
            self.patiently("deleting", path, lambda: self.files.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Remove what is under a folder."""
        attempt = lambda: self.files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)  # noqa: E731
        self.patiently("deleting", path, attempt)

    def delete_root_dir_contents(self) -> None:
        """Refused: nobody wants to empty a store."""
        raise NotImplementedError("a whole store is not emptied")

    def move(self, source: str, target: str) -> None:
        """A copy and a deletion."""
        self.copy_file(source, target)
        self.delete_file(source)

    def copy_file(self, source: str, target: str) -> None:
        """Copy an object inside the store."""
        self.patiently("copying", source, lambda: self.files.copy_file(source, target))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """An object, front to back."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """An object, anywhere in it."""
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """An object that will be there, whole, when the stream is closed."""
        return pa.PythonFile(_Writer(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Refused: objects are written whole."""
        raise NotImplementedError("objects are written whole")


def _handler_of(uri: str) -> PatientFiles:
    handler = open_store(uri)[0].handler
    assert isinstance(handler, PatientFiles)
    return handler


class _Reader(io.RawIOBase):
    """An object that is read: each request of a read is repeated on its own."""

    def __init__(self, store: PatientFiles, path: str) -> None:
        self._store, self._path, self._at = store, path, 0
        self._file = store.patiently("reading", path, lambda: store.files.open_input_file(path))
        self._size: int = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = b"" if count == 0 else self._store.patiently("reading", self._path, lambda: self._read(count))
        self._at += len(data)
        return data

    def _read(self, count: int) -> bytes:
        data = bytes(self._file.read_at(count, self._at))
        if len(data) != count:
            raise ConnectionError(f"{count:,} bytes were asked for, {len(data):,} came")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Writer(io.RawIOBase):
    """An object that is written: what it is to hold is kept until it is closed, so that sending can be repeated."""

    def __init__(self, store: PatientFiles, path: str) -> None:
        self._store, self._path = store, path
        self._kept = tempfile.SpooledTemporaryFile(max_size=LARGE_BYTES)  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._kept.tell()

    def write(self, data: Any) -> int:
        return self._kept.write(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._store.patiently("writing", self._path, self._send)
        finally:
            self._kept.close()
            super().close()

    def _send(self) -> None:
        size = self._kept.seek(0, io.SEEK_END)
        self._kept.seek(0)
        files = self._store.for_parts if size >= LARGE_BYTES else self._store.files
        with files.open_output_stream(self._path, compression=None) as stream:
            shutil.copyfileobj(self._kept, stream, LARGE_BYTES)
