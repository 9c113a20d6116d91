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

from prefsel.errors import IntegrityError, UserError, invalid
from prefsel.numbers.histogram import Histogram
from prefsel.pairs.score_report import score_report
from prefsel.pairs.score_shards import ScoreReader, committed, committed_summaries
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
from prefsel.plan.lineage import Lineage
from prefsel.progress import Progress
from prefsel.rules import Top, parse_rule
from prefsel.select.compose import Keep, compile_rule
from prefsel.select.eligible import EligiblePass, Rules, prompt_ids, require_disjoint, shared_prompts
from prefsel.select.evaluate import ShardQuery, answer, ask_about, by_label, decide_leaf
from prefsel.select.fuse import Fitted, fit
from prefsel.select.ranks import Parts, percentiles, split_evenly
from prefsel.select.thresholds import Decided
from prefsel.select.writer import (
    Decision,
    OutputFile,
    SelectionWriter,
    ShardCounts,
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
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import read_seal
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex

SHARDS_PER_TASK = 8
"""Of a pass that takes milliseconds a shard: starting a task takes about one."""

# ---------------------------------------------------------------------------------------------------- eligibility


def resolve_eligible(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Decide for every pair whether it may be selected, duplicates across files included.

    Raises:
        UserError: a prompt stands in a validation source and in one that is selected from.
    """
    started = time.monotonic()
    storage, catalog, folder = lineage.storage, lineage.catalog, lineage.eligible_folder
    if done := load_summary(storage, folder):
        return [done]
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    rules = Rules(lineage.config.split, excluded, held_out)
    validation = [source.name for source in catalog.sources if source.role == "validation"]
    if validation:
        aims = prompt_ids(storage, catalog, "validation")
        found = map_shards(_shared_prompts, catalog.shards, shared=(storage, rules, aims))
        require_disjoint(catalog.shards, found, validation)
    pairs = catalog.entries(storage, "pairs")
    inputs = {key: entry.content for key, entry in pairs.items()}
    work = EligiblePass(storage, rules, lineage.config.duplicates.contradictions, folder, inputs)
    dropped = merge_counts(hash_shuffle(work, catalog.shards, progress, "eligible"))
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


def _shared_prompts(shard: ShardRef, shared: Any) -> list[bytes]:
    storage, rules, validation = shared
    pairs = Artifact(storage, f"pairs/{shard.source}").read(shard.shard, ["prompt_id"])
    return shared_prompts(pairs, shard, rules, validation)


# ------------------------------------------------------------------------------------------------------ selections


def select_node(lineage: Lineage, name: str, progress: Progress) -> list[StageReport]:
    """Keep one selection and its controls; every metric they read is there.

    Returns:
        Reports of their derived scores (stage `fuse`), of the selection and of its controls (stage `select`).

    Raises:
        UserError: no such selection; nothing is eligible, or nothing is kept.
    """
    selection = next((spec for spec in lineage.config.selections if spec.name == name), None)
    if selection is None:
        raise invalid("selection", name, [spec.name for spec in lineage.config.selections])
    reports = select_rule(lineage, name, selection.rule, progress)
    for control, rule in lineage.control_rules(selection).items():
        reports += select_rule(lineage, control, rule, progress)
    first: dict[str, StageReport] = {}
    for report in reports:  # a score that a control shares is reported once, as what made it
        first.setdefault(report.artifact, report)
    return list(first.values())


def select_rule(lineage: Lineage, name: str, rule: Mapping[str, Any], progress: Progress) -> list[StageReport]:
    """Keep one subset; returns the reports of its derived scores and its own."""
    started = time.monotonic()
    plan = compile_rule(parse_rule(rule))
    made = derived_scores(lineage, name, plan)
    reader = score_reader(lineage, plan, made)
    reports = [make_score(lineage, one, reader, made, progress) for one in made]
    folder = lineage.selected_folder(name, rule)
    dataset = lineage.dataset_folder(name, folder) if lineage.writes_dataset(name) else None
    done = load_summary(lineage.storage, folder)
    if done is not None and (dataset is None or read_seal(lineage.storage, dataset) is not None):
        return [*reports, replace(done, details={**done.details, "dataset": dataset})]
    summary = load_summary(lineage.storage, reader.folders[plan.score])
    assert summary is not None, "scores are complete before anything is selected"
    if not summary.rows_out:
        raise UserError(f"selections.{name}: no pair is eligible; dropped: {summary.dropped}")
    shards = lineage.catalog.shards
    decided = [find_thresholds(lineage, leaf, reader) for leaf in plan.leaves]
    decision = Decision(reader, plan, tuple(one.thresholds for one in decided))
    counts = count_rows(decision, decided[0], shards)
    kept = sum(count.kept for count in counts)
    if not kept:
        raise UserError(f"selections.{name}: keeps none of {summary.rows_out:,} eligible pairs; widen its rule")
    total = Histogram.from_json(summary.details["histogram"])
    # Without a dataset no number is carried along, only the lengths are looked at.
    exported = lineage.reader_of(lineage.exported(name) if dataset else [])
    writer = SelectionWriter(exported, dataset, decision, total, folder)
    written = write_files(lineage, writer, [count.kept for count in counts], progress, f"select {name}")
    about: dict[str, Any] = {
        "rule": dict(rule),
        "metric": score_name(plan.score, made),
        "thresholds": thresholds(plan, decision.thresholds, made),
        "selection": folder,
    }
    if bins := [list(one.length_edges) for one in decision.thresholds if one.length_edges is not None]:
        about["length_edges"] = bins
    if reached := percentiles_reached(lineage, reader, made, counts):
        about["percentiles"] = reached
    if dataset is not None:
        seal_dataset(lineage.storage, dataset, name, "train", written, about)
    by_shard = shard_entries(lineage, folder).values()
    details = about | {
        "dataset": dataset,
        "marks": marks(plan, decision.thresholds),
        "all_histogram": total.to_json(),
        "kept_histogram": Histogram.merge(Histogram.from_text(one.info["histogram"]) for one in by_shard).to_json(),
        "length": {"unit": writer.reader.length_unit, **summary.details["length"], "kept": kept_lengths(by_shard)},
        "strata": {
            "eligible": summary.details["strata"],
            "kept": merge_counts(one.info["strata"] for one in by_shard),
        },
    }
    missing = merge_counts(count.dropped for count in counts)
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
        fingerprint=folder.rsplit("@", 1)[1],
        details=details,
    )
    save_summary(lineage.storage, report)
    return [*reports, report]


def make_score(
    lineage: Lineage, one: DerivedScore, reader: ScoreReader, made: Sequence[DerivedScore], progress: Progress
) -> StageReport:
    """Fit and commit one derived score, if it is not there.

    Raises:
        UserError: a score without spread where its z-score is wanted.
    """
    started = time.monotonic()
    if (done := load_summary(lineage.storage, one.folder)) is not None:
        return done
    storage, catalog = lineage.storage, lineage.catalog
    parts = cut_into_parts(lineage, one, reader) if one.step.is_by_rank else ()
    fitted = fit_score(lineage, one, reader) if one.step.how == "zscore" else counts_of(one.step, parts)
    numbers = {column: dict(found or {}) for column, found in fitted.items()}
    pairs = catalog.entries(storage, "pairs")
    inputs = {key: hash_hex(entry.content, repr(sorted(numbers.items()))) for key, entry in pairs.items()}
    entries = committed(storage, catalog, one.folder, inputs)
    pending = [shard for shard in catalog.shards if shard.key not in entries]
    if one.step.how == "best":
        # Which pairs stay is decided over all shards together, so all are made together.
        pending = catalog.shards
        hash_shuffle(DedupePass(reader, one, inputs), pending, progress, f"score {one.name}")
    elif one.step.is_by_rank and pending:
        hash_shuffle(
            RankPass(reader, one, parts, inputs, frozenset(entries)), catalog.shards, progress, f"score {one.name}"
        )
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


def fit_score(lineage: Lineage, one: DerivedScore, reader: ScoreReader) -> Fitted:
    """The moments of a derived score's population, in one pass over shards."""
    return fit(one.step, map_shards(count_statistics, lineage.catalog.shards, shared=(reader, one)))


def cut_into_parts(lineage: Lineage, one: DerivedScore, reader: ScoreReader) -> tuple[Parts, ...]:
    """Every score that ranks are taken of, cut evenly for the pass that sorts them."""
    shards = lineage.catalog.shards

    def ask(asked: ShardQuery) -> Sequence[Mapping[Any, Any]]:
        return map_shards(_answer, shards, shared=(reader, asked), per_task=SHARDS_PER_TASK)

    found = []
    for column in one.step.scores:
        asked = ShardQuery(Keep(0, Top(kind="top", score=column, count=1), one.step.population))
        summaries = by_label(ask(asked))[()]
        found.append(split_evenly(summaries, ask_about(asked, ask), num_partitions(shards)))
    return tuple(found)


def percentiles_reached(
    lineage: Lineage, reader: ScoreReader, made: Sequence[DerivedScore], counts: Sequence[ShardCounts]
) -> dict[str, list[float]]:
    """The smallest and largest percentile of the kept pairs in every score of an intersection with a budget."""
    found: dict[str, list[float]] = {}
    for one in (one for one in made if one.step.how == "middle"):
        asked = [(column, end) for column in one.step.scores for end in ends_of(counts, column)]
        upto = map_shards(count_upto, lineage.catalog.shards, shared=(reader, one.step.population, asked))
        summary = load_summary(lineage.storage, one.folder)
        assert summary is not None, "scores are complete before anything is selected"
        for place, column in enumerate(one.step.scores):
            size = summary.details["fitted"][column]["count"]
            ends = np.array([sum(shard[2 * place + end] for shard in upto) for end in (1, 0)])
            found[metric_of(column)] = percentiles(ends - 1, size).tolist()
    return found


def find_thresholds(lineage: Lineage, leaf: Keep, reader: ScoreReader) -> Decided:
    """The thresholds of one leaf, begun from what its scores were committed with where that is of its very pairs."""

    def ask(asked: ShardQuery) -> Sequence[Mapping[Any, Any]]:
        return map_shards(_answer, lineage.catalog.shards, shared=(reader, asked), per_task=SHARDS_PER_TASK)

    if not leaf.has_own_scores or "length_bin" in leaf.by:
        return decide_leaf(leaf, ask)
    entries = shard_entries(lineage, reader.folders[leaf.column])
    summaries = committed_summaries((entries[shard.key] for shard in lineage.catalog.shards), leaf.by)
    return decide_leaf(leaf, ask, committed=summaries)


def count_rows(decision: Decision, first: Decided, shards: Sequence[ShardRef]) -> list[ShardCounts]:
    """What is kept of every shard: as the search has told for a rule of one leaf, else counted."""
    plan = decision.plan
    is_plain = isinstance(plan.keep, Keep) and plan.keep.population == (plan.score,) and not plan.keep.is_complement
    if is_plain and first.kept_S is not None and not any(step.how == "middle" for step in plan.derived):
        return [ShardCounts(kept, {}, {}) for kept in first.kept_S.tolist()]
    return map_shards(count_kept, shards, shared=decision, per_task=SHARDS_PER_TASK)


def _answer(shard: ShardRef, shared: tuple[ScoreReader, ShardQuery]) -> Mapping[Any, Any]:
    reader, asked = shared
    leaf = asked.leaf
    columns = list(dict.fromkeys((leaf.column, *leaf.population)))
    by = ["length_bin"] if asked.is_length else leaf.by
    return answer(asked, reader.rows(shard, columns, ids=asked.needs_ids, by=by))


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
    writer = SelectionWriter(lineage.reader_of(lineage.exported("holdout")), dataset, held_out="holdout")
    entries = shard_entries(lineage, lineage.eligible_folder)
    counts = [entries[shard.key].info["counts"].get("holdout", 0) for shard in lineage.catalog.shards]
    files = write_files(lineage, writer, counts, progress, "holdout")
    seal_dataset(lineage.storage, dataset, "holdout", "test", files, {"kept": "pairs of held-out prompts"})
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
        fingerprint=dataset.rsplit("@", 1)[1],
        details={"length": {"unit": writer.reader.length_unit, "kept": kept_lengths(files)}},
    )
    save_summary(lineage.storage, report)
    return [report]


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


def write_files(
    lineage: Lineage, writer: SelectionWriter, counts: Sequence[int], progress: Progress, label: str
) -> list[Entry]:
    """Write the files that are not there yet; `counts` are the rows each shard gives.

    Returns:
        The ledger entries of all dataset files, in order; none without a dataset.
    """
    storage, shards = lineage.storage, lineage.catalog.shards
    pairs = lineage.catalog.entries(storage, "pairs")
    planned = plan_files(shards, counts)
    names = file_names(planned, dict(zip(shards, counts)), "test" if writer.held_out else "train")
    contents = {shard: pairs[shard.key].content for shard in shards}
    files = [OutputFile(name, tuple(part), tuple(contents[s] for s in part)) for name, part in zip(names, planned)]
    artifact = Artifact(storage, f"{writer.dataset}/data") if writer.dataset else None
    inputs, lacking = {file.name: file.made_from for file in files}, set[str]()
    if artifact:
        lacking |= inputs.keys() - artifact.done(inputs).keys()
    if writer.folder:
        kept = committed(storage, lineage.catalog, writer.folder, {s.key: content for s, content in contents.items()})
        lacking |= {file.name for file in files if any(shard.key not in kept for shard in file.shards)}
    pending = [file for file in files if file.name in lacking]
    per_task = 1 if artifact else SHARDS_PER_TASK
    with progress.track(label, len(pending), "files" if artifact else "parts") as counter:
        map_shards(write_file, pending, shared=writer, counter=counter, per_task=per_task)
    entries = artifact.done(inputs) if artifact else {}
    return [entries[name] for name in names if artifact]
