"""A recorded withdrawal, carried out: from what shows rows, over what was computed of them, to the rows themselves.

    pages, exports ─▶ whole-corpus artifacts ─▶ sealed folders ─▶ shards beside groups ─▶ groups ─▶ prompts ─▶ catalog

A shard that loses something keeps its name and the numbers of everything else. What says which input a shard was made
of is written anew with it, so nothing that stays is computed again. Every step looks at what is there: one that was
killed is carried out again from the beginning and ends the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import pyarrow as pa

from prefsel.schema import RESPONSES
from prefsel.withdraw.corpora import Corpus, beside, corpora, table_there
from prefsel.withdraw.folders import (
    remove_artifact,
    remove_artifacts,
    remove_pages,
    remove_uncommitted,
    rewrite_folders,
)
from prefsel.withdraw.lists import lost_rows, update_records, update_summaries_of_prompts
from prefsel.withdraw.tables import (
    lessened,
    scrubbed,
    without_columns,
    without_groups,
    without_pairs,
    without_quarantined,
    without_rows,
)
from prefsel.workspace.entries import Entry, refold
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.parquet_bytes import to_bytes
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.withdrawals import WITHDRAWN, Gone, Withdrawal, read_withdrawals, write_withdrawal

MOST_PARTS = 4
"""Of what one shard is made of several of: answers of so many models beside each other."""


@dataclass
class Removal:
    """One withdrawal, being carried out."""

    storage: Storage
    id: str
    """Of its record."""
    gone: Gone
    shards: frozenset[str]
    quarantine: frozenset[str]
    new_content: dict[str, str] = field(default_factory=dict)
    """Content hash of a shard of groups or prompts → what it is afterwards."""
    contents: dict[str, list[str]] = field(default_factory=dict)
    """Name of a shard → content hashes of the groups of that name, of all models."""
    counts: Counter[str] = field(default_factory=Counter)
    changed: set[str] = field(default_factory=set)
    """Paths of the artifacts of which a shard changed."""

    def input_of(self, shard: str, made_from: str) -> str:
        """What a shard's input is afterwards: another one where that, or a part of it, changed."""
        if made_from in self.new_content:
            return self.new_content[made_from]
        there = self.contents.get(shard, [])
        for number in range(2, min(MOST_PARTS, len(there)) + 1):
            for some in permutations(there, number):
                if digest("\n".join(some).encode()) == made_from:
                    return digest("\n".join(self.new_content.get(one, one) for one in some).encode())
        return made_from

    def kept_bytes(self, artifact: Artifact, entry: Entry, table: pa.Table, kept: pa.Table) -> bytes:
        """What is left of a shard as bytes: those that lie there where nothing was taken from them."""
        return artifact.storage.read(artifact.file(entry.shard)) if kept is table else to_bytes(kept)

    def put(
        self, artifact: Artifact, entry: Entry, table: pa.Table, kept: pa.Table, info: dict[str, Any], kind: str
    ) -> None:
        """Put `kept` in the place of what lies there as a shard, `table`, unless it is that already."""
        made_from, data = self.input_of(entry.shard, entry.input), self.kept_bytes(artifact, entry, table, kept)
        if kept is table and made_from == entry.input and digest(data) == entry.content:
            return
        artifact.replace(entry, kept, data, made_from=made_from, info=info)
        self.counts[kind] += max(0, table.num_rows - kept.num_rows)  # a place in the quarantine may be new
        self.changed.add(artifact.path)


def withdraw(storage: Storage, record: Withdrawal) -> Withdrawal:
    """Write a record and carry it out.

    Args:
        storage: The workspace.
        record: What is taken back, and where it lies.

    Returns:
        The record as it is kept, with what was removed of each kind.
    """
    write_withdrawal(storage, record)
    return carry_out(storage, record)


def finish_withdrawals(storage: Storage) -> list[Withdrawal]:
    """Carry out what was begun and killed; returns what was."""
    return [carry_out(storage, one) for one in read_withdrawals(storage) if one.state != "done"]


def remove_models(storage: Storage, record: Withdrawal) -> Withdrawal:
    """Remove the models and tangents that saw what was taken back; returns the record as it is kept then."""
    for path in record.models:
        remove_artifact(storage, path)
    done = replace(record, models=[], removes_models=True)
    write_withdrawal(storage, done)
    return done


