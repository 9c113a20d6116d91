"""Where input lies: paths, folders, globs and URIs → files that a reader understands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs

from prefsel.display import redact
from prefsel.errors import UserError
from prefsel.ingest.globs import WILDCARD, glob_matcher
from prefsel.ingest.remote import reachable
from prefsel.workspace.places import checked_place, files_below
from prefsel.workspace.stores import open_store

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSED = ("", ".gz", ".zst", ".xz", ".bz2")
COLUMNAR_ENDINGS = (".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather")
ENDINGS = (*(f"{text}{packed}" for text in TEXT_ENDINGS for packed in COMPRESSED), *COLUMNAR_ENDINGS)
"""Of the files that are taken from a folder; a file that is named is read whatever its ending."""
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "holdout")
"""What parts of a data set are called in file and folder names."""

_DATASETS_PREFIX = "datasets:"
# Written by `save_to_disk` beside its Arrow files.
_NOT_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "config.json"}
# Results that `datasets` keeps beside the data of a folder.
_CACHE = re.compile(r"(cache-|tmp)\w+\.arrow")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}\b")


def is_dataset_name(uri: str) -> bool:
    """Whether `uri` is a `datasets:` name rather than a file."""
    return uri.startswith(_DATASETS_PREFIX)


def plain_name(uri: str) -> str:
    """The name at `uri` in lower case, without query and ending of a compression."""
    name = _without_query(uri)[0].lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if ending and name.endswith(ending)), name)


def _without_query(uri: str) -> tuple[str, str]:
    """`uri` in two parts, the second its query with the question mark (`s3://…?endpoint_override=…`), or empty."""
    match = re.search(r"\?[A-Za-z_]+=", uri) if "://" in uri else None
    return (uri[: match.start()], uri[match.start() :]) if match else (uri, "")


def resolve(uri: str, filesystem: pafs.FileSystem | None = None) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that `uri` means; with a `filesystem` the path is `uri` itself.

    Raises:
        UserError: a URI scheme that pyarrow does not know, or no path at all.
    """
    checked_place(uri, "source")
    if filesystem is not None:
        return filesystem, uri
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.expanduser(uri)
    try:
        with reachable(uri):
            found, path = open_store(uri)
    except ValueError as error:
        raise UserError(f"source: cannot open {redact(uri)!r}: {redact(str(error))}") from error
    return found, path


@contextmanager
def _found(uri: str, filesystem: pafs.FileSystem | None) -> Iterator[tuple[pafs.FileSystem, str]]:
    found, path = resolve(uri, filesystem)
    with reachable(uri):
        if found.get_file_info(path).type != pafs.FileType.File:
            raise _nothing_at(uri, "no file")
        yield found, path


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


def bytes_of(uri: str) -> int:
    """Stored bytes of a file; 0 of a data set by name, whose size nobody knows before it is read.

    Raises:
        UserError: nothing readable lies at `uri`.
    """
    if is_dataset_name(uri):
        return 0
    with open_random(uri) as file:
        return int(file.size())


def list_files(uri: str, *, filesystem: pafs.FileSystem | None = None) -> list[str]:
    """The files that a path, folder, glob or URI means, sorted, each in the form it was asked in.

    A folder gives every file under it with an ending of `ENDINGS`, leaving out names that start with `.` or `_`, the
    metadata of `save_to_disk` and cache files of `datasets`. A glob knows `*`, `?`, `[abc]` within a name and `**`
    across folders. A `datasets:` name stands for itself.

    Raises:
        UserError: nothing matches, or a folder holds several splits.
    """
    if is_dataset_name(checked_place(uri, "source")):
        return [uri]
    path, query = _without_query(uri)
    found, exact = resolve(uri, filesystem)
    with reachable(uri):
        kind = found.get_file_info(exact).type
    if kind == pafs.FileType.File:
        return [uri]
    if kind == pafs.FileType.Directory:
        prefix = path.rstrip("/") + "/"
        below = [name for name in _walk(path, query, filesystem, is_deep=True) if _is_data(name)]
        _require_one_split(redact(prefix), below)
        names = [prefix + name for name in below]
    elif WILDCARD.search(path):
        names = _glob(path, query, filesystem)
    elif kind == pafs.FileType.Unknown:
        raise UserError(f"source: {redact(uri)!r} is a pipe or a device; valid: files, folders, globs and URIs")
    else:
        raise _nothing_at(uri, "nothing")
    if not names:
        raise UserError(f"source: no input file matches {redact(uri)!r}; readable endings: {', '.join(ENDINGS)}")
    return [name + query for name in sorted(names)]


