"""Validation pairs and a model → `tangents/<name>`: one task, one folder."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from prefsel.config import Pool, Tangent
from prefsel.errors import UserError
from prefsel.plan.lineage import Lineage
from prefsel.progress import Progress
from prefsel.stages.pool import gpus_per_actor
from prefsel.stages.scoring_job import loading, local
from prefsel.stages.tasks import unwrap
from prefsel.train.pair_source import PairSource, SplitPairs
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage


def make_tangent(lineage: Lineage, name: str, progress: Progress) -> StageReport:
    """The mean validation gradient of a model, preconditioned where asked; one task, one folder.

    Raises:
        UserError: no validation pair, a stratum without one, or a model without the optimizer's state it needs.
    """
    started = time.monotonic()
    spec, path = lineage.tangents[name], lineage.tangent_path(name)
    if (done := load_summary(lineage.storage, path)) is not None:
        return done
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before tangents are made"
    if not eligible.dropped.get("validation"):
        hint = "set split.validation, or give a source the role validation"
        raise UserError(f"tangents.{name}: no pair is in the part 'validation'; {hint}")
    reader = lineage.reader_of([lineage.logps_scorer(spec.reference)], lengths=False)
    part = SplitPairs(reader, tuple(lineage.catalog.shards), "validation")
    settings = loading(lineage, spec.model, lineage.model(spec.model))
    pairs = PairSource(part, reference=spec.reference)
    gpus = gpus_per_actor(Pool(), settings)
    task = ray.remote(num_gpus=gpus)(_make_tangent)
    with progress.track(f"tangent {name}", 1, "tangents") as counter:
        facts = unwrap(task.remote(lineage.storage, spec, settings, pairs, path))
        counter.advance()
    report = StageReport(
        stage="tangent",
        name=name,
        unit="pairs",
        rows_in=facts["rows_in"],
        rows_out=facts["num_pairs"],
        dropped=facts["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        fingerprint=path.rsplit("@", 1)[1],
        details=facts,
    )
    save_summary(lineage.storage, report)
    return report


def _make_tangent(
    storage: Storage, spec: Tangent, settings: dict[str, Any], pairs: PairSource, path: str
) -> dict[str, Any]:
    """Read the validation pairs, compute, commit."""
    from prefsel.score.validation import make_tangent

    table, dropped = pairs.table()
    if table is None:
        raise UserError(f"tangents.{spec.name}: no validation pair has log-probs of {spec.reference!r}")
    with tempfile.TemporaryDirectory() as folder:
        facts = make_tangent(spec, local(settings, storage), table, Path(folder))
        facts["rows_in"] = table.num_rows + sum(dropped.values())
        facts["dropped"] = facts["dropped"] | dropped
        commit_folder(storage, {"": Path(folder)}, path, facts)
    return facts
