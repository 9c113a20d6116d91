"""Paths and URIs as people and files give them: refused here where no file system could mean anything by them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefsel.display import redact
from prefsel.errors import UserError

MAX_CHARACTERS = 4096
"""What a path may have on Linux, its end included."""
MAX_FILES = 1_000_000
"""Names below a folder."""
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_BARE = re.compile(r"(?!file:)[A-Za-z][\w+.-]*://[/?]?")
_UNKNOWN_HOME = re.compile(r"~[^/]+(/|$)")


def checked_place(place: str | os.PathLike[str], what: str) -> str:
    """A path or URI as it came, once it is known to be one.

    Args:
        place: A local path, a URI, or the name of a model or a data set.
        what: What errors call it: `source`, `workspace`, `model`.

    Raises:
        UserError: It is empty, too long, not text that UTF-8 can write, holds control characters, begins with the home
            of nobody, or is a URI without a bucket. Python and Arrow raise a different error for each.
    """
    place = os.fspath(place)
    shown = redact(place if len(place) <= 120 else f"{place[:80]}…{place[-30:]}")
    if not place.strip():
        raise UserError(f"{what}: got {place!r}; valid: a path or a URI")
    if len(place) >= MAX_CHARACTERS:
        raise UserError(f"{what}: got {shown!r} of {len(place):,} characters; valid: fewer than {MAX_CHARACTERS:,}")
    if _CONTROL.search(place):
        raise UserError(f"{what}: got {shown!r}, which holds control characters; valid: a path or a URI without any")
    try:
        place.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: got {shown!r}, which is not UTF-8; rename it") from error
    if what == "workspace" and place.startswith(("hf://", "datasets:")):
        raise UserError(f"{what}: got {shown!r}, where nothing can be written; valid: a directory, s3:// or gs://")
    if _BARE.fullmatch(place):
        raise UserError(
            f"{what}: got {shown!r}, which names no bucket; valid: such as {place.split('://')[0]}://bucket/x"
        )
    if _UNKNOWN_HOME.match(place) and os.path.expanduser(place) == place and not os.path.lexists(place):
        raise UserError(f"{what}: got {shown!r}, and nobody of that name has a home here")
    return place


def files_below(folder: str, *, is_deep: bool) -> Iterator[str]:
    """Paths below a folder of this machine of the files in it, links followed; hidden files and folders are left out.

    A link to a folder that it lies in is not followed: what it leads to is listed already. Arrow follows it forty
    times, which for two such links beside each other has no end.

    Raises:
        UserError: A name is not UTF-8, or there are too many.
    """
    count, waiting = 0, [("", folder or "/", frozenset[tuple[int, int]]())]
    while waiting:
        prefix, path, above = waiting.pop()
        try:
            found = os.stat(path)
            entries = list(os.scandir(path)) if (found.st_dev, found.st_ino) not in above else []
        except FileNotFoundError:
            continue
        count += len(entries)
        if count > MAX_FILES:
            raise UserError(f"{redact(folder)!r} holds more than {MAX_FILES:,} names, links followed; name files in it")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                entry.name.encode()
            except UnicodeEncodeError as error:
                name = os.fsencode(prefix + entry.name)
                raise UserError(f"{redact(folder)!r} holds a name that is not UTF-8: {name!r}; rename it") from error
            if _is(entry.is_file):
                yield prefix + entry.name
            elif is_deep and _is(entry.is_dir):
                waiting.append((f"{prefix}{entry.name}/", entry.path, above | {(found.st_dev, found.st_ino)}))


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads round in a circle
        return False


@contextmanager
def readable_names(folder: str) -> Iterator[None]:
    """Turn what Arrow raises about a name below `folder` that is not UTF-8 into one message that shows the name.

    Raises:
        UserError: There is such a name.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        name = bytes(error.object)
        raise UserError(f"{redact(folder)!r} holds a name that is not UTF-8: {name[-80:]!r}; rename it") from error
