"""Validation pairs and a model → `tangents/<name>`: one task, one folder."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from prefsel.config import Pool, Tangent
from prefsel.errors import UserError
from prefsel.plan.models import find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plugins.failures import prepared
from prefsel.progress import Progress
from prefsel.score.job import local
from prefsel.stages.pool import gpus_per_actor
from prefsel.stages.score import loading
from prefsel.stages.tasks import unwrap
from prefsel.stages.training_pairs import corpus_part
from prefsel.train.pair_source import PairSource
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import finished


def make_tangent(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """The mean validation gradient of a model, preconditioned where asked; one task, one folder.

    Raises:
        UserError: no validation pair, a stratum without one, or a model without the optimizer's state it needs.
    """
    started = time.monotonic()
    spec, path = node.spec, node.path
    if (done := finished(plan.storage, path)) is not None:
        return done
    part = corpus_part(plan, spec.reference, "validation", field=f"tangents.{node.name}")
    settings = loading(find_model(plan, spec.model))
    pairs = PairSource(part, reference=spec.reference)
    gpus = gpus_per_actor(Pool(), settings["gpus_per_replica"])
    task = ray.remote(num_gpus=gpus)(prepared(_make_tangent))
    with progress.track(f"tangent {node.name}", 1, "tangents") as counter:
        facts = unwrap(task.remote(plan.storage, spec, settings, pairs, path))
        counter.advance()
    report = StageReport(
        stage="tangent",
        name=node.name,
        unit="pairs",
        rows_in=facts["rows_in"],
        rows_out=facts["num_pairs"],
        dropped=facts["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        details=facts,
    )
    save_summary(plan.storage, report)
    return report


def _make_tangent(
    storage: Storage, spec: Tangent, settings: dict[str, Any], pairs: PairSource, path: str
) -> dict[str, Any]:
    """Read the validation pairs, compute, commit."""
    from prefsel.score.validation import compute_tangent

    table, dropped = pairs.table()
    if table is None:
        raise UserError(f"tangents.{spec.name}: no validation pair has log-probs of {spec.reference!r}")
    with tempfile.TemporaryDirectory() as folder:
        facts = compute_tangent(spec, local(settings, storage), table, Path(folder))
        facts["rows_in"] = table.num_rows + sum(dropped.values())
        facts["dropped"] = facts["dropped"] | dropped
        commit_folder(storage, {"": Path(folder)}, path, facts)
    return facts
