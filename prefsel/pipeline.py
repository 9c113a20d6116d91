"""Which stage needs which: the whole job, from files to a trained model and a page.

    ingest ─▶ eligible ─▶ scratch models ─▶ score ─▶ metrics ─▶ select ─▶ train ─▶ report

Every stage looks at the workspace first and does only what is missing, so running twice does nothing, running after a
kill continues, and the stages can as well be run one at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from prefsel.check import check, check_budgets
from prefsel.config import Config
from prefsel.config import Ray as RayConfig
from prefsel.errors import UserError
from prefsel.ingest.stage import ingest
from prefsel.lineage import Lineage
from prefsel.metrics.stage import score_metrics
from prefsel.progress import Progress
from prefsel.report.stage import last_report, write_report
from prefsel.score.stage import score
from prefsel.select.stage import resolve_eligible, select
from prefsel.train.stage import make_scratch_models, train
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

STAGES: dict[str, Callable[[Lineage, Progress], list[StageReport]]] = {
    "eligible": resolve_eligible,
    "scratch": make_scratch_models,
    "score": score,
    "metrics": score_metrics,
    "select": select,
    "train": train,
}
"""What follows ingest, in order; each reads what the ones before it committed."""


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    reports: list[StageReport]
    page: str | None
    """Path of the report in the workspace; None when this run stopped before the end."""
    is_new: bool
    """Whether anything was computed."""


def connect(config: RayConfig, *, quiet: bool = False) -> None:
    """Join the Ray cluster of `config.address` or `RAY_ADDRESS` (set inside a Ray job), or start a Ray of this process.

    Raises:
        UserError: sizes are given for a cluster that already runs, or nothing answers at the address.
    """
    if ray.is_initialized():
        return
    # Workers of a package imported from a checkout find it as the driver did.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    logging = {"log_to_driver": not quiet, "logging_level": "warning", "configure_logging": True}
    if address and address != "local":
        if config.num_cpus is not None or config.num_gpus is not None:
            raise UserError(f"ray.num_cpus, ray.num_gpus: cannot be set for the running cluster at {address!r}")
        try:
            ray.init(address=address, **logging)
        except ConnectionError as error:
            raise UserError(f"ray.address: no Ray cluster answers at {address!r}: {error}") from error
    else:
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            object_store_memory=int(config.object_store_gib * 2**30),
            include_dashboard=False,
            **logging,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # our own bars and lines; Ray's flood a job's log
    context.print_on_execution_start = False


def run(config: Config, workspace: str, progress: Progress, *, until: str | None = None) -> Outcome:
    """Run every stage up to and including `until` (default: all, then the report).

    Raises:
        UserError: the configuration cannot work; found before anything is started or written.
    """
    started = time.monotonic()
    storage = Storage(workspace)
    check(config, storage)
    connect(config.ray, quiet=True)
    reports: list[StageReport] = []

    def done(stage: list[StageReport]) -> None:
        reports.extend(stage)
        for report in stage:
            progress.line(report.sentence())

    done(ingest(config, storage, progress))
    lineage = Lineage(config, storage)
    for name, stage in STAGES.items():
        if until == "ingest":
            break
        done(stage(lineage, progress))
        if name == "eligible":
            check_budgets(config, reports[-1].rows_out)
        if name == until:
            break
    is_new = any(report.computed_shards for report in reports)
    if until is not None:
        return Outcome(reports, None, is_new)
    page = last_report(lineage)
    if is_new or page is None:
        page = write_report(lineage, reports, seconds=time.monotonic() - started)
        is_new = True
    return Outcome(reports, page, is_new)
