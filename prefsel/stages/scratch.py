"""The `proxy` part of the corpus → the small models that a trial makes for itself, side by side."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefsel.errors import invalid
from prefsel.plan.columns import pair_texts
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages.tasks import map_shards
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.verify import finished


def make_scratch_models(plan: Plan, nodes: Sequence[Node], progress: Progress) -> list[StageReport]:
    """Make small models from the `proxy` part of the corpus, side by side.

    Raises:
        UserError: no pair is in that part.
    """
    eligible = load_summary(plan.storage, plan.node("eligible", "all").path)
    assert eligible is not None, "eligibility is complete before models are made"
    if not eligible.dropped.get("proxy"):
        given = plan.config.split.proxy
        raise invalid("split.proxy", given, f"above 0: model {nodes[0].name!r} is trained on that part")
    reports = {node.path: finished(plan.storage, node.path) for node in nodes}
    pending = [node for node in nodes if reports[node.path] is None]
    with progress.track("make models", len(pending), "models") as counter:
        items = [(node.spec, node.path) for node in pending]
        made = map_shards(_make_scratch, items, shared=(pair_texts(plan), plan.catalog.shards), counter=counter)
    for report in made:
        save_summary(plan.storage, report)
        reports[report.artifact] = report
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
        details=facts,
    )
