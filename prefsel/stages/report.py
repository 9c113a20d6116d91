"""Summaries in the workspace → report.json, index.html and the sealed manifest of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prefsel.plan.lineage import Lineage
from prefsel.report.cost import TRAINED, cost_table, scoring_table
from prefsel.report.distributions import even_edges, even_histogram
from prefsel.report.examples import examples
from prefsel.report.page import render
from prefsel.report.rewards import reward_table, warnings_table
from prefsel.workspace.folders import read_seal, seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, config_text, hardware, seal, versions
from prefsel.workspace.recipes import canonical, hash_hex
from prefsel.workspace.storage import digest, redact


def config_hash(lineage: Lineage) -> str:
    """Eight hex digits over the corpus and the configuration, except for where it runs."""
    # Without plugins the key is left out: runs from before there were any keep their names.
    unused = {"ray"} if lineage.config.plugins else {"ray", "plugins"}
    return digest(canonical([lineage.config.model_dump(mode="json", exclude=unused), lineage.corpus]))[:8]


def last_report(lineage: Lineage) -> str | None:
    """The page of the newest finished run of this configuration on this corpus, or None."""
    suffix = f"-{config_hash(lineage)}.json"
    runs = [name for name in lineage.storage.files("runs") if name.endswith(suffix)]
    return f"reports/{runs[-1].removeprefix('runs/').removesuffix('.json')}/index.html" if runs else None


def write_report(
    lineage: Lineage, reports: Sequence[StageReport], *, seconds: float, tables: Sequence[dict[str, Any]] = ()
) -> str:
    """Write the page, its data and the manifest of a run; returns the path of the page."""
    storage = lineage.storage
    now = datetime.now(UTC)
    run = f"{lineage.config.name}-{now:%Y%m%d-%H%M%S}-{config_hash(lineage)}"
    config_yaml = config_text(lineage.config)
    header = {
        "run": run,
        "name": lineage.config.name,
        "started": datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": versions(),
        "hardware": hardware(),
        "status": "done",
        "workspace": redact(storage.uri),
        "config_yaml": config_yaml,
    }
    more = (reward_table(reports), cost_table(lineage, reports), scoring_table(reports), warnings_table(reports))
    page = collect(lineage, reports, header) | {"tables": [*tables, *(table for table in more if table)]}
    folder = f"reports/{run}"
    files = {"report.json": json.dumps(page, indent=1).encode(), "index.html": render(page).encode()}
    seal_files(storage, folder, files, {"run": run})
    storage.write("config.yaml", config_yaml.encode())
    manifest = {**header, "corpus": lineage.corpus, "report": folder, "artifacts": page["artifacts"]}
    seal(storage, run, {**manifest, "stages": [asdict(report) for report in reports]})
    return f"{folder}/index.html"


def collect(lineage: Lineage, reports: Sequence[StageReport], header: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that `page.render` shows. Stages that had nothing to do appear with what they once did."""
    by_stage: dict[str, list[StageReport]] = {}
    for report in reports:
        by_stage.setdefault(report.stage, []).append(report)
    metrics = {report.name: report for stage in ("metric", "fuse") for report in by_stage.get(stage, [])}
    return {
        "run": header,
        "stages": [without_bulk(report) for report in reports],
        "scores": [score_section(report) for report in metrics.values()],
        "selections": [
            selection_section(lineage, report, metrics[report.details["metric"]])
            for report in by_stage.get("select", [])
        ],
        "training": [training_section(report, lineage) for name in TRAINED for report in by_stage.get(name, [])],
        "artifacts": [artifact_row(lineage, report) for report in reports],
    }


BULKY = {
    *("marks", "percentiles", "length_edges", "all_histogram", "kept_histogram", "histogram", "history"),
    *("rule", "length", "strata", "thresholds"),
}


def without_bulk(report: StageReport) -> dict[str, Any]:
    """A stage's report without what has a section of its own."""
    return asdict(report) | {"details": {k: v for k, v in report.details.items() if k not in BULKY}}


