"""Arrow tables of a window, built column by column: one flat list per leaf and offsets, no Python object per struct."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple

import pyarrow as pa

from prefsel.ingest.identity import rest_of, sorted_keys
from prefsel.ingest.messages import Messages
from prefsel.ingest.rows import BadRow
from prefsel.schema import ID, PAIRS, PROVENANCE, QUARANTINE, REST, groups_schema, pairs_schema


@dataclass
class Group:
    """One prompt of a window with its distinct completions, in order of appearance; `row` is where it first stood, and
    `carried` what that row carries."""

    prompt_id: bytes
    prompt: Messages
    row: int
    carried: tuple[tuple[str, str], ...] = ()
    places: dict[bytes, int] = field(default_factory=dict)
    messages: list[Messages] = field(default_factory=list)
    ratings: list[dict[str, float]] = field(default_factory=list)


class Pair(NamedTuple):
    """One labelled pair of a window; the first six columns are those of `PAIRS`."""

    pair_id: bytes
    mirror_id: bytes
    prompt_id: bytes
    chosen: int
    rejected: int
    aspect: str | None
    label_margin: float | None
    row: int
    carried: tuple[tuple[str, str], ...] = ()


def groups_table(groups: list[Group]) -> pa.Table:
    """The table of `groups`, schema `GROUPS`, with what messages hold besides role and content where some do."""
    ids = list(chain.from_iterable(group.places for group in groups))
    prompts = [group.prompt for group in groups]
    completions = list(chain.from_iterable(group.messages for group in groups))
    ratings = list(chain.from_iterable(group.ratings for group in groups))
    has_rest = any(len(message) > 2 for message in chain.from_iterable(chain(prompts, completions)))
    schema = groups_schema(has_rest=has_rest)
    kind = schema.field("completions").type.value_type
    arrays = [pa.array(ids, ID), messages_array(completions, has_rest), _ratings(ratings)]
    columns = [
        pa.array([group.prompt_id for group in groups], ID),
        messages_array(prompts, has_rest),
        pa.ListArray.from_arrays(
            _offsets(group.places for group in groups), pa.StructArray.from_arrays(arrays, fields=list(kind))
        ),
        _provenance([group.row for group in groups]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def pairs_table(pairs: list[Pair], *, has_carried: bool = False) -> pa.Table:
    """The `PAIRS` table of `pairs`; with what they carry where their source carries any field."""
    *columns, rows, carried = zip(*pairs) if pairs else [()] * len(Pair._fields)
    schema = pairs_schema(has_carried=has_carried)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, PAIRS.types)]
    arrays += [_provenance(rows), *([pa.array(carried, schema.types[-1])] if has_carried else [])]
    return pa.Table.from_arrays(arrays, schema=schema)


def quarantine_table(bad: list[BadRow], file: str) -> pa.Table:
    """The `QUARANTINE` table of `bad`."""
    columns = [
        [row.reason for row in bad],
        # A library's message may quote corrupt names in ways that Arrow text cannot hold.
        [row.detail.encode("utf-8", "backslashreplace").decode("utf-8") for row in bad],
        [file] * len(bad),
        [row.row for row in bad],
        [row.byte_position for row in bad],
        [row.raw for row in bad],
    ]
    return pa.Table.from_arrays([pa.array(c, kind) for c, kind in zip(columns, QUARANTINE.types)], schema=QUARANTINE)


def _offsets(lists: Iterable[Sequence | dict]) -> pa.Array:
    return pa.array(accumulate((len(one) for one in lists), initial=0), pa.int32())


def messages_array(lists: list[Messages], has_rest: bool) -> pa.Array:
    """Lists of messages as a column; what they hold besides role and content as JSON, where the column has it."""
    flat = list(chain.from_iterable(lists))
    columns = {name: pa.array([message[name] for message in flat], pa.string()) for name in ("role", "content")}
    if has_rest:
        texts = [json.dumps(sorted_keys(rest_of(one)), ensure_ascii=False) if len(one) > 2 else None for one in flat]
        columns[REST] = pa.array(texts, pa.string())
    return pa.ListArray.from_arrays(_offsets(lists), pa.StructArray.from_arrays(list(columns.values()), list(columns)))


def _ratings(maps: list[dict[str, float]]) -> pa.Array:
    keys = pa.array(list(chain.from_iterable(maps)), pa.string())
    values = pa.array(list(chain.from_iterable(one.values() for one in maps)), pa.float64())
    return pa.MapArray.from_arrays(_offsets(maps), keys, values)


def _provenance(rows: Sequence[int]) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array(rows, pa.int64())], fields=list(PROVENANCE))
