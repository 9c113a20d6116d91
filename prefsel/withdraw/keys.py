"""What people know rows by: pair_ids, prompt_ids, rows of a file, and fields that a source carries along."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from prefsel.errors import UserError, invalid

COLUMNS = ("pair_id", "prompt_id", "source_key")
ROW_KEY = re.compile(r"(?P<source>[^/:]+)/(?P<file>.+)#(?P<row>\d+)")
FIELD_KEY = re.compile(r"(?P<source>[^/:]+):(?P<field>[^=]+)=(?P<value>.*)", re.DOTALL)
VALID_KEY = "SOURCE/FILE#ROW, rows counted from 0, or SOURCE:FIELD=VALUE of a field that the source carries"


class RowKey(NamedTuple):
    """A row of an input file."""

    source: str
    file: str
    """Its address, or how that ends."""
    row: int

    def __str__(self) -> str:
        return f"{self.source}/{self.file}#{self.row}"


class FieldKey(NamedTuple):
    """The rows in which a carried field has a value."""

    source: str
    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.source}:{self.field}={self.value}"


@dataclass(frozen=True)
class Asked:
    """What is to be taken back."""

    pairs: frozenset[bytes] = frozenset()
    prompts: frozenset[bytes] = frozenset()
    either: frozenset[bytes] = frozenset()
    """Ids of which it is not said whether they are of pairs or of prompts."""
    rows: frozenset[RowKey] = frozenset()
    fields: frozenset[FieldKey] = frozenset()

    def __or__(self, other: Asked) -> Asked:
        return Asked(
            self.pairs | other.pairs,
            self.prompts | other.prompts,
            self.either | other.either,
            self.rows | other.rows,
            self.fields | other.fields,
        )

    def __bool__(self) -> bool:
        return any((self.pairs, self.prompts, self.either, self.rows, self.fields))

    @cached_property
    def by_file(self) -> dict[str, dict[str, dict[int, RowKey]]]:
        """The keys of rows by source, file and row."""
        found: dict[str, dict[str, dict[int, RowKey]]] = {}
        for key in self.rows:
            found.setdefault(key.source, {}).setdefault(key.file, {})[key.row] = key
        return found

    @cached_property
    def by_field(self) -> dict[str, dict[tuple[str, str], FieldKey]]:
        """The keys of carried fields by source, then by field and value."""
        found: dict[str, dict[tuple[str, str], FieldKey]] = {}
        for key in self.fields:
            found.setdefault(key.source, {})[key.field, key.value] = key
        return found

    def in_files(self, source: str, uris: Collection[str]) -> list[dict[int, RowKey]]:
        """The keys of rows of some files, each by the row."""
        files = self.by_file.get(source, {})
        return [rows for file, rows in files.items() if any(one == file or one.endswith(f"/{file}") for one in uris)]


@dataclass(frozen=True)
class Given:
    """Texts as the command line or a file has them, by what they are."""

    pair_id: Iterable[str] = ()
    prompt_id: Iterable[str] = ()
    source_key: Iterable[str] = ()
    either: Iterable[str] = field(default=())


def parse(given: Given, where: str = "") -> Asked:
    """Texts as keys.

    Args:
        given: The texts.
        where: What messages call the place they come from; empty: the option is named.

    Raises:
        UserError: names the first that is none.
    """
    asked = Asked(
        pairs=frozenset(_id(one, where or "--pair-id") for one in given.pair_id),
        prompts=frozenset(_id(one, where or "--prompt-id") for one in given.prompt_id),
    )
    either, keys = set[bytes](), [_source_key(one, where or "--source-key") for one in given.source_key]
    for one in given.either:
        if re.fullmatch("[0-9a-fA-F]{32}", one):
            either.add(bytes.fromhex(one))
        else:
            keys.append(_source_key(one, where))
    rows = frozenset(key for key in keys if isinstance(key, RowKey))
    fields = frozenset(key for key in keys if isinstance(key, FieldKey))
    return asked | Asked(either=frozenset(either), rows=rows, fields=fields)


def read_file(path: str) -> Asked:
    """Keys of a file: a CSV or Parquet file with columns of these names, or text with one key a line.

    Raises:
        UserError: the file cannot be read, has no such column, or holds what is no key.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix == ".parquet":
            names = [name for name in pq.read_schema(file).names if name in COLUMNS]
            columns = {name: map(_text, pq.read_table(file, columns=[name])[name].to_pylist()) for name in names}
        elif file.suffix in (".csv", ".tsv"):
            with open(file, newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))
            names = [name for name in (rows[0] if rows else ()) if name in COLUMNS]
            columns = {name: map(_text, [row[name] for row in rows]) for name in names}
        else:
            lines = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
            return parse(Given(either=[line for line in lines if line]), f"--file {path}")
    except (OSError, ValueError) as error:
        raise UserError(f"--file: cannot read {path}: {error}") from error
    if not names:
        raise UserError(f"--file: {path} has no column of {', '.join(COLUMNS)}")
    return parse(Given(**{name: [one for one in many if one] for name, many in columns.items()}), f"--file {path}")


def _text(value: object) -> str:
    """A cell; ids may be bytes."""
    return value.hex() if isinstance(value, bytes) else "" if value is None else str(value).strip()


def _id(text: str, where: str) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{32}", text):
        raise invalid(where, text, "32 hex digits, as `prefsel export` and the report show them")
    return bytes.fromhex(text)


def _source_key(text: str, where: str) -> RowKey | FieldKey:
    if found := ROW_KEY.fullmatch(text):
        return RowKey(found["source"], found["file"], int(found["row"]))
    if found := FIELD_KEY.fullmatch(text):
        return FieldKey(found["source"], found["field"], found["value"])
    raise invalid(where, text, VALID_KEY)