def _nothing_at(uri: str, what: str) -> UserError:
    """The error of a source that is not there.

    Raises:
        UserError: The hub says why not, which its file system keeps to itself: gated, private, no such repository.
    """
    if uri.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        with reachable(uri):
            HfFileSystem().info(uri)
    return UserError(f"source: {what} at {redact(uri)!r}")


def _is_data(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    is_other = last in _NOT_DATA or last.startswith("_") or _CACHE.fullmatch(last) is not None
    return not is_other and last.lower().endswith(ENDINGS)


def split_of_name(name: str) -> str | None:
    """The split that a path below a folder names, in a folder or as the beginning of the file: `train`, `test`, …

    A name of the hub's own, such as `train_prefs-00000-of-00002.parquet`, names it in full.
    """
    parts = name.lower().split("/")
    if numbered := _NUMBERED.match(parts[-1]):
        if numbered[1] not in ("data", "part", "shard"):
            return numbered[1]
        parts = parts[:-1]
    for part in reversed(parts):
        if (first := re.split(r"[-_.]", part)[0]) in SPLITS:
            return first
    return None


def _require_one_split(folder: str, names: Sequence[str]) -> None:
    """Refuse a folder that holds several splits of a data set: test rows must not be trained on unasked.

    Raises:
        UserError: names what to choose from.
    """
    by_split: dict[str, list[str]] = {}
    for name in sorted(names):
        by_split.setdefault(split_of_name(name) or "", []).append(name)
    splits = [split for split in by_split if split]
    if len(splits) > 1:
        choices = ", ".join(f"{folder}{_pattern(split, by_split[split])}" for split in splits)
        raise UserError(f"source: {folder} holds {len(splits)} splits ({', '.join(splits)}); name one: {choices}")


def _pattern(split: str, names: Sequence[str]) -> str:
    """A path or glob that means the files of one split."""
    parts = names[0].split("/")
    place = next(number for number, part in reversed(list(enumerate(parts))) if split_of_name(part) == split)
    if place + 1 < len(parts):
        return "/".join(parts[: place + 1])
    return names[0] if len(names) == 1 else "/".join([*parts[:place], f"{split}*"])


def _glob(path: str, query: str, filesystem: pafs.FileSystem | None) -> list[str]:
    base, pattern = _base(path)
    matches = glob_matcher(pattern)
    prefix = path[: len(path) - len(pattern)]
    names = _walk(base, query, filesystem, is_deep="/" in pattern or "**" in pattern)
    return [prefix + name for name in names if matches(name)]


def _base(path: str) -> tuple[str, str]:
    """The folder above the first wildcard, and the pattern below it."""
    wildcard = WILDCARD.search(path)
    assert wildcard is not None
    cut = path.rfind("/", 0, wildcard.start()) + 1
    return path[:cut].rstrip("/") or ("/" if cut else "."), path[cut:]


def _walk(folder: str, query: str, filesystem: pafs.FileSystem | None, *, is_deep: bool) -> Iterator[str]:
    """The path below `folder` of every file in it; hidden files and folders are left out."""
    found, base = resolve(folder + query, filesystem)
    if isinstance(found, pafs.LocalFileSystem):
        with reachable(folder):
            yield from files_below(base, is_deep=is_deep)
        return
    selector = pafs.FileSelector(base.rstrip("/") or "/", recursive=is_deep, allow_not_found=True)
    with reachable(folder):
        infos = found.get_file_info(selector)
    for info in infos:
        name = info.path[len(base.rstrip("/")) :].lstrip("/")
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name
