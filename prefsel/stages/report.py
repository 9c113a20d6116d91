"""Summaries in the workspace → report.json, index.html and the sealed manifest of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from prefsel.config.lookup import find
from prefsel.display import redact, redacted
from prefsel.evaluate.intervals import Values
from prefsel.pairs.score_shards import ScoreReader
from prefsel.plan.columns import dataset_scorers, pair_reader
from prefsel.plan.counted import kept_plan
from prefsel.plan.derived import derived_scores, score_reader
from prefsel.plan.plan import Plan
from prefsel.plan.scores import metric_specs
from prefsel.report.cost import cost_table, scoring_table
from prefsel.report.distributions import Drawn, bin_edges, counts, histograms, sketch
from prefsel.report.evaluated import evaluated_sections, reward_measures
from prefsel.report.examples import candidates, example_rows, examples_wanted, pick, shown
from prefsel.report.overlap import overlaps, shared_pairs
from prefsel.report.page import render
from prefsel.report.planned import planned_table
from prefsel.report.rounds import means, shard_sums
from prefsel.report.sections import score_section, selection_section, training_section, without_bulk
from prefsel.report.trained import accuracies, held_out, reward_table, share_estimate, stage_warnings
from prefsel.report.verdict import below_chance, comparisons, drawn_at_random
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule
from prefsel.select.percentiles import selection_percentiles
from prefsel.stages.tasks import map_shards
from prefsel.train.heldout import read_margins
from prefsel.workspace.documents import read_document
from prefsel.workspace.folders import SEAL, read_seal, seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, config_text, hardware, seal, versions
from prefsel.workspace.recipes import canonical, hash_hex
from prefsel.workspace.storage import digest
from prefsel.workspace.verify import finished_folder


def _config_hash(plan: Plan) -> str:
    """Eight hex digits over the corpus and the configuration, except for where it runs."""
    # Without plugins the key is left out: runs from before there were any keep their names.
    unused = {"ray"} if plan.config.plugins else {"ray", "plugins"}
    return digest(canonical([plan.config.model_dump(mode="json", exclude=unused), plan.corpus]))[:8]


def last_report(plan: Plan) -> str | None:
    """The page of the newest finished run of this configuration on this corpus, or None.

    Raises:
        DamagedError: something of the report, or the record of the run, is not as it was written.
    """
    suffix = f"-{_config_hash(plan)}.json"
    runs = [name for name in plan.storage.files("runs") if name.endswith(suffix)]
    if not runs:
        return None
    folder = f"reports/{runs[-1].removeprefix('runs/').removesuffix('.json')}"
    if "report" not in read_document(plan.storage, runs[-1]):  # it showed rows that were taken back
        return None
    if finished_folder(plan.storage, folder) is None:
        raise plan.storage.damaged(f"{folder}/{SEAL}", "missing")
    return f"{folder}/index.html"


@dataclass(frozen=True)
class MadeCorpus:
    """A corpus that a model answered: of a generation, of a round of self-play, or of the seeds of one."""

    plan: Plan
    reports: list[StageReport]
    """Of its stages, those that had nothing to do included."""
    arm: str = ""
    """The self-play it is a round of."""
    number: int = 0
    """Which one, from 1."""

    @property
    def name(self) -> str:
        """What it is called."""
        assert self.plan.made is not None, "it is made, not read"
        return self.plan.made.name


def write_report(
    plan: Plan,
    reports: Sequence[StageReport],
    *,
    seconds: float,
    made: Sequence[MadeCorpus] = (),
    tables: Sequence[dict[str, Any]] = (),
) -> str:
    """Write the page, its data and the manifest of a run, with a page for every corpus that a model answered.

    Args:
        plan: Of the run.
        reports: Of its stages, those that had nothing to do included.
        seconds: It took.
        made: The corpora that models answered.
        tables: Evaluations that a caller made; `measures` of one, {measure: {training: [a value per prompt]}}, are
            compared pair by pair in the verdict.

    Returns:
        The path of the page.
    """
    storage = plan.storage
    now = datetime.now(UTC)
    run = f"{plan.config.name}-{now:%Y%m%d-%H%M%S}-{_config_hash(plan)}"
    config_yaml = config_text(plan.config)
    header = {
        "run": run,
        "name": plan.config.name,
        "started": datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": versions(),
        "hardware": hardware(),
        "status": "done",
        "workspace": redact(storage.uri),
        "config_yaml": config_yaml,
    }
    page = _without_secrets(collect(plan, reports, header, tables))
    folder = f"reports/{run}"
    files: dict[str, bytes] = {}
    for one in made:
        own = _without_secrets(
            collect(one.plan, one.reports, header | {"run": f"{run}, {one.name}", "config_yaml": ""})
        )
        files |= {f"{one.name}.json": json.dumps(own, indent=1).encode(), f"{one.name}.html": render(own).encode()}
    page["rounds"] = [_round_row(one) for one in made]
    files |= {"report.json": json.dumps(page, indent=1).encode(), "index.html": render(page).encode()}
    seal_files(storage, folder, files, {"run": run})
    storage.write("config.yaml", config_yaml.encode())
    manifest = {**header, "corpus": plan.corpus, "report": folder, "artifacts": page["artifacts"]}
    manifest["shards"] = [shard.key for shard in plan.catalog.shards]
    if made:
        manifest["made"] = [_corpus_record(one) for one in made]
    seal(storage, run, {**manifest, "stages": [asdict(report) for report in reports]})
    return f"{folder}/index.html"


def _without_secrets(page: dict[str, Any]) -> dict[str, Any]:
    """A record of a run, redacted but for the examples of its selections, which are the corpus as it is."""
    return {key: value if key == "selections" else redacted(value) for key, value in page.items()}


def _corpus_record(one: MadeCorpus) -> dict[str, Any]:
    """What the manifest says of a corpus that a model answered: which shards it is, and what was done with them."""
    return {
        "name": one.name,
        "catalog": one.plan.catalog.to_json(),
        "artifacts": [_artifact_row(one.plan, report) for report in one.reports],
        "stages": [asdict(report) for report in one.reports],
    }


def _round_row(one: MadeCorpus) -> dict[str, Any]:
    """What the page over all rounds says of one."""
    spec, plan = one.plan.made, one.plan
    assert spec is not None, "it is made, not read"
    by_stage = {report.stage: report for report in one.reports}
    answered = by_stage["generate"]
    folders = [plan.node("columns", label).path for label in spec.judges]
    row = {
        "name": one.name,
        "arm": one.arm,
        "round": one.number,
        "is_seeds": bool(one.arm) and one.name.endswith("-seeds"),
        "policy": spec.policy,
        "reward": spec.rewards[0] if spec.rewards else None,
        "prompts": by_stage["prompts"].rows_out,
        "answers": answered.rows_out,
        "lost": answered.rows_in - answered.rows_out,
        "numbers": means(map_shards(shard_sums, plan.catalog.shards, shared=(plan.storage, folders))),
        "page": f"{one.name}.html",
    }
    for stage, key in (("pair", "pairs"), ("select", "kept"), ("train", "trained")):
        if stage in by_stage:
            report = by_stage[stage]
            row[key] = report.details["pairs"] if stage == "pair" else report.rows_out
    return row


def collect(
    plan: Plan, reports: Sequence[StageReport], header: dict[str, Any], tables: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The dictionary that `page.render` shows. Stages that had nothing to do appear with what they once did."""
    by_stage: dict[str, list[StageReport]] = {}
    for report in reports:
        by_stage.setdefault(report.stage, []).append(report)
    metrics = {report.name: report for stage in ("metric", "fuse") for report in by_stage.get(stage, [])}
    selected = by_stage.get("select", [])
    kinds = {name: spec.metric for name, spec in metric_specs(plan).items()}
    random = [one.name for one in selected if drawn_at_random(one.details["rule"], kinds)]
    selections = [selection_section(report, metrics[report.details["metric"]]) for report in selected]
    for section, report in zip(selections, selected):
        section |= _selection_histograms(plan, report, metrics[report.details["metric"]])
        section["examples"] = examples(plan, report, is_random=report.name in random)
    scores = [score_section(report) for report in metrics.values()]
    for section, report in zip(scores, metrics.values()):
        if report.rows_out and report.name not in [one.details["metric"] for one in selected]:
            section["histogram"] = drawn(plan, report.artifact)["all"]
    policies, accuracy = _policy_sections(plan, by_stage.get("train", []))
    rewards = [
        training_section(report, find(plan.config.train, report.details["training"]))
        for report in by_stage.get("reward", [])
    ]
    measures = given_measures(tables) | ({"held-out accuracy, points": accuracy} if accuracy else {})
    measures |= reward_measures(plan.storage, reports)
    planned = planned_table(kept_plan(plan.storage, header["config_yaml"]), reports)
    more = (reward_table(reports), cost_table(plan, reports), scoring_table(reports), planned)
    return {
        "run": header,
        "stages": [without_bulk(report) for report in reports],
        "scores": scores,
        "selections": selections,
        "random": random,
        "overlap": overlap(plan, selected),
        "training": [*policies, *rewards],
        "comparisons": comparisons(policies, random, measures),
        "warnings": [*_chance_warnings(policies, reports), *_all_warnings(reports)],
        "evaluated": evaluated_sections(plan.storage, reports, plan.config.report.examples, _models_of_rounds(plan)),
        "evaluations": [{key: value for key, value in table.items() if key != "measures"} for table in tables],
        "tables": [table for table in more if table],
        "artifacts": [_artifact_row(plan, report) for report in reports],
    }


