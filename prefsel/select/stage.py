"""Scores → selections and datasets, exactly, in passes over shards.

    ledger histograms ──▶ decide (rounds of counting on shards) ──▶ cut ──▶ parts: keep rows, commit selection + dataset

The driver holds histograms and cuts; rows stay in the tasks. A *part* is a run of consecutive shards that becomes one
dataset file, so that the file count follows the kept rows and not the shards of the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from prefsel.errors import IntegrityError, UserError
from prefsel.lineage import Lineage
from prefsel.progress import Progress
from prefsel.select.card import dataset_card
from prefsel.select.duplicates import Drops, PartitionRows, resolve
from prefsel.select.eligible import Rules, count_reasons, eligible_table, partition_shard, prompt_ids
from prefsel.select.parts import Keeper, plan_parts, write_part
from prefsel.select.radix import Histogram
from prefsel.select.rules import Quota, decide, keep, merge_histograms, parse_rule, reply
from prefsel.select.scored import Scored, corpus_histograms
from prefsel.tasks import over_shards, unwrap
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import read_seal, write_seal
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import digest

MAX_PARTITIONS = 64
"""Of the duplicate search: 64 x 64 references at the driver, whatever the corpus."""


def resolve_eligible(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Decide for every pair whether it may be selected, duplicates across files included.

    A hash-partitioned pass: chunks of shards send each partition its ids, partitions find duplicates and send each
    chunk its drops. The driver holds references only.
    """
    started = time.monotonic()
    storage, catalog, folder = lineage.storage, lineage.catalog, lineage.eligible_folder
    if done := load_summary(storage, folder):
        return [done]
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    rules = Rules(lineage.config.split, excluded, held_out)
    num_parts = min(MAX_PARTITIONS, len(catalog.shards))
    chunks = [[catalog.shards[i] for i in part] for part in np.array_split(np.arange(len(catalog.shards)), num_parts)]
    pairs = catalog.entries(storage, "pairs")
    shared = ray.put((storage, rules, num_parts, lineage.config.duplicates.contradictions, folder, chunks))
    # With one part Ray would wrap the single return value; a list of references keeps both cases alike.
    send = ray.remote(num_returns=num_parts)(_partition_chunk)
    resolve = ray.remote(num_returns=num_parts)(_resolve_partition)
    commit = ray.remote(_commit_chunk)
    sent = [_as_list(send.remote(chunk, shared)) for chunk in chunks]
    drops = [_as_list(resolve.remote(shared, *[row[p] for row in sent])) for p in range(num_parts)]
    inputs = [[pairs[shard.key].content for shard in chunk] for chunk in chunks]
    committed = [
        commit.remote(chunk, made, shared, *[d[c] for d in drops])
        for c, (chunk, made) in enumerate(zip(chunks, inputs))
    ]
    with progress.track("eligible", len(committed), "parts") as counter:
        counts = []
        for reference in committed:
            counts.append(unwrap(reference))
            counter.advance()
    dropped = merge_counts(counts)
    rows_out = dropped.pop("eligible", 0)
    report = StageReport(
        stage="eligible",
        name="all",
        unit="pairs",
        rows_in=sum(entry.rows for entry in pairs.values()),
        rows_out=rows_out,
        dropped=dropped,
        shards=len(catalog.shards),
        computed_shards=len(catalog.shards),
        seconds=time.monotonic() - started,
        artifact=folder,
        fingerprint=folder.rsplit("@", 1)[1],
    )
    save_summary(storage, report)
    return [report]


def _as_list(references: Any) -> list[Any]:
    return references if isinstance(references, list) else [references]


def _one_or_many(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _partition_chunk(chunk: list[ShardRef], shared: Any) -> Any:
    storage, rules, num_parts = shared[:3]
    columns = ["pair_id", "mirror_id", "prompt_id"]
    by_shard = [
        partition_shard(Artifact(storage, f"pairs/{s.source}").read(s.shard, columns), s, rules, num_parts)
        for s in chunk
    ]
    return _one_or_many([PartitionRows.merge(shard[p] for shard in by_shard) for p in range(num_parts)])


def _resolve_partition(shared: Any, *sent: PartitionRows) -> Any:
    contradictions, chunks = shared[3], shared[5]
    drops = resolve(PartitionRows.merge(sent), contradictions=contradictions)
    ends = [chunk[-1].number for chunk in chunks]
    chunk_M = np.searchsorted(ends, drops.shard_M)
    parts = [chunk_M == number for number in range(len(chunks))]
    return _one_or_many([Drops(drops.shard_M[p], drops.row_M[p], drops.reason_M[p]) for p in parts])


def _commit_chunk(chunk: list[ShardRef], inputs: list[str], shared: Any, *drops: Drops) -> dict[str, int]:
    storage, rules, folder = shared[0], shared[1], shared[4]
    counts = []
    for shard, made_from in zip(chunk, inputs):
        artifact = Artifact(storage, f"{folder}/{shard.source}")
        attempt = artifact.log_attempt(shard.shard)
        pairs = Artifact(storage, f"pairs/{shard.source}").read(shard.shard, ["pair_id", "prompt_id"])
        table = eligible_table(pairs, shard, rules, drops)
        counts.append(count_reasons(table))
        artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info={"counts": counts[-1]})
    return merge_counts(counts)


