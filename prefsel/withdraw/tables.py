"""Tables without what was taken back. Ingest and the removal use the same functions, so both give the same bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.schema import ID, QUARANTINE, RESPONSES, SAME_AS
from prefsel.workspace.storage import digest
from prefsel.workspace.withdrawals import WITHDRAWN, Gone

ID_COLUMNS = ("pair_id", "prompt_id", "parent_id")
COMPLETION_IDS = "completions.list.element.completion_id"
HEX_ID = re.compile("[0-9a-f]{32}")


def is_among(ids: pa.ChunkedArray | pa.Array, gone: Collection[bytes]) -> np.ndarray:
    """Which ids, 16 bytes or 32 hex digits, were taken back: bool (N,)."""
    is_text = pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)
    known = pa.array([one.hex() for one in gone], ids.type) if is_text else pa.array(list(gone), ID).cast(ids.type)
    found = pc.is_in(ids, value_set=known)
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def without_rows(table: pa.Table, gone: Gone) -> pa.Table:
    """A table of a row per pair or prompt without the rows that were taken back; itself where it has none of them."""
    is_gone_N = np.zeros(table.num_rows, bool)
    for name in ID_COLUMNS:
        if name in table.column_names:
            is_gone_N |= is_among(table[name], gone.pairs if name == "pair_id" else gone.prompts)
    return table.filter(pa.array(~is_gone_N)).combine_chunks() if is_gone_N.any() else table


class Completions:
    """Which completions of a shard of groups, or of columns, stay; and which of its groups do."""

    def __init__(self, prompt_ids: pa.ChunkedArray, completion_ids: pa.ListArray, gone: Gone) -> None:
        """Look the ids up.

        Args:
            prompt_ids: Of N groups.
            completion_ids: Lists of the ids of their completions, M in all.
            gone: What was taken back.
        """
        self.size_N = pc.list_value_length(completion_ids).to_numpy(zero_copy_only=False).astype(np.int64)
        self.group_M = np.repeat(np.arange(len(self.size_N)), self.size_N)
        is_prompt_gone_N = is_among(prompt_ids, gone.prompts)
        self.stays_M = ~is_among(pc.list_flatten(completion_ids), gone.completions) & ~is_prompt_gone_N[self.group_M]
        self.left_N = np.bincount(self.group_M[self.stays_M], minlength=len(self.size_N))
        is_emptied_N = (self.size_N > 0) & (self.left_N == 0)
        self.stays_N = ~is_prompt_gone_N & ~is_emptied_N
        self.begin_N = np.cumsum(self.size_N) - self.size_N
        before_M = np.cumsum(self.stays_M) - self.stays_M
        first_N = np.append(before_M, self.stays_M.sum())[self.begin_N]
        self.place_M = np.where(self.stays_M, before_M - first_N[self.group_M], -1)
        """Where each one stands in its group afterwards; -1 where it is gone."""

    @property
    def all_stay(self) -> bool:
        """Whether nothing of the shard was taken back."""
        return bool(self.stays_M.all() and self.stays_N.all())

    def lists(self, column: pa.ChunkedArray) -> pa.ListArray:
        """A column of lists, one value per completion, of the groups that stay."""
        values = pc.list_flatten(column.combine_chunks()).filter(pa.array(self.stays_M))
        ends = np.cumsum(self.left_N[self.stays_N])
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, type=column.type)

    def of(self, table: pa.Table, lists: Sequence[str]) -> pa.Table:
        """A table of a row per group, of what stays; `lists` are its columns with one value per completion."""
        kept = table.filter(pa.array(self.stays_N))
        for name in lists:
            place = table.schema.get_field_index(name)
            kept = kept.set_column(place, table.schema.field(name), self.lists(table[name]))
        return kept.combine_chunks()


def completions_of(groups: pa.Table, gone: Gone) -> Completions:
    """What stays of a shard of groups, of which the ids alone are looked at."""
    lists = groups["completions"].combine_chunks()
    ids = pc.struct_field(pc.list_flatten(lists), "completion_id")
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))])
    return Completions(groups["prompt_id"], pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), ids), gone)


def without_groups(groups: pa.Table, gone: Gone) -> pa.Table:
    """A shard of groups without completions that were taken back, and without groups of which none is left."""
    found = completions_of(groups, gone)
    if found.all_stay:
        return groups
    return found.of(groups, [name for name in ("completions", RESPONSES) if name in groups.column_names])


def without_pairs(pairs: pa.Table, groups: pa.Table, gone: Gone) -> pa.Table:
    """A shard of pairs without those of completions that were taken back; the others point at them where they are now.

    Args:
        pairs: The shard.
        groups: The shard of groups that they point into, as it was before.
        gone: What was taken back.
    """
    found = completions_of(groups, gone)
    is_gone_N = is_among(pairs["pair_id"], gone.pairs) | is_among(pairs["prompt_id"], gone.prompts)
    if found.all_stay and not is_gone_N.any():
        return pairs
    group_N = pc.index_in(pairs["prompt_id"], value_set=groups["prompt_id"].combine_chunks()).to_numpy()
    places = {}
    for name in ("chosen", "rejected"):
        places[name] = found.place_M[found.begin_N[group_N] + pairs[name].to_numpy()] if len(group_N) else group_N
        is_gone_N = is_gone_N | (places[name] < 0)
    for name, place_N in places.items():
        at = pairs.schema.get_field_index(name)
        pairs = pairs.set_column(at, pairs.schema.field(name), pa.array(place_N, pa.int32()))
    return pairs.filter(pa.array(~is_gone_N)).combine_chunks()


def without_columns(columns: pa.Table, gone: Gone) -> pa.Table:
    """A shard of completion columns without the numbers of completions that were taken back."""
    found = Completions(columns["prompt_id"], columns["completion_ids"].combine_chunks(), gone)
    if found.all_stay:
        return columns
    lists = [name for name in columns.column_names if name not in ("prompt_id", SAME_AS)]
    kept = found.of(columns.drop_columns([SAME_AS]) if SAME_AS in columns.column_names else columns, lists)
    if SAME_AS not in columns.column_names:
        return kept
    same = [
        _same_as(row, found, number) for number, row in enumerate(columns[SAME_AS].to_pylist()) if found.stays_N[number]
    ]
    if all(row is None for row in same):
        return kept
    return kept.append_column(columns.schema.field(SAME_AS), pa.array(same, columns.schema.field(SAME_AS).type))


def _same_as(row: Sequence[int | None] | None, found: Completions, number: int) -> list[int | None] | None:
    """Which completion of a group each one equals, of those that stay: the first one of equal ones may be gone."""
    if row is None:
        return None
    begin = found.begin_N[number]
    first: dict[int, int] = {}
    kept: list[int | None] = []
    for at, same in enumerate(row):
        place = int(found.place_M[begin + at])
        if place >= 0:
            told = first.setdefault(at if same is None else same, place)
            kept.append(None if told == place else told)
    return kept if any(one is not None for one in kept) else None


def without_quarantined(quarantine: pa.Table, gone: Gone, withdrawn: Mapping[int, str] | None = None) -> pa.Table:
    """A shard of quarantined rows of a file, without the text of rows that were taken back.

    Args:
        quarantine: The shard.
        gone: Of which the hashes of rows count.
        withdrawn: Rows of the file that were used and are not any more, with what the file is called.
    """
    hashes = [bytes.fromhex(digest(raw)) for raw in quarantine["raw"].to_pylist()] if gone.rows else []
    is_gone = [one in gone.rows for one in hashes] or [False] * quarantine.num_rows
    known = set(quarantine["row"].filter(pc.equal(quarantine["reason"], WITHDRAWN)).to_pylist())
    new = {row: file for row, file in (withdrawn or {}).items() if row not in known}
    if not any(is_gone) and not new:
        return quarantine
    rows = [
        {**row, "reason": WITHDRAWN, "detail": "", "raw": b""} if taken else row
        for row, taken in zip(quarantine.to_pylist(), is_gone)
    ]
    empty = {"reason": WITHDRAWN, "detail": "", "byte_position": None, "raw": b""}
    rows += [{**empty, "file": file, "row": row} for row, file in new.items()]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["row"]), schema=QUARANTINE)


def withdrawn_rows(pairs: pa.Table, groups: pa.Table, kept_pairs: pa.Table, kept_groups: pa.Table) -> list[int]:
    """Rows of a file of which nothing is left: those of pairs and prompts that are gone, and of no pair that stays.

    Args:
        pairs: Of a shard, before.
        groups: Before.
        kept_pairs: What stays.
        kept_groups: What stays.
    """
    is_lost_N = ~is_among(pairs["pair_id"], kept_pairs["pair_id"].to_pylist())
    is_lost_G = ~is_among(groups["prompt_id"], kept_groups["prompt_id"].to_pylist())
    lost = {*_rows(pairs.filter(pa.array(is_lost_N))), *_rows(groups.filter(pa.array(is_lost_G)))}
    return sorted(lost - set(_rows(kept_pairs)))


def _rows(table: pa.Table) -> list[int]:
    return [row["row"] for row in table["provenance"].to_pylist()]


def taken_out(
    groups: pa.Table, pairs: pa.Table, quarantine: pa.Table, gone: Gone, file: str
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """The three tables of a window of a file without what was taken back; its rows are quarantined without text.

    Args:
        groups: As ingest made them.
        pairs: As ingest made them.
        quarantine: As ingest made it.
        gone: What was taken back.
        file: What provenance calls the file.
    """
    if not gone:
        return groups, pairs, quarantine
    kept_groups, kept_pairs = without_groups(groups, gone), without_pairs(pairs, groups, gone)
    lost = dict.fromkeys(withdrawn_rows(pairs, groups, kept_pairs, kept_groups), file)
    return kept_groups, kept_pairs, without_quarantined(quarantine, gone, lost)


def recounted(counts: Mapping[str, int], groups: int, pairs: int, reasons: Mapping[str, int]) -> dict[str, int]:
    """What became of the rows of a window or a file, after some were taken back.

    Args:
        counts: As ingest counted them.
        groups: Rows of its groups now.
        pairs: Rows of its pairs now.
        reasons: Its quarantined rows now, by reason.
    """
    quarantined = sum(reasons.values())
    accepted = counts["rows"] - counts.get("duplicate", 0) - quarantined
    return {**counts, "accepted": accepted, "quarantined": quarantined, "groups": groups, "pairs": pairs}


def lessened(dropped: Mapping[str, int], number: int) -> dict[str, int]:
    """Counts by reason, some of which were taken back without it being known which: the most frequent reason's go."""
    left = Counter(dropped)
    for reason, count in left.most_common():
        taken = min(count, number)
        left[reason] -= taken
        number -= taken
    return dict(left)


def scrubbed(value: Any, gone: Gone) -> Any:
    """JSON without examples, which may quote a row, and without ids that were taken back."""
    if isinstance(value, dict):
        if set(value) >= {"name", "ending", "notes"}:  # what a template did, each kind with its first example
            return value | {"notes": {kind: [count, ""] for kind, (count, _) in value["notes"].items()}}
        empty: dict[str, Any] = {"examples": {}, "template_error": ""}
        is_empty = {key for key, one in value.items() if key in empty and isinstance(one, type(empty[key]))}
        return {key: empty[key] if key in is_empty else scrubbed(one, gone) for key, one in value.items()}
    if isinstance(value, list):
        return [scrubbed(one, gone) for one in value if not (isinstance(one, str) and one in gone.hex_ids)]
    if isinstance(value, str):
        return HEX_ID.sub(lambda found: WITHDRAWN if found[0] in gone.hex_ids else found[0], value)
    return value
