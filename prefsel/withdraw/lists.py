"""What counts the rows of a corpus: records of files, the catalog, summaries of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefsel.withdraw.corpora import file_records, table_there, uris_of
from prefsel.withdraw.tables import recounted, withdrawn_rows, without_groups, without_pairs
from prefsel.workspace.catalog import PATH, quarantine_name, read_catalog, write_catalog
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import SUMMARY, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage
from prefsel.workspace.withdrawals import Gone


def lost_rows(storage: Storage, source: str, shards: Collection[str], gone: Gone) -> dict[str, dict[int, str]]:
    """Rows of files of which nothing is left: quarantine shard → row → what the file is called.

    Args:
        storage: The workspace, of which no groups and pairs are rewritten yet.
        source: Of files.
        shards: `<source>/<shard>` of the groups that hold something that is taken back.
        gone: What is taken back.
    """
    pairs, groups = Artifact(storage, f"pairs/{source}"), Artifact(storage, f"groups/{source}")
    pairs_entries, groups_entries = pairs.entries(), groups.entries()
    found: dict[str, dict[int, str]] = {}
    for shard, uris in uris_of(file_records(storage, source)).items():
        if f"{source}/{shard}" not in shards or shard not in pairs_entries or shard not in groups_entries:
            continue
        before = table_there(pairs, pairs_entries[shard]), table_there(groups, groups_entries[shard])
        if before[0] is None or before[1] is None:
            continue
        after = without_pairs(*before, gone), without_groups(before[1], gone)
        rows = withdrawn_rows(before[0], before[1], *after)
        for uri in uris if rows else ():
            found[quarantine_name(shard, uri)] = dict.fromkeys(rows, uri)
    return found


@dataclass(frozen=True)
class _Now:
    """Counts of a source as its ledgers have them."""

    storage: Storage
    source: str
    groups: Mapping[str, Entry]
    pairs: Mapping[str, Entry]
    quarantine: Mapping[str, Entry]

    @classmethod
    def of(cls, storage: Storage, source: str) -> _Now:
        """Read the ledgers."""
        kinds = ("groups", "pairs", "quarantine")
        return cls(storage, source, *(Artifact(storage, f"{kind}/{source}").entries() for kind in kinds))

    def reasons(self, name: str) -> dict[str, int]:
        """Rows of a quarantine shard by reason."""
        if name not in self.quarantine:
            return {}
        table = Artifact(self.storage, f"quarantine/{self.source}").read(name, ["reason"])
        return dict(sorted(Counter(table["reason"].to_pylist()).items()))

    def counted(self, counts: Mapping[str, int], names: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
        """Counts and reasons of some shards (groups → quarantine) now, given those of before."""
        reasons = merge_counts(self.reasons(name) for name in names.values())
        groups, pairs = (sum(known[one].rows for one in names if one in known) for known in (self.groups, self.pairs))
        return recounted(counts, groups, pairs, reasons), reasons


def update_records(storage: Storage, touched: frozenset[str]) -> None:
    """Count again what became of the rows of files, in their records and in the catalog.

    Args:
        storage: The workspace.
        touched: `<source>/<shard>` of groups and of quarantine that changed.
    """
    sources = sorted({key.rsplit("/", 1)[0] for key in touched if "@" not in key})
    now = {source: _Now.of(storage, source) for source in sources}
    for source in sources:
        for path, record in file_records(storage, source).items():
            rows: Any = record["shards"]
            new = [_recounted_row(row, str(record["uri"]), now[source], touched) for row in rows]
            if new != rows:
                write_document(storage, path, {**record, "shards": new})
    if not storage.exists(PATH):
        return
    catalog = read_catalog(storage)
    for place, one in enumerate(catalog.sources):
        if one.name not in now:
            continue
        files = []
        for file in one.files:
            names = {shard: file.quarantine_of(shard) for shard in file.shards}
            if not _keys(one.name, names) & touched:
                files.append(file)
                continue
            counts, reasons = now[one.name].counted(file.counts, names)
            files.append(replace(file, counts=counts, reasons=reasons, examples={}))
        catalog.sources[place] = replace(one, files=files)
    write_catalog(storage, catalog)


def _keys(source: str, names: Mapping[str, str]) -> set[str]:
    return {f"{source}/{name}" for pair in names.items() for name in pair}


def _recounted_row(row: dict[str, Any], uri: str, now: _Now, touched: frozenset[str]) -> dict[str, Any]:
    names = {row["shard"]: quarantine_name(row["shard"], uri)}
    if not _keys(now.source, names) & touched:
        return row
    counts, reasons = now.counted(row["counts"], names)
    return row | {"counts": counts, "reasons": reasons, "examples": {}}


def update_summaries_of_prompts(storage: Storage) -> None:
    """Say which prompts are left, and what their shards hold, in the summaries of all sets of prompts."""
    for name in storage.folders("prompts"):
        path = f"prompts/{name}"
        report, entries = load_summary(storage, path), Artifact(storage, path).entries()
        if report is None or not all(shard in entries for shard, _ in report.details["shards"]):
            continue
        shards = [(shard, entries[shard].content) for shard, _ in report.details["shards"]]
        if [list(one) for one in shards] == [list(one) for one in report.details["shards"]]:
            continue
        rows = sum(entries[shard].rows for shard, _ in shards)
        details = report.details | {"shards": shards, "content": hash_hex(*(content for _, content in shards))}
        found = find_document(storage, f"{path}/{SUMMARY}") or {}
        as_it_was = replace(report, computed_shards=found["computed_shards"], seconds=found["seconds"])
        rows_in = rows + sum(report.dropped.values())
        save_summary(storage, replace(as_it_was, rows_in=rows_in, rows_out=rows, details=details))