def select(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Keep every configured subset and its controls, and write their datasets; then the held-out pairs."""
    reports: list[StageReport] = []
    for selection in lineage.config.selections:
        reports.append(select_one(lineage, selection.name, selection.rule, progress))
        for name, rule in lineage.control_rules(selection).items():
            reports.append(select_one(lineage, name, rule, progress))
    if lineage.config.train:
        reports += write_holdout(lineage, progress)
    return reports


def select_one(lineage: Lineage, name: str, rule_table: Mapping[str, Any], progress: Progress) -> StageReport:
    """Keep one subset."""
    started = time.monotonic()
    rule = parse_rule(rule_table)
    metric = rule.score.removeprefix("score_")
    folder = lineage.selected_folder(name, rule_table)
    dataset = lineage.dataset_folder(name, folder)
    done = load_summary(lineage.storage, folder)
    if done is not None and read_seal(lineage.storage, dataset) is not None:
        return done
    by = rule.by if isinstance(rule, Quota) else ()
    scored = Scored(lineage.storage, lineage.scores_folder(metric), by)
    entries = shard_entries(lineage, scored.folder)
    summary = load_summary(lineage.storage, scored.folder)
    assert summary is not None, "scores are complete before anything is selected"
    if not summary.rows_out:
        raise UserError(f"selections.{name}: no pair is eligible; dropped: {summary.dropped}")
    histograms = corpus_histograms(entries.values(), by)
    total = merge_histograms([{(): h} for h in histograms.values()])[()]
    shards = lineage.catalog.shards

    def ask(queries: dict[Any, Any]) -> Sequence[Mapping[Any, Any]]:
        return over_shards(_reply, shards, shared=(scored, queries))

    cut = decide(rule, histograms, ask)
    keeper = Keeper(scored, lineage.reader(), cut, total, folder, dataset)
    counts = over_shards(_count_kept, shards, shared=(scored, cut))
    kept = sum(counts)
    if not kept:
        raise UserError(f"selections.{name}: keeps none of {summary.rows_out:,} eligible pairs; widen its rule")
    parts = write_parts(lineage, keeper, counts, progress, f"select {name}")
    facts = {"rule": dict(rule_table), "metric": metric, "thresholds": cut.to_json(), "selection": folder}
    seal_dataset(lineage, keeper, name, "train", parts, facts)
    details = facts | {
        "dataset": dataset,
        "all_histogram": total.to_json(),
        "kept_histogram": Histogram.merge(Histogram.from_json(part.info["histogram"]) for part in parts).to_json(),
        "length": {"unit": keeper.reader.length_unit, **summary.details["length"], "kept": kept_lengths(parts)},
        "strata": {
            "eligible": summary.details["strata"],
            "kept": merge_counts(part.info["strata"] for part in parts),
        },
    }
    report = StageReport(
        stage="select",
        name=name,
        unit="pairs",
        rows_in=summary.rows_out,
        rows_out=kept,
        dropped={"not_selected": summary.rows_out - kept},
        shards=len(shards),
        computed_shards=len(shards),
        seconds=time.monotonic() - started,
        artifact=folder,
        fingerprint=folder.rsplit("@", 1)[1],
        details=details,
    )
    save_summary(lineage.storage, report)
    return report


def write_holdout(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """The held-out pairs as a dataset with the same columns; nothing when there are none."""
    started = time.monotonic()
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before anything is selected"
    held_out = eligible.dropped.get("holdout", 0)
    dataset = lineage.holdout_dataset
    done = load_summary(lineage.storage, dataset)
    if not held_out or done is not None:
        return [done] if done else []
    keeper = Keeper(None, lineage.reader(), None, None, None, dataset, held_out="holdout")
    entries = shard_entries(lineage, lineage.eligible_folder)
    counts = [entries[shard.key].info["counts"].get("holdout", 0) for shard in lineage.catalog.shards]
    parts = write_parts(lineage, keeper, counts, progress, "holdout")
    seal_dataset(lineage, keeper, "holdout", "test", parts, {"kept": "pairs of held-out prompts"})
    report = StageReport(
        stage="holdout",
        name="holdout",
        unit="pairs",
        rows_in=held_out,
        rows_out=sum(part.rows for part in parts),
        dropped={},
        shards=len(parts),
        computed_shards=len(parts),
        seconds=time.monotonic() - started,
        artifact=dataset,
        fingerprint=dataset.rsplit("@", 1)[1],
        details={"length": {"unit": keeper.reader.length_unit, "kept": kept_lengths(parts)}},
    )
    save_summary(lineage.storage, report)
    return [report]


def part_names(parts: Sequence[Sequence[ShardRef]], counts: Mapping[ShardRef, int], split: str) -> list[str]:
    """`<split>-00000-of-N` for the parts with rows; the others get a name that `datasets`, which opens none, skips."""
    has_rows = [any(counts[shard] for shard in part) for part in parts]
    number, names = 0, []
    for position, is_full in enumerate(has_rows):
        names.append(f"{split}-{number:05d}-of-{sum(has_rows):05d}" if is_full else f"empty-{position:05d}")
        number += is_full
    return names


def shard_entries(lineage: Lineage, folder: str) -> dict[str, Entry]:
    """Ledger entries of a complete artifact by shard key.

    Raises:
        IntegrityError: a shard of the corpus is not in its ledger.
    """
    entries = {}
    for source, shards in lineage.catalog.sources_of().items():
        known = Artifact(lineage.storage, f"{folder}/{source}").entries()
        for shard in shards:
            if shard.shard not in known:
                raise IntegrityError(f"{folder}/{shard.key}: lost from its ledger; remove {folder} to compute it again")
            entries[shard.key] = known[shard.shard]
    return entries


def _count_kept(shard: ShardRef, shared: Any) -> int:
    scored, cut = shared
    rows, _ = scored.rows(shard, ids=cut.needs_ids)
    return int(keep(cut, rows).sum())


def _reply(shard: ShardRef, shared: Any) -> Any:
    scored, queries = shared
    rows, _ = scored.rows(shard, ids=any(query.needs_ids for query in queries.values()))
    return reply(queries, rows)


def write_parts(lineage: Lineage, keeper: Keeper, counts: Sequence[int], progress: Progress, label: str) -> list[Entry]:
    """Write the parts of a dataset that are not there yet; `counts` are the rows each shard gives.

    Returns:
        The ledger entries of all parts, in order.
    """
    pairs = lineage.catalog.entries(lineage.storage, "pairs")
    parts = plan_parts(lineage.catalog.shards, counts)
    names = part_names(parts, dict(zip(lineage.catalog.shards, counts)), "test" if keeper.held_out else "train")
    artifact = Artifact(lineage.storage, f"{keeper.dataset}/data")
    inputs = {name: hash_hex(*(pairs[s.key].content for s in part)) for name, part in zip(names, parts)}
    done = artifact.done(inputs)
    pending = [(name, part, inputs[name]) for name, part in zip(names, parts) if name not in done]
    with progress.track(label, len(pending), "files") as counter:
        over_shards(write_part, pending, shared=keeper, counter=counter)
    entries = artifact.done(inputs)
    return [entries[name] for name in names]


def seal_dataset(
    lineage: Lineage, keeper: Keeper, name: str, split: str, parts: Sequence[Entry], facts: Mapping[str, Any]
) -> None:
    """Write the card and seal the dataset."""
    storage, dataset = lineage.storage, keeper.dataset
    rows = sum(part.rows for part in parts)
    columns = Artifact(storage, f"{dataset}/data").read(parts[0].shard).column_names
    card = dataset_card(name=name, split=split, rows=rows, columns=columns, facts=facts).encode()
    storage.write(f"{dataset}/README.md", card)
    listed = {f"data/{part.shard}.parquet": {"bytes": part.bytes, "blake2b": part.content} for part in parts}
    listed["README.md"] = {"bytes": len(card), "blake2b": digest(card)}
    write_seal(storage, dataset, listed, {"rows": rows})


def kept_lengths(parts: Sequence[Entry]) -> dict[str, float | None]:
    """Mean lengths of the kept completions."""
    count = sum(part.info["lengths"]["count"] for part in parts)
    if not count:
        return {"chosen": None, "rejected": None, "difference": None}
    chosen, rejected = (sum(part.info["lengths"][side] for part in parts) / count for side in ("chosen", "rejected"))
    return {"chosen": chosen, "rejected": rejected, "difference": chosen - rejected}
