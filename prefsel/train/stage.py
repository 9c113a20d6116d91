"""Selections → models, on Ray Train with DeepSpeed; and the small models a trial makes for itself.

    dataset ──▶ Ray Train workers: train_dpo ──checkpoints──▶ models/<name>@<fp>/training/
                                    └──exported weights──▶ models/<name>@<fp>/ , sealed last

A killed training finds its last checkpoint through Ray Train (same storage path and name) and goes on from there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import ray
import ray.train
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from prefsel.config import DpoOptions, PretrainedModel, Train
from prefsel.errors import PrefselError, UserError, invalid
from prefsel.lineage import Lineage, ModelRef
from prefsel.progress import Counter, Progress
from prefsel.session import is_own
from prefsel.tasks import over_shards
from prefsel.workspace.folders import commit_folder, fetch_folder, read_seal
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import fingerprint
from prefsel.workspace.storage import Storage

REFERENCE_COLUMNS = ("reference_logps_chosen", "reference_logps_rejected")


def train(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Run every configured training that is not finished."""
    return [train_one(lineage, spec, progress) for spec in lineage.config.train]


def train_one(lineage: Lineage, spec: Train, progress: Progress) -> StageReport:
    """One DPO training: dataset in, sealed model out."""
    started = time.monotonic()
    dataset = lineage.selected_dataset(spec.selection)
    path = f"models/{spec.name}@{fingerprint(lineage.trained_recipe(spec))}"
    if (done := load_summary(lineage.storage, path)) is not None:
        return done
    seal = read_seal(lineage.storage, path)
    if seal is None:  # a sealed model without a summary: the driver died after the workers were done
        settings = worker_settings(lineage, spec, dataset, path)
        rows = read_seal(lineage.storage, dataset)
        assert rows is not None, "datasets are sealed before anything is trained on them"
        num_steps = spec.max_steps or spec.num_epochs * -(-rows["info"]["rows"] // spec.global_batch_pairs)
        with progress.track(f"train {spec.name}", num_steps, "steps") as counter:
            run_trainer(lineage.storage, spec, path, settings, counter)
        seal = read_seal(lineage.storage, path)
    if seal is None:
        raise PrefselError(f"train {spec.name}: the workers ended without a sealed model in {path}")
    lineage.storage.delete_tree(f"{path}/training")
    info = seal["info"]
    report = StageReport(
        stage="train",
        name=spec.name,
        unit="pairs",
        rows_in=info["rows_in"],
        rows_out=info["num_pairs"],
        dropped=info["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        fingerprint=path.rsplit("@", 1)[1],
        details={"selection": spec.selection, "model": spec.model, "reference": spec.reference, **info},
    )
    save_summary(lineage.storage, report)
    return report


def worker_settings(lineage: Lineage, spec: Train, dataset: str, path: str) -> dict[str, Any]:
    """Everything a worker needs, as plain values."""
    model, reference = lineage.model(spec.model), lineage.model(spec.reference)
    holdout = lineage.holdout_dataset
    config: dict[str, Any] = spec.model_dump(include=set(DpoOptions.model_fields))
    config |= {key: reference.settings[key] for key in ("max_length", "template", "truncation")}
    config |= {"revision": model.revision, "trust_remote_code": trusts_code(lineage, spec.model)}
    config |= {"reference_dtype": reference.settings["dtype"], "reference_revision": reference.revision}
    config["reference_trust_remote_code"] = trusts_code(lineage, spec.reference)
    is_reference = model.identity == reference.identity
    return {
        "storage": lineage.storage,
        "config": config | {"policy_is_reference": is_reference},
        "model": model,
        "reference": None if is_reference else reference,
        "reference_name": spec.reference,
        "dataset": dataset,
        "holdout": holdout if read_seal(lineage.storage, holdout) and spec.max_eval_pairs else None,
        "max_eval_pairs": spec.max_eval_pairs,
        "path": path,
    }


def trusts_code(lineage: Lineage, name: str) -> bool:
    """Whether the code of a model's repository may run."""
    spec = lineage.model_spec(name)
    return isinstance(spec, PretrainedModel) and spec.trust_remote_code


def run_trainer(storage: Storage, spec: Train, path: str, settings: dict[str, Any], counter: Counter) -> None:
    """Run the workers to the end under Ray Train; what worker 0 reports moves the counter."""
    have = ray.cluster_resources()
    gpus = spec.gpus_per_worker if spec.gpus_per_worker is not None else (1 if have.get("GPU") else 0)
    for kind, wanted in (("GPU", gpus * spec.workers), ("CPU", spec.cpus_per_worker * spec.workers)):
        if wanted > have.get(kind, 0) and is_own():
            raise UserError(
                f"train.{spec.name}.workers: {spec.workers} workers need {wanted:g} {kind}s, "
                f"this cluster has {have.get(kind, 0):g}"
            )
    resources = {"CPU": spec.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    records = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings | {"records": records},
        scaling_config=ScalingConfig(num_workers=spec.workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="training",
            storage_path=storage.full(path),
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.keep_checkpoints),
        ),
    )
    # In a thread, because `fit` blocks until the end and says nothing on the way; a daemon: an interrupt ends it.
    outcome: list[BaseException | None] = []
    fitting = Thread(target=lambda: outcome.append(failure_of(trainer.fit)), daemon=True)
    fitting.start()
    while fitting.is_alive():
        follow(records, counter)
    follow(records, counter)
    if not outcome:
        raise PrefselError(f"train {spec.name}: Ray Train ended with an error of its own; see its traceback above")
    error = outcome[0]
    records.shutdown()
    if isinstance(error, ray.train.TrainingFailedError):
        causes = list(getattr(error, "worker_failures", {}).values())
        known = [cause for cause in causes if isinstance(cause, PrefselError)]
        raise known[0] if known else PrefselError(f"train {spec.name}: {causes[0] if causes else error}") from error
    if error is not None:
        raise error


def failure_of(call: Callable[[], Any]) -> BaseException | None:
    """What `call` raised, to be raised again by another thread; None when it ended well."""
    try:
        call()
    except (ray.train.TrainingFailedError, RayError, PrefselError) as error:
        return error
    return None


def follow(records: Queue, counter: Counter) -> None:
    """Move the counter by the steps reported since the last call; waits a moment when there are none."""
    try:
        record = records.get(timeout=0.5)
    except Empty:
        return
    if record["event"] == "step":
        counter.advance(1, f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.2f}")


def model_folder(storage: Storage, model: ModelRef) -> str:
    """Where a worker finds a model: a local folder or a hub id."""
    return str(fetch_folder(storage, model.path)) if model.made_here else model.path


def training_table(storage: Storage, dataset: str, reference: str, limit: int | None = None) -> tuple[pa.Table, int]:
    """A dataset with the reference's log-probs under the names the loop reads, and how many rows lack them.

    With a `limit`, the rows with the smallest pair_ids: a fixed sample, whatever the file order.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder = fetch_folder(storage, dataset)
    stored = [f"logps_{reference}_{side}" for side in ("chosen", "rejected")]
    columns = ["pair_id", "prompt", "chosen", "rejected", *stored]
    tables, lacking = [], 0
    for file in sorted((folder / "data").glob("*.parquet")):
        table = pq.read_table(file, columns=columns)
        table = table.rename_columns(["pair_id", "prompt", "chosen", "rejected", *REFERENCE_COLUMNS])
        known = table.filter(pc.and_(*(pc.is_valid(table[name]) for name in REFERENCE_COLUMNS)))
        lacking += table.num_rows - known.num_rows
        tables.append(known if limit is None else known.sort_by("pair_id").slice(0, limit))
    joined = pa.concat_tables(tables)
    return joined if limit is None else joined.sort_by("pair_id").slice(0, limit), lacking


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker."""
    from prefsel.train.data import TrainingPairs
    from prefsel.train.deepspeed_config import DpoConfig
    from prefsel.train.loop import train_dpo

    storage, reference = settings["storage"], settings["reference"]
    table, lacking = training_table(storage, settings["dataset"], settings["reference_name"])
    if not table.num_rows:
        raise UserError(f"train: no pair of {settings['dataset']} has log-probs of {settings['reference_name']!r}")
    held_out = None
    if settings["holdout"]:
        rows, _ = training_table(storage, settings["holdout"], settings["reference_name"], settings["max_eval_pairs"])
        held_out = TrainingPairs.from_table(rows) if rows.num_rows else None
    reference_dir = None if reference is None else model_folder(storage, reference)
    checkpoint = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        result = train_dpo(
            DpoConfig(**settings["config"], reference_dir=reference_dir),
            TrainingPairs.from_table(table),
            held_out,
            model_dir=model_folder(storage, settings["model"]),
            output_dir=folder,
            report=partial(_report, settings["records"]),
            resume_dir=Path(checkpoint.to_directory()) if checkpoint else None,
        )
        if ray.train.get_context().get_world_rank() == 0:
            _commit(storage, settings["path"], result, table.num_rows + lacking, lacking, settings["config"]["dtype"])


def _report(records: Queue, record: dict[str, Any], checkpoint: Path | None) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        records.put(record)
    # Ray Train's report is a barrier that took about two seconds a step here; only checkpoints need it.
    if checkpoint is not None:
        ray.train.report(record, checkpoint=Checkpoint.from_directory(str(checkpoint)))


def _commit(storage: Storage, path: str, result: dict[str, Any], rows_in: int, lacking: int, dtype: str) -> None:
    """Copy the exported model into the workspace and seal it; an adapter goes into `adapter/`."""
    from prefsel.train.export import LOGIT_TOLERANCE

    dropped = dict(result["dropped"])
    if lacking:
        dropped["missing_reference_logps"] = lacking
    kept = {"history", "num_steps", "num_pairs", "num_truncated", "max_logit_difference"}
    info = {key: result[key] for key in kept} | {"dropped": dropped, "rows_in": rows_in}
    info["logit_tolerance"] = LOGIT_TOLERANCE[dtype]
    folders = {"": Path(result["model_dir"])}
    if result["adapter_dir"]:
        folders["adapter"] = Path(result["adapter_dir"])
    commit_folder(storage, folders, path, info)


# ------------------------------------------------------------------------------------------------ scratch models


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

    from prefsel.train.from_corpus import make_model, proxy_pairs

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