def _policy_sections(plan: Plan, trained: Sequence[StageReport]) -> tuple[list[dict[str, Any]], dict[str, Values]]:
    """The sections of trained policies, and for each whose margins were kept its accuracy on every held-out pair."""
    sections, accuracy = [], {}
    for report in trained:
        section = training_section(report, find(plan.config.train, report.details["training"]))
        margins = read_margins(plan.storage, report.artifact)
        sections.append(section | {"held_out": held_out(section, margins)})
        if margins is not None:
            accuracy[report.name] = accuracies(margins, "after")
    return sections, accuracy


def _models_of_rounds(plan: Plan) -> dict[str, tuple[str, int, str]]:
    """Model → the self-play whose round trains it, which one, from 1, and the policy that it began with."""
    return {
        arm.trained_in(number): (arm.name, number, arm.policy)
        for arm in plan.config.selfplay
        for number in range(1, arm.rounds + 1)
    }


def given_measures(tables: Sequence[dict[str, Any]]) -> dict[str, dict[str, Values]]:
    """The values per prompt that evaluations brought along: measure → training → values."""
    found: dict[str, dict[str, Values]] = {}
    for table in tables:
        for measure, by_training in (table.get("measures") or {}).items():
            for name, values in by_training.items():
                prompts = [str(number) for number in range(len(values))]
                found.setdefault(measure, {})[name] = Values(prompts, prompts, np.array(values, np.float64))
    return found