def carry_out(storage: Storage, record: Withdrawal) -> Withdrawal:
    """Remove what a record names, wherever it lies."""
    removal = Removal(storage, record.id, record.gone, frozenset(record.shards), frozenset(record.quarantine))
    for name in record.files:
        storage.delete(name)
    removal.counts["files"] = len(record.files)
    removal.counts["reports"] = remove_pages(storage, removal.gone)
    removal.counts["artifacts"] = remove_artifacts(storage, removal.gone, removal.shards)
    if record.removes_models:
        record = remove_models(storage, record)
    removal.counts["folders"] = rewrite_folders(storage, removal.gone)
    found = corpora(storage)
    _foresee(removal, found)
    _quarantine(removal, {corpus.source for corpus in found if corpus.is_made})
    for corpus in found:
        _beside_groups(removal, corpus)
    for corpus in found:
        _groups(removal, corpus)
    _prompts(removal)
    update_records(storage, removal.shards | removal.quarantine)
    for path in sorted(removal.changed):
        refold(storage, path)
    removal.counts["uncommitted"] = remove_uncommitted(storage)
    counts = {name: count for name, count in sorted(removal.counts.items()) if count}
    done = replace(record, state="done", counts=counts)
    write_withdrawal(storage, done)
    return done


def _foresee(removal: Removal, found: list[Corpus]) -> None:
    """Know the content of every shard of prompts and groups afterwards, before any is written."""
    storage, gone = removal.storage, removal.gone
    for name in storage.folders("prompts"):
        artifact = Artifact(storage, f"prompts/{name}")
        for entry in artifact.entries().values():
            if (table := table_there(artifact, entry)) is not None:
                data = removal.kept_bytes(artifact, entry, table, without_rows(table, gone))
                removal.new_content[entry.content] = digest(data)
    for corpus in found:
        for shard, entry in corpus.groups.entries().items():
            removal.contents.setdefault(shard, []).append(entry.content)
            if (
                f"{corpus.source}/{shard}" in removal.shards
                and (table := table_there(corpus.groups, entry)) is not None
            ):
                data = removal.kept_bytes(corpus.groups, entry, table, without_groups(table, gone))
                removal.new_content[entry.content] = digest(data)


def _beside_groups(removal: Removal, corpus: Corpus) -> None:
    """What was computed of the groups of a corpus, and its pairs."""
    storage, gone = removal.storage, removal.gone
    for kind in ("columns", "pair_columns", "verdicts", "rewritten"):
        for artifact in beside(storage, kind, corpus.source):
            for entry in artifact.entries().values():
                is_touched = f"{corpus.source}/{entry.shard}" in removal.shards
                # Of verdicts the other model's answers may be what changed.
                if not is_touched and removal.input_of(entry.shard, entry.input) == entry.input:
                    continue
                if (table := table_there(artifact, entry)) is None:
                    continue
                kept = without_columns(table, gone) if kind == "columns" else without_rows(table, gone)
                removal.put(artifact, entry, table, kept, _scored_info(entry, table, kept, gone), kind)
    for artifact in corpus.pairs:
        for shard, entry in artifact.entries().items():
            if f"{corpus.source}/{shard}" not in removal.shards:
                continue
            table, groups = table_there(artifact, entry), table_there(corpus.groups, corpus.groups.entries()[shard])
            if table is None or groups is None:
                continue
            # One that lost its rows before the kill points at groups as they are going to be.
            is_new = entry.info.get(WITHDRAWN) == removal.id and _is_committed(artifact, entry)
            kept = table if is_new else without_pairs(table, groups, gone)
            info = scrubbed(entry.info, gone) | {WITHDRAWN: removal.id}
            if "prompts" in info:  # of answers: prompts with a pair, and the others by reason
                prompts = without_groups(groups, gone).num_rows
                paired = len(set(kept["prompt_id"].to_pylist()))
                lost = sum(info["dropped"].values()) - (prompts - paired)
                info |= {"prompts": prompts, "dropped": lessened(info["dropped"], max(0, lost))}
            removal.put(artifact, entry, table, kept, info, "pairs")


