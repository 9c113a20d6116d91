"""Compare-and-swap of one small object of a workspace: a write that only happens where nobody wrote in between.

Every other file of a workspace is written once, or with equal bytes. Those that are changed, the lease and the
pointers to published versions, are read with a version and replaced under the condition that it is still that one.

What is assumed. Object stores: conditional PUT (`If-Match`, `If-None-Match`; generations on Google's), which S3, Google
Cloud Storage, MinIO, Ceph and R2 honour. A directory: an exclusive `flock` on a file beside the object, which lasts for
a read, a comparison and a rename; on NFS that needs locks of the server (version 4, or `lockd`), not mounts with
`nolock` or `local_lock`. Versions are those of contents, so an object must never return to bytes that it had before:
what is swapped here carries a counter.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.fs as pafs

from prefsel.display import redact
from prefsel.errors import PrefselError, UserError
from prefsel.workspace.storage import Storage, digest

LOCKED_FOR_S = 30.0
"""How long the lock of a directory is waited for; it is held for less than a millisecond."""
RETRY_S = 20
"""How long a request to a store is repeated; less than a lease takes to expire."""

Version = Mapping[str, str]
"""Of an object's content; opaque, only to be given back to `swap`."""


class Conflict(PrefselError):
    """The object is not the one that was read: somebody else wrote it. Nothing was written."""


def read(storage: Storage, path: str) -> tuple[bytes, Version] | None:
    """The object at `path` with its version; None where there is none.

    Raises:
        OSError: the store does not answer.
        DamagedError: what lies in a directory is no file.
    """
    if storage.is_local:
        try:
            data = storage.read(path)
        except FileNotFoundError:
            return None
        return data, {"content": digest(data)}
    import obstore

    store, prefix = _store(storage)
    try:
        with _store_errors(path):
            found = obstore.get(store, prefix + path)
            return bytes(found.bytes()), _version(found.meta)
    except FileNotFoundError:
        return None


def swap(storage: Storage, path: str, data: bytes, version: Version | None) -> Version:
    """Put `data` at `path` if what lies there still has `version`.

    Args:
        storage: The workspace.
        path: The object, relative to it.
        data: Its new bytes, which it never had before.
        version: As `read` or `swap` gave it; None: nothing lies there.

    Returns:
        The new version.

    Raises:
        Conflict: something else lies there now; nothing was written.
        OSError: the write failed, or nobody knows whether it did: read again.
        PrefselError: another process holds the lock of a directory for `LOCKED_FOR_S`.
    """
    storage.require_epoch()
    if storage.is_local:
        return _swap_file(storage.local(path), data, version)
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    store, prefix = _store(storage)
    mode: Any = "create" if version is None else dict(version)
    try:
        with _store_errors(path):
            return _version(obstore.put(store, prefix + path, data, mode=mode))
    except (AlreadyExistsError, PreconditionError):
        # A request whose answer was lost is repeated, and then finds what it wrote itself.
        found = read(storage, path)
        if found is not None and found[0] == data:
            return found[1]
        raise Conflict(f"{path}: somebody else wrote it in between") from None


# -------------------------------------------------------------------------------------------------- a directory


def _swap_file(target: Path, data: bytes, version: Version | None) -> Version:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with _locked(target.with_name(f".lock-{target.name}")):
            there = {"content": digest(target.read_bytes())} if target.exists() else None
            if there != (None if version is None else dict(version)):
                raise Conflict(f"{target.name}: somebody else wrote it in between")
            try:
                os.replace(temporary, target)
            except FileNotFoundError:  # a new holder of the lease swept it, so the lease is another's
                raise Conflict(f"{target.name}: the workspace has another writer now") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"content": digest(data)}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which stays: a lock file that is removed can be locked twice."""
    until = time.monotonic() + LOCKED_FOR_S
    with open(file, "ab") as stream:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > until:
                raise PrefselError(f"{file}: another process holds this lock and does not go on; is it stopped?")
            time.sleep(0.01)
        yield


# ---------------------------------------------------------------------------------------------------- a store


def _version(meta: Mapping[str, Any]) -> Version:
    return {key: str(meta[key]) for key in ("e_tag", "version") if meta.get(key)}


@contextmanager
def _store_errors(path: str) -> Iterator[None]:
    """Raise what a store refuses as an `OSError` of one line, but a condition that did not hold as it is."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise
    except BaseError as error:
        raise OSError(f"{path}: {redact(str(error).splitlines()[0])}") from error


def _store(storage: Storage) -> tuple[Any, str]:
    """A client of the store, and what stands before every path in its bucket."""
    region = storage.filesystem.region if isinstance(storage.filesystem, pafs.S3FileSystem) else ""
    bucket, _, prefix = storage.full("").partition("/")
    return _client(storage.uri, bucket, region), f"{prefix}/" if prefix else ""


@lru_cache(maxsize=8)
def _client(uri: str, bucket: str, region: str) -> Any:
    """With the endpoint and the credentials that Arrow takes from the same URI and environment.

    Raises:
        UserError: a scheme without conditional writes.
    """
    from obstore.store import GCSStore, S3Store

    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint = query.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
    common: dict[str, Any] = {
        "client_options": {"allow_http": True, "timeout": f"{RETRY_S}s"},
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=RETRY_S)},
    }
    if parts.scheme == "s3":
        given = {"access_key_id": parts.username, "secret_access_key": parts.password}
        keys = {name: unquote(value) for name, value in given.items() if value} or _profile()
        place: Any = {"endpoint": endpoint, **keys} if endpoint else keys
        return S3Store(bucket, region=region, **place, **common)
    if parts.scheme in ("gs", "gcs"):
        if parts.username == "anonymous":
            common["skip_signature"] = True
        if endpoint:
            raise UserError("workspace: a lease on gs:// needs Google's own endpoint; got an endpoint_override")
        return GCSStore(bucket, **common)
    raise UserError(
        f"workspace: {redact(uri)!r} cannot keep two writers apart; valid: a directory, s3://, gs://, file://"
    )


def _profile() -> dict[str, str]:
    """Keys of the profile that Arrow would use; none where the environment gives some, or no file does."""
    if any(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")):
        return {}
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws/credentials"
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(file)
    name = os.environ.get("AWS_PROFILE") or "default"
    if not parser.has_section(name):
        return {}
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    return {ours: parser[name][theirs] for theirs, ours in names.items() if theirs in parser[name]}
