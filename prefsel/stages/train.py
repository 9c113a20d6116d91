"""Selections → models, on Ray Train with DeepSpeed.

    dataset, or corpus read ──▶ Ray Train workers: train ──checkpoints──▶ models/<name>@<fp>/training/
    through a selection                            └──exported weights──▶ models/<name>@<fp>/ , sealed last

A killed training finds its last checkpoint through Ray Train (same storage path and name) and goes on from there, or
begins anew where that is not what was saved.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from prefsel.config import PARTS, Training
from prefsel.config.losses import WEIGHTS
from prefsel.errors import CheckpointError, PrefselError, UserError, known_error
from prefsel.plan.models import ModelRef, find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plugins.failures import prepared
from prefsel.progress import Counter, Progress
from prefsel.stages.session import is_own
from prefsel.stages.tasks import known_errors
from prefsel.stages.training_pairs import holdout_source, pair_source
from prefsel.train.heldout import margins_folder
from prefsel.workspace.folders import TRAINING, commit_folder, fetch_folder, read_seal
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import finished, finished_folder, require_whole

if TYPE_CHECKING:
    from prefsel.train.objective import Objective

TOKENS = ("max_length", "template", "truncation")
"""Settings of a model that decide how its text is cut into tokens."""


def train(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Make one trained model: pairs in, sealed weights out.

    Raises:
        UserError: no pair is left to train on, or this Ray is too small.
        PrefselError: the workers failed.
    """
    started = time.monotonic()
    spec, path, storage = node.spec, node.path, plan.storage
    if (done := finished(storage, path)) is not None:
        for folder in (path, margins_folder(path)):  # the seal of the model says that it was measured
            require_whole(storage, folder)
        return done
    seal = finished_folder(storage, path)
    if seal is None:  # a sealed model without a summary: the driver died after the workers were done
        require_weights(plan, spec)
        Artifact(storage, path).log_attempt("training")
        settings = _worker_settings(plan, node)
        steps, note = num_steps(plan, node), f"starting workers, loading {spec.model}"
        with progress.track(f"train {node.name}", steps, "steps", note=note) as counter:
            try:
                _run_trainer(storage, spec, path, settings, counter)
            except CheckpointError as error:
                progress.line(f"train     {node.name}: begins anew, as its checkpoint cannot be continued: {error}")
                storage.delete_tree(f"{path}/{TRAINING}")
                _run_trainer(storage, spec, path, settings, counter)
        seal = read_seal(storage, path)
    if seal is None:
        raise PrefselError(f"train {node.name}: the workers ended without a sealed model in {path}")
    storage.delete_tree(f"{path}/{TRAINING}")
    info = seal["info"]
    made_from = {"training": spec.name, "kind": spec.kind, "selection": spec.selection, "model": spec.model}
    if spec.reference:
        made_from["reference"] = spec.reference
    if spec.weight:
        made_from["weight"] = spec.weight
    report = StageReport(
        stage=spec.stage,
        name=node.name,
        unit="pairs",
        rows_in=info["rows_in"],
        rows_out=info["num_pairs"],
        dropped=info["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        details=made_from | {"train_seconds": time.monotonic() - started} | info,
    )
    save_summary(storage, report)
    for reason, example in info.get("examples", {}).items():
        progress.line(f"train     {node.name}: {reason}: {example}")
    return report


def require_weights(plan: Plan, spec: Any) -> None:
    """Refuse weights that cannot be any, before a worker starts; pairs are looked at again by the workers.

    Raises:
        UserError: Names the metric, the smallest and the largest of its scores, and what is valid.
    """
    scores = load_summary(plan.storage, plan.node("scores", spec.weight).path) if spec.weight else None
    if scores is None or not scores.rows_out:
        return
    low, high = (scores.details["moments"][end] for end in ("min", "max"))
    highest, valid = WEIGHTS[spec.weighting]
    if low < 0 or high > highest:
        raise UserError(
            f"train.{spec.name}.weight: the scores of {spec.weight!r} run from {low:.6g} to {high:.6g}; valid: {valid}"
        )


def num_steps(plan: Plan, node: Node) -> int:
    """Steps to expect, for the progress bar; 1 where the number of pairs is not known before the workers read them."""
    spec = node.spec
    if spec.max_steps:
        return int(spec.max_steps)
    rows = None
    if spec.selection not in PARTS:
        selected = load_summary(plan.storage, plan.node("selection", spec.selection).path)
        assert selected is not None, "a selection is complete before anything is trained on it"
        rows = selected.rows_out
    elif (eligible := load_summary(plan.storage, plan.node("eligible", "all").path)) is not None:
        rows = eligible.rows_out if spec.selection == "all" else eligible.dropped.get("validation", 0)
    return max(1, spec.num_epochs * -(-(rows or 0) // spec.global_batch_pairs))


def _worker_settings(plan: Plan, node: Node) -> dict[str, Any]:
    """Everything a worker needs, as plain values."""
    spec, model = node.spec, find_model(plan, node.spec.model)
    config: dict[str, Any] = spec.model_dump(include=set(spec.options.model_fields))
    config |= {key: model.settings[key] for key in TOKENS}
    config |= {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    reference = find_model(plan, spec.reference) if spec.reference else None
    is_start = reference is not None and model.identity == reference.identity
    if spec.role == "policy":
        config["policy_is_reference"] = is_start
    if reference is not None:
        # Tokens must be those that the stored log-probs were computed from.
        config |= {key: reference.settings[key] for key in TOKENS}
        config |= {"reference_dtype": reference.settings["dtype"], "reference_revision": reference.revision}
        config["reference_trust_remote_code"] = reference.trust_remote_code
    return {
        "storage": plan.storage,
        "name": spec.name,
        "kind": spec.kind,
        "path": node.path,
        "config": config,
        "pairs": pair_source(plan, node),
        "holdout": holdout_source(plan, spec),
        "max_pairs": spec.max_pairs,
        "model": model,
        "reference": None if is_start else reference,
    }


def _run_trainer(storage: Storage, spec: Training, path: str, settings: dict[str, Any], counter: Counter) -> None:
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
        prepared(_worker),
        train_loop_config=settings | {"records": records},
        scaling_config=ScalingConfig(num_workers=spec.workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=TRAINING,
            storage_path=storage.full(path),
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.keep_checkpoints),
        ),
    )
    # In a thread, because `fit` blocks until the end and says nothing on the way; a daemon: an interrupt ends it.
    outcome: list[Exception | None] = []
    fitting = Thread(target=lambda: outcome.append(_failure_of(trainer.fit)), daemon=True)
    fitting.start()
    while fitting.is_alive():
        follow(records, counter)
    follow(records, counter)
    records.shutdown()
    if not outcome:
        raise PrefselError(f"train {spec.name}: Ray Train stopped its own process")
    if (error := outcome[0]) is None:
        return
    with known_errors():
        # Ray Train writes over it in place, so that a kill may cut it; its process dies of that, and says so in words.
        if "CheckpointManagerInitializationError" in str(error):
            raise CheckpointError("what Ray Train wrote down about its checkpoints is not whole, or of another version")
        if isinstance(error, ray.train.TrainingFailedError) and known_error(error) is None:
            causes = list(getattr(error, "worker_failures", {}).values())
            raise PrefselError(f"train {spec.name}: {causes[0] if causes else error}") from error
        raise error


def _failure_of(call: Callable[[], Any]) -> Exception | None:
    """What `call` raised, whatever it is, to be raised again by another thread; None when it ended well."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
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


def _model_folder(storage: Storage, model: ModelRef) -> str:
    """Where a worker finds a model: a local folder or a hub id."""
    return str(fetch_folder(storage, model.path)) if model.made_here else model.path


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker."""
    from prefsel.train import loop
    from prefsel.train.checkpoint import COMPLETE
    from prefsel.train.data import TrainingPairs
    from prefsel.train.heldout import save_margins, split_margins

    table, dropped = settings["pairs"].table()
    if table is None:
        pairs = settings["pairs"]
        lacks = f"log-probs of {pairs.reference!r}" if pairs.aspect is None else f"the aspect {pairs.aspect!r}"
        raise UserError(f"train.{settings['name']}: no pair is left to train on; {dropped or f'none has {lacks}'}")
    if settings["max_pairs"]:
        table = table.sort_by("pair_id")
        dropped |= {"over_max_pairs": max(0, table.num_rows - settings["max_pairs"])}
        table = table.slice(0, settings["max_pairs"])
    held_out = settings["holdout"].table()[0] if settings["holdout"] else None
    checkpoint = ray.train.get_checkpoint()
    resume_dir = Path(checkpoint.to_directory()) if checkpoint else None
    if resume_dir is not None and not (resume_dir / COMPLETE).is_file():
        raise CheckpointError(f"resume: {resume_dir.name} was complete, and its {COMPLETE} is gone")
    with tempfile.TemporaryDirectory() as folder:
        result = loop.train(
            _objective_of(settings),
            TrainingPairs.from_table(table),
            None if held_out is None else TrainingPairs.from_table(held_out),
            model_dir=_model_folder(settings["storage"], settings["model"]),
            output_dir=folder,
            report=partial(_report, settings["records"]),
            resume_dir=resume_dir,
        )
        margins = None
        if held_out is not None:
            prompts = dict(zip(held_out["pair_id"].to_pylist(), held_out["prompt_id"].to_pylist()))
            result["history"], margins = split_margins(result["history"], result["held_out_ids"], prompts)
        if ray.train.get_context().get_world_rank() == 0:
            if margins is not None:
                save_margins(settings["storage"], settings["path"], margins)
                result["num_margins"] = margins.num_rows
            _commit(settings, result, table.num_rows + sum(dropped.values()), dropped)


def _objective_of(settings: dict[str, Any]) -> Objective:
    """What a worker trains."""
    from prefsel.train.preference import Preference
    from prefsel.train.reward import BradleyTerry
    from prefsel.train.run_config import DpoConfig, RewardConfig

    if settings["kind"] == "reward":
        return BradleyTerry(RewardConfig(**settings["config"]))
    reference = settings["reference"]
    reference_dir = None if reference is None else _model_folder(settings["storage"], reference)
    return Preference(DpoConfig(**settings["config"], reference_dir=reference_dir))


def _report(records: Queue, record: dict[str, Any], checkpoint: Path | None) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        records.put(record)
    # Ray Train's report is a barrier that took about two seconds a step here; only checkpoints need it.
    if checkpoint is not None:
        ray.train.report(record, checkpoint=Checkpoint.from_directory(str(checkpoint)))


def _commit(settings: dict[str, Any], result: dict[str, Any], rows_in: int, dropped: dict[str, int]) -> None:
    """Copy the exported model into the workspace and seal it; adapter and Adam's moments have folders of their own."""
    from prefsel.train.export import EXPORT_TOLERANCE

    bulky = {"model_dir", "adapter_dir", "optimizer_dir", "dropped", "held_out_ids"}
    info = {key: value for key, value in result.items() if key not in bulky}
    info |= {"dropped": dict(result["dropped"]) | dropped, "rows_in": rows_in}
    info["export_tolerance"] = EXPORT_TOLERANCE[settings["config"]["dtype"]]
    folders = {"": Path(result["model_dir"])}
    for inside in ("adapter", "optimizer"):
        if result.get(f"{inside}_dir"):
            folders[inside] = Path(result[f"{inside}_dir"])
    commit_folder(settings["storage"], folders, settings["path"], info)
