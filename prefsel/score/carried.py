"""Numbers of completions that were scored in another shard before, put where the completions stand now.

When a file grows, shrinks or is replaced, its last windows are other shards with mostly the same completions. A number
belongs to a completion (its prompt and its text, which its id is a hash of), so it is looked up by that id, and only
the completions without one go through a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.schema import SAME_AS
from prefsel.score.contract import ScoredShard


@dataclass(frozen=True)
class Numbers:
    """Every number of a column set for some completions."""

    ids_N: np.ndarray
    """completion_ids, 16 bytes each."""
    same_N: np.ndarray
    """The completion of the same prompt with the same tokens that comes first, itself where there is none."""
    values_NK: np.ndarray
    """float64, a column per name of the set."""

    @classmethod
    def of(cls, columns: pa.Table, names: Sequence[str]) -> Numbers:
        """The completions of a column shard that have every number; what was dropped is asked again."""
        lists = columns["completion_ids"].combine_chunks()
        ids_N = ids_of(pc.list_flatten(lists))
        values_NK = np.stack([_flat(columns[name]) for name in names], axis=1)
        same_N = ids_N.copy()
        if SAME_AS in columns.column_names:
            start = 0
            for size, places in zip(pc.list_value_length(lists).to_pylist(), columns[SAME_AS].to_pylist()):
                for at, place in enumerate(places or ()):
                    if place is not None:
                        same_N[start + at] = ids_N[start + place]
                start += size
        row_M = np.flatnonzero(np.isfinite(values_NK).all(axis=1))
        return cls(ids_N, same_N, values_NK).take(row_M)

    def take(self, row_M: np.ndarray) -> Numbers:
        """Some of them."""
        return Numbers(self.ids_N[row_M], self.same_N[row_M], self.values_NK[row_M])

    @classmethod
    def merged(cls, many: Sequence[Numbers]) -> Numbers:
        """Those of several shards, sorted by id, each completion once: the first one's."""
        ids_N = np.concatenate([one.ids_N for one in many])
        _, first_M = np.unique(ids_N, return_index=True)
        found = cls(ids_N, *(np.concatenate([getattr(one, part) for one in many]) for part in ("same_N", "values_NK")))
        return found.take(first_M)

    def places(self, ids_N: np.ndarray) -> np.ndarray:
        """Where each id stands, -1 where it does not; the numbers are sorted by id."""
        if not len(self.ids_N):
            return np.full(len(ids_N), -1)
        place_N = np.minimum(np.searchsorted(self.ids_N, ids_N), len(self.ids_N) - 1)
        return np.where(self.ids_N[place_N] == ids_N, place_N, -1)

    def to_table(self, names: Sequence[str]) -> pa.Table:
        """As a shard keeps it; `from_table` gives it back."""
        ids = {"completion_id": _as_arrow(self.ids_N), "same": _as_arrow(self.same_N)}
        return pa.table(ids | {name: pa.array(self.values_NK[:, k]) for k, name in enumerate(names)})

    @classmethod
    def from_table(cls, table: pa.Table, names: Sequence[str]) -> Numbers:
        """The numbers that `to_table` gave."""
        ids_N, same_N = (ids_of(table[name].combine_chunks()) for name in ("completion_id", "same"))
        return cls(ids_N, same_N, np.stack([table[name].to_numpy() for name in names], axis=1))


def ids_of(ids: pa.Array) -> np.ndarray:
    """Identifiers as 16 bytes each."""
    return np.frombuffer(ids.buffers()[1] or b"", "S16")[ids.offset : ids.offset + len(ids)]


def completion_ids(groups: pa.Table) -> np.ndarray:
    """The completion_ids of a shard of groups, in order."""
    return ids_of(pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "completion_id"))


def without(groups: pa.Table, is_known_N: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The groups with the completions that are left to score; groups with none are left out.

    Returns:
        The groups, and the numbers of their rows in the table.
    """
    lists = groups["completions"].combine_chunks()
    sizes_G = pc.list_value_length(lists).to_numpy()
    row_N = np.repeat(np.arange(len(sizes_G)), sizes_G)[~is_known_N]
    left_G = np.bincount(row_N, minlength=len(sizes_G))
    row_M = np.flatnonzero(left_G)
    offsets = pa.array(np.concatenate([[0], np.cumsum(left_G[row_M])]), pa.int32())
    kept = pc.list_flatten(lists).filter(pa.array(~is_known_N))
    taken = groups.take(pa.array(row_M))
    place = taken.column_names.index("completions")
    completions = pa.ListArray.from_arrays(offsets, kept).cast(groups.schema.field("completions").type)
    return taken.set_column(place, groups.schema.field("completions"), completions), row_M


def joined(
    groups: pa.Table,
    known: Numbers,
    names: Sequence[str],
    *,
    left: tuple[Any, np.ndarray, np.ndarray] | None = None,
) -> ScoredShard:
    """The columns of a shard, from numbers that were known and those of the rest.

    Args:
        groups: All groups of the shard.
        known: Numbers, sorted by id.
        names: Of the columns.
        left: What the scorer made of the rest, which completions are not of it, and the rows of the groups that
            `without` gave for those; None: nothing was left.
    """
    scored, is_known_N, row_M = left or (None, np.ones(len(completion_ids(groups)), bool), np.empty(0, np.int64))
    ids_N = completion_ids(groups)
    sizes_G = pc.list_value_length(groups["completions"].combine_chunks()).to_numpy()
    start_G = np.cumsum(sizes_G) - sizes_G
    place_N = known.places(ids_N)
    flat: dict[str, list[Any]] = {}
    for k, name in enumerate(names):
        values = np.empty(len(ids_N), object)
        values[is_known_N] = known.values_NK[place_N[is_known_N], k].tolist()
        if scored is not None:
            values[~is_known_N] = [value for row in scored.columns[name] for value in row]
        flat[name] = values.tolist()
    same_N = ids_N.copy()
    same_N[is_known_N] = known.same_N[place_N[is_known_N]]
    left_M = np.flatnonzero(~is_known_N)
    start_M = np.searchsorted(left_M, start_G)
    for number, places in getattr(scored, "same_as", {}).items():
        first = start_M[row_M[number]]
        for at, place in enumerate(places):
            if place is not None:
                same_N[left_M[first + at]] = ids_N[left_M[first + place]]
    spans = list(zip(start_G.tolist(), (start_G + sizes_G).tolist()))
    columns = {name: [values[start:end] for start, end in spans] for name, values in flat.items()}
    found = ScoredShard(columns)
    if scored is not None:
        kept = ("dropped", "counters", "poisoned", "padded_because", "template_error", "facts")
        template = getattr(scored, "template", None)
        found = replace(found, template=template, **{part: getattr(scored, part) for part in kept})
    same_as: dict[int, Sequence[int | None]] = {}
    same_as |= {row: places for row, (start, end) in enumerate(spans) if (places := _first_alike(same_N[start:end]))}
    return replace(found, same_as=same_as)


def _first_alike(same_N: np.ndarray) -> list[int | None] | None:
    """As of `ScoredShard.same_as`, of one group; None where all its completions differ."""
    first: dict[bytes, int] = {}
    places = [first.setdefault(one, place) for place, one in enumerate(same_N.tolist())]
    if len(first) == len(places):
        return None
    return [None if first_place == place else first_place for place, first_place in enumerate(places)]


def _as_arrow(ids_N: np.ndarray) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(ids_N).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(ids_N), [None, data])


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(column.combine_chunks()).to_numpy(zero_copy_only=False).astype(np.float64)
