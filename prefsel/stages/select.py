"""Scores → selections and datasets, exactly, in passes over shards.

    scores ──▶ derived scores ──▶ thresholds (rounds of counting on shards) ──▶ kept rows: selection, dataset

The driver holds what shards say of themselves, and thresholds; rows stay in the tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefsel.errors import UserError
from prefsel.numbers.histogram import Histogram
from prefsel.pairs.score_report import score_report
from prefsel.pairs.score_shards import ScoreReader, committed, committed_summaries
from prefsel.plan.columns import dataset_scorers, pair_reader
from prefsel.plan.derived import (
    DerivedScore,
    derived_scores,
    facts,
    marks,
    metric_of,
    score_name,
    score_reader,
    thresholds,
)
from prefsel.plan.node import Node
from prefsel.plan.nodes import selection_rule, writes_dataset
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.rules import SCORED_STRATA, Top, parse_rule
from prefsel.schema import FLIPPED
from prefsel.select.close import ClosePairs, rests_on_moments
from prefsel.select.compose import Keep, compile_rule
from prefsel.select.evaluate import ShardQuery, answer, ask_about, by_label, decide_leaf
from prefsel.select.fuse import Fitted, fit
from prefsel.select.percentiles import Percentiles
from prefsel.select.ranks import Parts, percentiles, split_evenly
from prefsel.select.thresholds import Decided
from prefsel.select.writer import (
    Decision,
    OutputFile,
    SelectionWriter,
    ShardCounts,
    count_close,
    count_kept,
    ends_of,
    file_names,
    kept_lengths,
    plan_files,
    seal_dataset,
    write_file,
)
from prefsel.stages.derived import (
    DedupePass,
    RankPass,
    commit_derived,
    count_statistics,
    count_upto,
    counts_of,
)
from prefsel.stages.shuffle import hash_shuffle, num_partitions
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef, required_entries
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.verify import finished, finished_folder

SHARDS_PER_TASK = 8
"""Of a pass that takes milliseconds a shard: starting a task takes about one."""


def select(plan: Plan, node: Node, progress: Progress) -> list[StageReport]:
    """Keep one subset; every score and column that it reads is there.

    Returns:
        Reports of its derived scores (stage `fuse`), then its own (stage `select`).

    Raises:
        UserError: nothing is eligible, or nothing is kept.
    """
    started = time.monotonic()
    name, rule, storage = node.name, selection_rule(plan, node), plan.storage
    compiled = compile_rule(parse_rule(rule))
    made = derived_scores(plan, name, compiled)
    reader = score_reader(plan, compiled, made)
    reports = [_make_score(plan, one, reader, made, progress) for one in made]
    folder = node.path
    dataset = plan.node("dataset", name).path if writes_dataset(plan, name) else None
    done = finished(storage, folder)
    if done is not None and (dataset is None or finished_folder(storage, dataset) is not None):
        return [*reports, replace(done, details={**done.details, "dataset": dataset})]
    summary = load_summary(storage, reader.folders[compiled.score])
    assert summary is not None, "scores are complete before anything is selected"
    if not summary.rows_out:
        raise UserError(f"selections.{name}: no pair is eligible; dropped: {summary.dropped}")
    shards = plan.catalog.shards
    decided = [_find_thresholds(plan, leaf, reader) for leaf in compiled.leaves]
    decision = Decision(reader, compiled, tuple(one.thresholds for one in decided))
    counts = _count_rows(decision, decided[0], shards)
    kept = sum(count.kept for count in counts)
    if not kept:
        raise UserError(f"selections.{name}: keeps none of {summary.rows_out:,} eligible pairs; widen its rule")
    total = Histogram.from_json(summary.details["histogram"])
    missing = merge_counts(count.dropped for count in counts)
    ranked = summary.rows_out - sum(missing.values())
    in_percent = Percentiles.of_rule(total, compiled, marks(compiled, decision.thresholds), ranked)
    # Without a dataset no number is carried along, only the lengths are looked at.
    exported = pair_reader(plan, dataset_scorers(plan, name) if dataset else [])
    has_rest = dataset is not None and plan.catalog.has_rest(storage)
    writer = SelectionWriter(exported, dataset, decision, in_percent, folder, has_rest=has_rest)
    written = _write_files(plan, writer, [count.kept for count in counts], progress, f"select {name}")
    about: dict[str, Any] = {
        "rule": rule,
        "metric": score_name(compiled.score, made),
        "thresholds": thresholds(compiled, decision.thresholds, made),
        "selection": folder,
    }
    if bins := [list(one.length_edges) for one in decision.thresholds if one.length_edges is not None]:
        about["length_edges"] = bins
    close = _close_pairs(plan, made, decision)
    if reached := _percentiles_reached(plan, reader, made, counts):
        about["percentiles"] = reached
    by_shard = _shard_entries(plan, folder).values()
    if compiled.flips is not None:
        about[FLIPPED] = sum(one.info[FLIPPED] for one in by_shard)
    if dataset is not None:
        seal_dataset(storage, dataset, name, "train", written, about)
    details = about | {
        "dataset": dataset,
        "marks": marks(compiled, decision.thresholds),
        "all_histogram": total.to_json(),
        "kept_histogram": Histogram.merge(Histogram.from_text(one.info["histogram"]) for one in by_shard).to_json(),
        "length": {"unit": writer.reader.length_unit, **summary.details["length"], "kept": kept_lengths(by_shard)},
        "strata": {
            "eligible": summary.details["strata"],
            "kept": merge_counts(one.info["strata"] for one in by_shard),
        },
    }
    if close is not None:
        details["close"] = close.to_json()
    report = StageReport(
        stage="select",
        name=name,
        unit="pairs",
        rows_in=summary.rows_out,
        rows_out=kept,
        dropped={**missing, "not_selected": summary.rows_out - kept - sum(missing.values())},
        shards=len(shards),
        computed_shards=len(shards),
        seconds=time.monotonic() - started,
        artifact=folder,
        details=details,
    )
    save_summary(storage, report)
    return [*reports, report]


def _make_score(
    plan: Plan, one: DerivedScore, reader: ScoreReader, made: Sequence[DerivedScore], progress: Progress
) -> StageReport:
    """Fit and commit one derived score, if it is not there.

    Raises:
        UserError: a score without spread where its z-score is wanted.
    """
    started = time.monotonic()
    if (done := finished(plan.storage, one.folder)) is not None:
        return done
    storage, catalog = plan.storage, plan.catalog
    parts = _cut_into_parts(plan, one, reader) if one.step.is_by_rank else ()
    fitted = _fit_score(plan, one, reader) if one.step.how == "zscore" else counts_of(one.step, parts)
    numbers = {column: dict(found or {}) for column, found in fitted.items()}
    pairs = catalog.entries(storage, "pairs")
    inputs = {key: hash_hex(entry.content, repr(sorted(numbers.items()))) for key, entry in pairs.items()}
    entries = committed(storage, catalog, one.folder, inputs)
    pending = [shard for shard in catalog.shards if shard.key not in entries]
    if one.step.how == "best" or one.step.is_by_rank:
        # Decided over all shards together.
        work = DedupePass(reader, one, inputs) if one.step.how == "best" else RankPass(reader, one, parts, inputs)
        done_before: dict[str, dict[str, int]] = {key: {} for key in entries}
        hash_shuffle(work, catalog.shards, progress, f"score {one.name}", done=done_before)
    elif pending:
        with progress.track(f"score {one.name}", len(pending)) as counter:
            items = [(shard, inputs[shard.key]) for shard in pending]
            map_shards(commit_derived, items, shared=(reader, one, fitted), counter=counter)
    entries = committed(storage, catalog, one.folder, inputs)
    report = score_report(
        [entries[shard.key] for shard in catalog.shards],
        stage="fuse",
        name=one.name,
        folder=one.folder,
        computed=len(pending),
        started=started,
        facts=facts(one, reader, made, numbers),
    )
    save_summary(storage, report)
    return report


def _fit_score(plan: Plan, one: DerivedScore, reader: ScoreReader) -> Fitted:
    """The moments of a derived score's population, in one pass over shards."""
    return fit(one.step, map_shards(count_statistics, plan.catalog.shards, shared=(reader, one)))


