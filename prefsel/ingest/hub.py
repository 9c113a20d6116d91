"""`datasets:` names: a data set of the Hugging Face hub, streamed, or a local folder written by `save_to_disk`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefsel.errors import UserError, invalid

PREFIX = "datasets:"
_FORM = "datasets:NAME[:CONFIG]/SPLIT, or datasets:FOLDER[/SPLIT] for a folder written by save_to_disk"
_BATCH_ROWS = 1024


class HubName(NamedTuple):
    """A data set of the hub."""

    name: str
    config: str | None
    split: str


def parse(uri: str) -> Path | HubName:
    """What a `datasets:` name means: a local folder if one is there, else a data set of the hub.

    >>> parse("datasets:org/name:config/train")
    HubName(name='org/name', config='config', split='train')

    Raises:
        UserError: not of the form above, or a local folder with several splits and none named.
    """
    rest = uri.removeprefix(PREFIX)
    folder = Path(rest).expanduser()
    if (folder / "state.json").is_file():
        return folder
    splits_file = folder / "dataset_dict.json"
    if splits_file.is_file():
        raise invalid("source", uri, [f"{uri}/{split}" for split in json.loads(splits_file.read_text())["splits"]])
    repository, _, split = rest.rpartition("/")
    name, _, config = repository.partition(":")
    if not name or not split or ":" in split:
        raise invalid("source", uri, _FORM)
    return HubName(name, config or None, split)


def read_tables(uri: str) -> Iterator[Any]:
    """Arrow tables of about a thousand rows, in order; of the hub only what is asked for is downloaded.

    Raises:
        UserError: no such configuration or split.
        OSError: no such data set, or the hub could not be reached; so do the HTTP client's own errors.
    """
    source = parse(uri)
    import datasets  # three seconds of import that no other input needs

    try:
        if isinstance(source, Path):
            rows = datasets.load_from_disk(str(source))
        else:
            revision = _revision(source)
            rows = datasets.load_dataset(
                source.name, source.config, split=source.split, revision=revision, streaming=True
            )
    except ValueError as error:  # an unknown configuration or split
        raise UserError(f"source: cannot load {uri!r} ({_FORM}): {error}") from error
    return rows.with_format("arrow").iter(batch_size=_BATCH_ROWS)


def identity_blocks(uri: str) -> Iterator[bytes]:
    """Bytes that change exactly when the data set does: its local Arrow files, or its name and revision on the hub."""
    source = parse(uri)
    if isinstance(source, HubName):
        yield json.dumps([*source, _revision(source)]).encode("utf-8")
        return
    for path in sorted(source.glob("*.arrow")):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                yield block


@functools.lru_cache(maxsize=64)
def _revision(source: HubName) -> str | None:
    """The commit that a hub name means now, asked once per process."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(source.name).sha
