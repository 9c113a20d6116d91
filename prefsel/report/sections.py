"""Stage reports → the sections of the page, as plain JSON values (see `page.render`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prefsel.config import Training
from prefsel.schema import FLIPPED
from prefsel.workspace.manifest import StageReport

BULKY = {
    *("marks", "percentiles", "length_edges", "all_histogram", "kept_histogram", "histogram", "history"),
    *("rule", "length", "strata", "thresholds", "overall", "judges", "shards"),
}


def without_bulk(report: StageReport) -> dict[str, Any]:
    """A stage's report without what has a section of its own."""
    return asdict(report) | {"details": {k: v for k, v in report.details.items() if k not in BULKY}}


def score_section(report: StageReport) -> dict[str, Any]:
    """What one metric's scores are like; its histogram is drawn from the shards."""
    details = report.details
    return {
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


def selection_section(report: StageReport, metric: StageReport) -> dict[str, Any]:
    """What one selection kept, against everything it could have kept; its histograms are drawn from the shards."""
    details = report.details
    kept, eligible = details["strata"]["kept"], details["strata"]["eligible"]
    return {
        "name": report.name,
        "metric": details["metric"],
        "rule": details["rule"],
        "num_eligible": report.rows_in,
        "num_kept": report.rows_out,
        "thresholds": details["thresholds"],
        **{key: details[key] for key in ("marks", "percentiles", "length_edges", "close", FLIPPED) if key in details},
        "moments": metric.details["moments"],
        "length": details["length"],
        "strata": [{"stratum": s, "eligible": count, "kept": kept.get(s, 0)} for s, count in eligible.items()],
        "dataset": details["dataset"],
    }


def training_section(report: StageReport, spec: Training) -> dict[str, Any]:
    """Curves, evaluations and self-checks of one training."""
    history = report.details["history"]
    return {
        "name": report.name,
        "kind": spec.kind,
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