def _cut_into_parts(plan: Plan, one: DerivedScore, reader: ScoreReader) -> tuple[Parts, ...]:
    """Every score that ranks are taken of, cut evenly for the pass that sorts them."""
    shards = plan.catalog.shards

    def ask(asked: ShardQuery) -> Sequence[Mapping[Any, Any]]:
        return map_shards(_answer, shards, shared=(reader, asked), per_task=SHARDS_PER_TASK)

    found = []
    for column in one.step.scores:
        asked = ShardQuery(Keep(0, Top(kind="top", score=column, count=1), one.step.population))
        summaries = by_label(ask(asked))[()]
        found.append(split_evenly(summaries, ask_about(asked, ask), num_partitions(shards)))
    return tuple(found)


def _percentiles_reached(
    plan: Plan, reader: ScoreReader, made: Sequence[DerivedScore], counts: Sequence[ShardCounts]
) -> dict[str, list[float]]:
    """The smallest and largest percentile of the kept pairs in every score of an intersection with a budget."""
    found: dict[str, list[float]] = {}
    for one in (one for one in made if one.step.how == "middle"):
        asked = [(column, end) for column in one.step.scores for end in ends_of(counts, column)]
        upto = map_shards(count_upto, plan.catalog.shards, shared=(reader, one.step.population, asked))
        summary = load_summary(plan.storage, one.folder)
        assert summary is not None, "scores are complete before anything is selected"
        for place, column in enumerate(one.step.scores):
            size = summary.details["fitted"][column]["count"]
            ends = np.array([sum(shard[2 * place + end] for shard in upto) for end in (1, 0)])
            found[metric_of(column)] = percentiles(ends - 1, size).tolist()
    return found


