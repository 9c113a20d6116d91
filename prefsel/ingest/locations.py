"""Where input lies: paths, folders, globs and URIs → files that a reader understands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs

from prefsel.errors import UserError, invalid
from prefsel.workspace.storage import redact

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
"""How a file name ends → how the file is read. `.json` is read line by line too."""

_DATASETS_PREFIX = "datasets:"
# Written by `save_to_disk` beside its Arrow files.
_NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json"}
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])")


def is_dataset_name(uri: str) -> bool:
    """Whether `uri` is a `datasets:` name rather than a file."""
    return uri.startswith(_DATASETS_PREFIX)


def kind_of(uri: str) -> str:
    """How the file at `uri` is read: one of the values of `KINDS`, or `datasets`.

    Raises:
        UserError: an ending that no reader knows.
    """
    if is_dataset_name(uri):
        return "datasets"
    name = _without_query(uri)[0].lower()
    endings = [ending for ending in KINDS if name.endswith(ending)]
    if not endings:
        raise invalid("source", redact(uri), ["a file ending in " + ", ".join(KINDS), "datasets:NAME[:CONFIG]/SPLIT"])
    return KINDS[max(endings, key=len)]


def _without_query(uri: str) -> tuple[str, str]:
    """`uri` in two parts, the second its query with the question mark (`s3://…?endpoint_override=…`), or empty."""
    match = re.search(r"\?[A-Za-z_]+=", uri) if "://" in uri else None
    return (uri[: match.start()], uri[match.start() :]) if match else (uri, "")


def resolve(uri: str, filesystem: pafs.FileSystem | None = None) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that `uri` means; with a `filesystem` the path is `uri` itself.

    Raises:
        UserError: a URI scheme that pyarrow does not know.
    """
    if filesystem is not None:
        return filesystem, uri
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.expanduser(uri)
    try:
        found, path = pafs.FileSystem.from_uri(uri)
    except ValueError as error:
        raise UserError(f"source: cannot open {redact(uri)!r}: {redact(str(error))}") from error
    return found, path


@contextmanager
def _found(uri: str, filesystem: pafs.FileSystem | None) -> Iterator[tuple[pafs.FileSystem, str]]:
    found, path = resolve(uri, filesystem)
    try:
        if found.get_file_info(path).type != pafs.FileType.File:
            raise UserError(f"source: no file at {redact(uri)!r}")
        yield found, path
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(f"source: cannot read {redact(uri)!r}: {redact(str(error))}") from error


def open_stream(uri: str, filesystem: pafs.FileSystem | None = None) -> Any:
    """The stored bytes of a file, front to back.

    Raises:
        UserError: nothing readable lies at `uri`.
    """
    with _found(uri, filesystem) as (found, path):
        # Never "detect": the gzip reader below must see the compressed bytes, and a digest means the stored ones.
        return found.open_input_stream(path, compression=None)


def open_random(uri: str, filesystem: pafs.FileSystem | None = None) -> Any:
    """The stored bytes of a file, with seeking.

    Raises:
        UserError: nothing readable lies at `uri`.
    """
    with _found(uri, filesystem) as (found, path):
        return found.open_input_file(path)


def list_files(uri: str, *, filesystem: pafs.FileSystem | None = None) -> list[str]:
    """The files that a path, folder, glob or URI means, sorted, each in the form it was asked in.

    A folder gives every file under it with an ending of `KINDS`, leaving out names that start with `.` or `_` and the
    metadata of `save_to_disk`. A glob knows `*`, `?`, `[abc]` within a name and `**` across folders; all it matches
    must be readable. A `datasets:` name stands for itself.

    Raises:
        UserError: nothing matches, or a named file has an ending that no reader knows.
    """
    if is_dataset_name(uri):
        return [uri]
    path, query = _without_query(uri)
    found, exact = resolve(uri, filesystem)
    try:
        kind = found.get_file_info(exact).type
    except OSError as error:
        raise UserError(f"source: cannot reach {redact(uri)!r}: {redact(str(error))}") from error
    if kind == pafs.FileType.File:
        kind_of(uri)
        return [uri]
    if kind == pafs.FileType.Directory:
        prefix = path.rstrip("/") + "/"
        names = [prefix + name for name in _walk(path, query, filesystem, is_deep=True) if _is_data(name)]
    elif _WILDCARD.search(path):
        names = _glob(path, query, filesystem)
    else:
        raise UserError(f"source: nothing at {redact(uri)!r}")
    if not names:
        raise UserError(f"source: no input file matches {redact(uri)!r}; readable endings: {', '.join(KINDS)}")
    for name in names:
        kind_of(name)
    return [name + query for name in sorted(names)]


def _is_data(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return last not in _NOT_DATA and not last.startswith("_") and any(last.lower().endswith(end) for end in KINDS)


def _glob(path: str, query: str, filesystem: pafs.FileSystem | None) -> list[str]:
    base, pattern = _base(path)
    expression = re.compile("".join(_regex(token) for token in _WILDCARD.split(pattern)))
    prefix = path[: len(path) - len(pattern)]
    names = _walk(base, query, filesystem, is_deep="/" in pattern or "**" in pattern)
    return [prefix + name for name in names if expression.fullmatch(name)]


def _base(path: str) -> tuple[str, str]:
    """The folder above the first wildcard, and the pattern below it."""
    wildcard = _WILDCARD.search(path)
    assert wildcard is not None
    cut = path.rfind("/", 0, wildcard.start()) + 1
    return path[:cut].rstrip("/") or ("/" if cut else "."), path[cut:]


def _regex(token: str) -> str:
    if token.startswith("[") and token.endswith("]"):
        inside = token[1:-1].replace("\\", r"\\")
        return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    return {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))


def _walk(folder: str, query: str, filesystem: pafs.FileSystem | None, *, is_deep: bool) -> Iterator[str]:
    """The path below `folder` of every file in it; hidden files and folders are left out."""
    found, base = resolve(folder + query, filesystem)
    selector = pafs.FileSelector(base.rstrip("/") or "/", recursive=is_deep, allow_not_found=True)
    for info in found.get_file_info(selector):
        name = info.path[len(base.rstrip("/")) :].lstrip("/")
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name
