"""The `proxy` part of the corpus → the small models that a trial makes for itself, side by side."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from prefsel.errors import invalid
from prefsel.plan.lineage import Lineage
from prefsel.progress import Progress
from prefsel.stages.tasks import over_shards
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.manifest import StageReport, load_summary, save_summary


def make_scratch_models(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Make the small models that the configuration asks for from the `proxy` part of the corpus, side by side."""
    specs = [spec for spec in lineage.config.models if spec.kind != "pretrained"]
    if not specs:
        return []
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before models are made"
    if not eligible.dropped.get("proxy"):
        first = specs[0].name
        raise invalid("split.proxy", lineage.config.split.proxy, f"above 0: model {first!r} is trained on that part")
    reports = {spec.name: load_summary(lineage.storage, lineage.scratch_path(spec.name)) for spec in specs}
    pending = [spec for spec in specs if reports[spec.name] is None]
    reader, shards = lineage.text_reader(), lineage.catalog.shards
    with progress.track("make models", len(pending), "models") as counter:
        items = [(spec, lineage.scratch_path(spec.name)) for spec in pending]
        made = over_shards(_make_scratch, items, shared=(reader, shards), counter=counter)
    for spec, report in zip(pending, made):
        save_summary(lineage.storage, report)
        reports[spec.name] = report
    return [report for report in reports.values() if report is not None]


def _make_scratch(item: Any, shared: Any) -> StageReport:
    """Train one small model on the proxy pairs and seal it."""
    import torch

    from prefsel.scratch.corpus import make_model, proxy_pairs

    started = time.monotonic()
    (spec, path), (reader, shards) = item, shared
    torch.set_num_threads(1)
    pairs = proxy_pairs(reader, shards)
    with tempfile.TemporaryDirectory() as folder:
        facts = make_model(spec, pairs, Path(folder))
        commit_folder(reader.storage, {"": Path(folder)}, path, facts)
    return StageReport(
        stage="scratch",
        name=spec.name,
        unit="pairs",
        rows_in=len(pairs),
        rows_out=facts["num_pairs"],
        dropped={"unused": len(pairs) - facts["num_pairs"]},
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        fingerprint=path.rsplit("@", 1)[1],
        details=facts,
    )