def score_section(report: StageReport) -> dict[str, Any]:
    """The distribution of one metric's scores."""
    details = report.details
    section = {
        "metric": report.name,
        "kind": details["kind"],
        "params": details["params"],
        "num_eligible": report.rows_out,
        "dropped": report.dropped,
        "moments": details["moments"],
        "length_correlation": details["length_correlation"],
        "length_unit": details["length_unit"],
        "statistics": details["fitted"],
    }
    if details["moments"]:
        edges = even_edges(details["histogram"], details["moments"])
        section["histogram"] = even_histogram(details["histogram"], edges, details["moments"])
    return section


def selection_section(lineage: Lineage, report: StageReport, metric: StageReport) -> dict[str, Any]:
    """What one selection kept, against everything it could have kept."""
    details, moments = report.details, metric.details["moments"]
    edges = even_edges(details["all_histogram"], moments)
    kept, eligible = details["strata"]["kept"], details["strata"]["eligible"]
    return {
        "name": report.name,
        "metric": details["metric"],
        "rule": details["rule"],
        "num_eligible": report.rows_in,
        "num_kept": report.rows_out,
        "thresholds": details["thresholds"],
        **{key: details[key] for key in ("marks", "percentiles", "length_edges") if key in details},
        "all_histogram": even_histogram(details["all_histogram"], edges, moments),
        "kept_histogram": even_histogram(details["kept_histogram"], edges, moments),
        "length": details["length"],
        "strata": [{"stratum": s, "eligible": count, "kept": kept.get(s, 0)} for s, count in eligible.items()],
        "examples": examples(lineage, report, lineage.config.report.examples),
        "dataset": details["dataset"],
    }


def training_section(report: StageReport, lineage: Lineage) -> dict[str, Any]:
    """Curves, evaluations and self-checks of one training."""
    history = report.details["history"]
    spec = lineage.training(report.details["training"])
    return {
        "name": report.name,
        "selection": spec.selection,
        "model": spec.model,
        "reference": report.details.get("reference"),
        "num_pairs": report.rows_out,
        "settings": spec.model_dump(mode="json", exclude={"kind", "name", "selection", "model", "reference"}),
        "history": [record for record in history if record["event"] == "step"],
        "evaluations": [record for record in history if record["event"] == "eval"],
        "self_checks": self_checks(history, report.details),
        "seconds": report.details.get("train_seconds", report.seconds),
        "artifact": report.artifact,
    }


def self_checks(history: Sequence[dict[str, Any]], details: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks a training had to pass before its model was committed."""
    found = next((record for record in history if record["event"] == "self_check"), {})
    reference = "recomputed reference log-probs, largest relative error"
    exported = "exported model, largest difference of its outputs"
    difference = details.get("max_logit_difference", details.get("max_output_difference"))
    rows = [
        (
            "loss before the first step, that of zero margins",
            found.get("step0_loss"),
            found.get("step0_expected", math.log(2)),
            found.get("step0_tolerance"),
        ),
        (reference, found.get("reference_relative_error"), 0.0, found.get("reference_tolerance")),
        (exported, difference, 0.0, details.get("export_tolerance")),
    ]
    return [
        {"name": name, "value": value, "expected": expected, "tolerance": limit, "ok": abs(value - expected) <= limit}
        for name, value, expected, limit in rows
        if value is not None and limit is not None
    ]


def artifact_row(lineage: Lineage, report: StageReport) -> dict[str, Any]:
    """Where an artifact lies and what it holds."""
    sealed = read_seal(lineage.storage, report.artifact)
    if sealed:
        size, content = sum(file["bytes"] for file in sealed["files"].values()), sealed["content"]
    else:
        entries = [entry for path in shard_folders(lineage, report) for entry in path.entries().values()]
        size, content = sum(entry.bytes for entry in entries), hash_hex(*(entry.content for entry in entries))
    return {
        "path": report.artifact,
        "fingerprint": report.fingerprint,
        "rows": report.rows_out,
        "bytes": size,
        "content": content,
    }


def shard_folders(lineage: Lineage, report: StageReport) -> list[Artifact]:
    """The folders of a sharded artifact: itself, or one per source."""
    if report.stage == "ingest":
        return [Artifact(lineage.storage, report.artifact)]
    return [Artifact(lineage.storage, f"{report.artifact}/{source}") for source in lineage.catalog.sources_of()]