def _close_pairs(plan: Plan, made: Sequence[DerivedScore], decision: Decision) -> ClosePairs | None:
    """The pairs beside a threshold of a score that rests on moments; None where no score of a leaf does."""
    steps = {one.step.column: one.step for one in made}

    def is_rounded(column: str) -> bool:
        if column in steps and steps[column].how == "best":
            return is_rounded(steps[column].scores[0])
        summary = load_summary(plan.storage, decision.reader.folders[column])
        return summary is not None and rests_on_moments(summary.details.get("fitted") or {})

    numbers = tuple(leaf.number for leaf in decision.compiled.leaves if is_rounded(leaf.column))
    if not numbers:
        return None
    shards = plan.catalog.shards
    return ClosePairs.merge(map_shards(count_close, shards, shared=(decision, numbers), per_task=SHARDS_PER_TASK))


def _find_thresholds(plan: Plan, leaf: Keep, reader: ScoreReader) -> Decided:
    """The thresholds of one leaf, begun from what its scores were committed with where that is of its very pairs."""

    def ask(asked: ShardQuery) -> Sequence[Mapping[Any, Any]]:
        return map_shards(_answer, plan.catalog.shards, shared=(reader, asked), per_task=SHARDS_PER_TASK)

    if not leaf.has_own_scores or not set(leaf.by) <= set(SCORED_STRATA):
        return decide_leaf(leaf, ask)
    entries = _shard_entries(plan, reader.folders[leaf.column])
    summaries = committed_summaries((entries[shard.key] for shard in plan.catalog.shards), leaf.by)
    return decide_leaf(leaf, ask, committed=summaries)


def _count_rows(decision: Decision, first: Decided, shards: Sequence[ShardRef]) -> list[ShardCounts]:
    """What is kept of every shard: as the search has told for a rule of one leaf, else counted."""
    compiled = decision.compiled
    is_plain = (
        isinstance(compiled.keep, Keep)
        and compiled.keep.population == (compiled.score,)
        and not compiled.keep.is_complement
    )
    if is_plain and first.kept_S is not None and not any(step.how == "middle" for step in compiled.derived):
        return [ShardCounts(kept, {}, {}) for kept in first.kept_S.tolist()]
    return map_shards(count_kept, shards, shared=decision, per_task=SHARDS_PER_TASK)