def _chance_warnings(policies: Sequence[dict[str, Any]], reports: Sequence[StageReport]) -> list[str]:
    """One sentence per model that orders fewer held-out pairs as they are labelled than a coin would."""
    found: list[str] = []
    for section in policies:
        found += below_chance(section["name"], section["held_out"].get("after"), "the held-out pairs")
    for report in reports:
        if report.stage == "reward":
            after = share_estimate(report.details.get("holdout_after") or {})
            found += below_chance(report.name, after, "its held-out pairs")
    return found


def _all_warnings(reports: Sequence[StageReport]) -> list[str]:
    """What the stages warned of, each with who did."""
    return [f"{report.stage} {report.name}: {text}" for report in reports for text in stage_warnings(report)]


def overlap(plan: Plan, selected: Sequence[StageReport]) -> list[dict[str, Any]]:
    """How far the selections agree, two by two."""
    if len(selected) < 2:
        return []
    folders = [report.artifact for report in selected]
    counts = map_shards(shared_pairs, plan.catalog.shards, shared=(plan.storage, folders))
    return overlaps([{"name": report.name, "num_eligible": report.rows_in} for report in selected], counts)


def drawn(
    plan: Plan,
    scores: str,
    kept: str | None = None,
    marks: Sequence[float] = (),
    *,
    is_closed_right: bool = False,
) -> dict[str, dict[str, Any]]:
    """Histograms of a folder of scores, and of the ones that a selection kept, in two passes over the scores."""
    shards = plan.catalog.shards
    edges = bin_edges(map_shards(sketch, shards, shared=(plan.storage, scores)), marks)
    asked = Drawn(plan.storage, scores, kept, edges, is_closed_right)
    return histograms(asked, map_shards(counts, shards, shared=asked))