def _is_committed(artifact: Artifact, entry: Entry) -> bool:
    """Whether the data of a shard are what its ledger says."""
    return digest(artifact.storage.read(artifact.file(entry.shard))) == entry.content


def _scored_info(entry: Entry, table: pa.Table, kept: pa.Table, gone: Gone) -> dict[str, Any]:
    """What a ledger says of the numbers that are left."""
    info: dict[str, Any] = scrubbed(entry.info, gone)
    if "completions" not in info:
        return info
    before, after = (_numbers(one) for one in (table, kept))
    lost = (before[0] - before[1]) - (after[0] - after[1])
    return info | {"completions": after[0], "dropped": lessened(info["dropped"], lost)}


def _numbers(table: pa.Table) -> tuple[int, int]:
    """Rows of a shard of columns, and how many of them have a number."""
    if "completion_ids" not in table.column_names:
        return table.num_rows, table.num_rows - table.columns[-1].null_count
    names = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
    ids = table["completion_ids"].combine_chunks().flatten()
    values = [table[name].combine_chunks().flatten() for name in names if name not in ("completion_ids", "same_as")]
    return len(ids), min((len(ids) - one.null_count for one in values), default=0)


def _groups(removal: Removal, corpus: Corpus) -> None:
    """The groups of a corpus themselves."""
    for shard, entry in corpus.groups.entries().items():
        is_touched = f"{corpus.source}/{shard}" in removal.shards
        if not is_touched and removal.input_of(shard, entry.input) == entry.input:
            continue
        if (table := table_there(corpus.groups, entry)) is None:
            continue
        kept = without_groups(table, removal.gone)
        info: dict[str, Any] = scrubbed(entry.info, removal.gone)
        if RESPONSES in table.column_names and "asked" in info:
            info |= _answered_info(removal, corpus, shard, info, kept)
        removal.put(corpus.groups, entry, table, kept, info, "groups")


def _answered_info(
    removal: Removal, corpus: Corpus, shard: str, info: dict[str, Any], kept: pa.Table
) -> dict[str, Any]:
    """How many responses were asked for, of prompts that are left; those of no use by what their quarantine holds."""
    used = sum(map(len, kept[RESPONSES].to_pylist()))
    quarantine = Artifact(removal.storage, f"quarantine/{corpus.source}")
    if shard not in quarantine.entries():  # several models' answers beside each other
        return {"asked": used + sum(info["dropped"].values())}
    counted = Counter(quarantine.read(shard, ["reason"])["reason"].to_pylist())
    samples = info["asked"] / max(1.0, info.get("counters", {}).get("prompts", 1.0))
    dropped = {
        reason: min(count, round(counted[reason] * (samples if reason in ("too_long", "template_error") else 1)))
        for reason, count in info["dropped"].items()
    }
    return {"asked": used + sum(dropped.values()), "dropped": dropped}


def _prompts(removal: Removal) -> None:
    """Prompts that models answer; the answers were seen to before, as their input is named by these."""
    for name in removal.storage.folders("prompts"):
        artifact = Artifact(removal.storage, f"prompts/{name}")
        for entry in artifact.entries().values():
            if (table := table_there(artifact, entry)) is not None:
                removal.put(artifact, entry, table, without_rows(table, removal.gone), entry.info, "prompts")
    update_summaries_of_prompts(removal.storage)


def _quarantine(removal: Removal, made: set[str]) -> None:
    """Rows of no use: those of files stay as places without text, answers of models go."""
    for source in removal.storage.folders("quarantine"):
        artifact = Artifact(removal.storage, f"quarantine/{source}")
        lost = {} if source in made else lost_rows(removal.storage, source, removal.shards, removal.gone)
        for shard, entry in artifact.entries().items():
            if f"{source}/{shard}" not in removal.quarantine and shard not in lost:
                continue
            if (table := table_there(artifact, entry)) is None:
                continue
            if source in made:
                hashes = [bytes.fromhex(digest(raw)) for raw in table["raw"].to_pylist()]
                stays = pa.array([one not in removal.gone.rows for one in hashes], pa.bool_())
                kept = table.filter(stays).combine_chunks()
            else:
                kept = without_quarantined(table, removal.gone, lost.get(shard))
            removal.put(artifact, entry, table, kept, scrubbed(entry.info, removal.gone), "quarantine")