def _answer(shard: ShardRef, shared: tuple[ScoreReader, ShardQuery]) -> Mapping[Any, Any]:
    reader, asked = shared
    leaf = asked.leaf
    columns = list(dict.fromkeys((leaf.column, *leaf.population)))
    by = ["length_bin"] if asked.is_length else leaf.by
    return answer(asked, reader.rows(shard, columns, ids=asked.needs_ids, by=by))


def write_holdout(plan: Plan, progress: Progress) -> list[StageReport]:
    """The held-out pairs as a dataset with the same columns; nothing when there are none."""
    started = time.monotonic()
    eligible = load_summary(plan.storage, plan.node("eligible", "all").path)
    assert eligible is not None, "eligibility is complete before anything is selected"
    held_out = eligible.dropped.get("holdout", 0)
    dataset = plan.node("dataset", "holdout").path
    done = finished(plan.storage, dataset)
    if not held_out or done is not None:
        return [done] if done else []
    exported, has_rest = pair_reader(plan, dataset_scorers(plan, "holdout")), plan.catalog.has_rest(plan.storage)
    writer = SelectionWriter(exported, dataset, held_out="holdout", has_rest=has_rest)
    entries = _shard_entries(plan, plan.node("eligible", "all").path)
    counts = [entries[shard.key].info["counts"].get("holdout", 0) for shard in plan.catalog.shards]
    files = _write_files(plan, writer, counts, progress, "holdout")
    seal_dataset(plan.storage, dataset, "holdout", "test", files, {"kept": "pairs of held-out prompts"})
    report = StageReport(
        stage="holdout",
        name="holdout",
        unit="pairs",
        rows_in=held_out,
        rows_out=sum(file.rows for file in files),
        dropped={},
        shards=len(files),
        computed_shards=len(files),
        seconds=time.monotonic() - started,
        artifact=dataset,
        details={"length": {"unit": writer.reader.length_unit, "kept": kept_lengths(files)}},
    )
    save_summary(plan.storage, report)
    return [report]


def _shard_entries(plan: Plan, folder: str) -> dict[str, Entry]:
    """Ledger entries of a complete artifact by shard key.

    Raises:
        DamagedError: a shard of the corpus is not in its ledger.
    """
    entries: dict[str, Entry] = {}
    for source, shards in plan.catalog.sources_of().items():
        known = required_entries(plan.storage, f"{folder}/{source}", [shard.shard for shard in shards])
        entries |= {shard.key: known[shard.shard] for shard in shards}
    return entries


def _write_files(
    plan: Plan, writer: SelectionWriter, counts: Sequence[int], progress: Progress, label: str
) -> list[Entry]:
    """Write the files that are not there yet; `counts` are the rows each shard gives.

    Returns:
        The ledger entries of all dataset files, in order; none without a dataset.
    """
    storage, shards = plan.storage, plan.catalog.shards
    pairs = plan.catalog.entries(storage, "pairs")
    planned = plan_files(shards, counts)
    names = file_names(planned, dict(zip(shards, counts)), "test" if writer.held_out else "train")
    contents = {shard: pairs[shard.key].content for shard in shards}
    files = [OutputFile(name, tuple(part), tuple(contents[s] for s in part)) for name, part in zip(names, planned)]
    artifact = Artifact(storage, f"{writer.dataset}/data") if writer.dataset else None
    inputs, lacking = {file.name: file.made_from for file in files}, set[str]()
    if artifact:
        lacking |= inputs.keys() - artifact.done(inputs).keys()
    if writer.folder:
        kept = committed(storage, plan.catalog, writer.folder, {s.key: content for s, content in contents.items()})
        writer = replace(writer, done=frozenset(kept))
        lacking |= {file.name for file in files if any(shard.key not in kept for shard in file.shards)}
    pending = [file for file in files if file.name in lacking]
    per_task = 1 if artifact else SHARDS_PER_TASK
    with progress.track(label, len(pending), "files" if artifact else "parts") as counter:
        map_shards(write_file, pending, shared=writer, counter=counter, per_task=per_task)
    entries = artifact.done(inputs) if artifact else {}
    return [entries[name] for name in names if artifact]