def _selection_histograms(plan: Plan, selection: StageReport, scores: StageReport) -> dict[str, Any]:
    """The scores of all pairs that a selection could keep, and of those it kept."""
    is_descending = compile_rule(parse_rule(selection.details["rule"])).descending
    marks = selection.details.get("marks") or ()
    found = drawn(plan, scores.artifact, selection.artifact, marks, is_closed_right=not is_descending)
    return {f"{part}_histogram": histogram for part, histogram in found.items()}


def examples(plan: Plan, selection: StageReport, *, is_random: bool) -> list[dict[str, Any]]:
    """The examples of one selection, from all shards, in the order of the page."""
    number, corpus = plan.config.report.examples, plan.catalog.shards
    if not number:
        return []
    wanted = examples_wanted(_rule_scores_reader(plan, selection), selection, number, is_random=is_random)
    picked = pick(map_shards(candidates, corpus, shared=wanted), wanted)
    rows: dict[int, list[int]] = {}
    for shard, row in sorted(picked):
        rows.setdefault(shard, []).append(row)
    shards = {shard.number: shard for shard in corpus}
    reader = pair_reader(plan, dataset_scorers(plan, selection.name))
    folder = selection.artifact if wanted.plan.flips is not None else None
    texts = map_shards(example_rows, [(shards[number], rows[number]) for number in rows], shared=(reader, folder))
    found = {(shard, row): text for shard, many in zip(rows, texts) for row, text in zip(rows[shard], many)}
    percentiles = selection_percentiles(selection)
    return [shown(kind, one, found[place], percentiles) for place, (kind, one) in picked.items()]


def _rule_scores_reader(plan: Plan, selection: StageReport) -> ScoreReader:
    """A reader of every score that the rule of a selection reads or makes."""
    rule = compile_rule(parse_rule(selection.details["rule"]))
    return score_reader(plan, rule, derived_scores(plan, selection.name, rule))


def _artifact_row(plan: Plan, report: StageReport) -> dict[str, Any]:
    """Where an artifact lies and what it holds."""
    sealed = read_seal(plan.storage, report.artifact)
    if sealed:
        size, content = sum(file["bytes"] for file in sealed["files"].values()), sealed["content"]
    else:
        entries = [entry for path in _shard_folders(plan, report) for entry in path.entries().values()]
        size, content = sum(entry.bytes for entry in entries), hash_hex(*(entry.content for entry in entries))
    return {
        "path": report.artifact,
        "fingerprint": report.fingerprint,
        "rows": report.rows_out,
        "bytes": size,
        "content": content,
    }


def _shard_folders(plan: Plan, report: StageReport) -> list[Artifact]:
    """The folders of a sharded artifact: itself, or one per source."""
    if report.stage in ("ingest", "generate", "prompts"):
        return [Artifact(plan.storage, report.artifact)]
    return [Artifact(plan.storage, f"{report.artifact}/{source}") for source in plan.catalog.sources_of()]
