"""Selections → models, on Ray Train with DeepSpeed; and the small models a trial makes for itself.

    dataset, or corpus read ──▶ Ray Train workers: train_dpo ──checkpoints──▶ models/<name>@<fp>/training/
    through a selection                              └──exported weights──▶ models/<name>@<fp>/ , sealed last

A killed training finds its last checkpoint through Ray Train (same storage path and name) and goes on from there.
"""

from __future__ import annotations

import heapq
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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

from prefsel.config import PARTS, DpoOptions, PretrainedModel, RewardOptions, Train, Training
from prefsel.errors import PrefselError, UserError, invalid
from prefsel.lineage import Lineage, ModelRef
from prefsel.naming import Member, members
from prefsel.progress import Counter, Progress
from prefsel.session import is_own
from prefsel.tasks import over_shards
from prefsel.train.heldout import save_margins, split_margins
from prefsel.train.tables import Dataset, PairSource, Part, Selected, smallest_ids
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import commit_folder, fetch_folder, read_seal
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage


def train_node(lineage: Lineage, name: str, progress: Progress) -> list[StageReport]:
    """Every model of training `name`: one, or one per aspect and fold."""
    return [train_member(lineage, member, progress) for member in members(lineage.training(name))]


def train_member(lineage: Lineage, member: Member, progress: Progress) -> StageReport:
    """One training: pairs in, sealed model out."""
    started = time.monotonic()
    spec = lineage.training(member.training)
    path = lineage.member_path(member)
    if (done := load_summary(lineage.storage, path)) is not None:
        return done
    seal = read_seal(lineage.storage, path)
    if seal is None:  # a sealed model without a summary: the driver died after the workers were done
        settings = worker_settings(lineage, member, path)
        with progress.track(f"train {member.label}", num_steps(lineage, spec), "steps") as counter:
            run_trainer(lineage.storage, spec, path, settings, counter)
        seal = read_seal(lineage.storage, path)
    if seal is None:
        raise PrefselError(f"train {member.label}: the workers ended without a sealed model in {path}")
    lineage.storage.delete_tree(f"{path}/training")
    info = seal["info"]
    made_from = {"training": spec.name, "kind": spec.kind, "selection": spec.selection, "model": spec.model}
    if isinstance(spec, Train) and spec.reference:
        made_from["reference"] = spec.reference
    report = StageReport(
        stage="train" if isinstance(spec, Train) else "reward",
        name=member.label,
        unit="pairs",
        rows_in=info["rows_in"],
        rows_out=info["num_pairs"],
        dropped=info["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        fingerprint=path.rsplit("@", 1)[1],
        details=made_from | {"train_seconds": time.monotonic() - started} | info,
    )
    save_summary(lineage.storage, report)
    return report


def num_steps(lineage: Lineage, spec: Training) -> int:
    """Steps to expect, for the progress bar; 1 where the number of pairs is not known before the workers read them."""
    if spec.max_steps:
        return spec.max_steps
    rows = None
    if spec.selection not in PARTS:
        selected = load_summary(lineage.storage, lineage.selected_path(spec.selection))
        assert selected is not None, "a selection is complete before anything is trained on it"
        rows = selected.rows_out
    elif (eligible := load_summary(lineage.storage, lineage.eligible_folder)) is not None:
        rows = eligible.rows_out if spec.selection == "all" else eligible.dropped.get("validation", 0)
    return max(1, spec.num_epochs * -(-(rows or 0) // spec.global_batch_pairs))


def worker_settings(lineage: Lineage, member: Member, path: str) -> dict[str, Any]:
    """Everything a worker needs, as plain values."""
    spec = lineage.training(member.training)
    model = lineage.model(spec.model)
    is_dpo = isinstance(spec, Train)
    options = set(DpoOptions.model_fields if is_dpo else RewardOptions.model_fields)
    config: dict[str, Any] = spec.model_dump(include=options)
    config |= {key: model.settings[key] for key in ("max_length", "template", "truncation")}
    config |= {"revision": model.revision, "trust_remote_code": trusts_code(lineage, spec.model)}
    settings: dict[str, Any] = {"storage": lineage.storage, "name": spec.name, "kind": spec.kind, "path": path}
    settings |= {"config": config, "pairs": pair_source(lineage, member), "model": model}
    settings |= {"holdout": None, "reference": None}
    settings["max_pairs"] = getattr(spec, "max_pairs", None)
    if isinstance(spec, Train):
        config["policy_is_reference"] = False
        settings["holdout"] = holdout_source(lineage, spec)
    if isinstance(spec, Train) and spec.reference:
        reference = lineage.model(spec.reference)
        # Tokens must be those that the stored log-probs were computed from.
        config |= {key: reference.settings[key] for key in ("max_length", "template", "truncation")}
        config |= {"reference_dtype": reference.settings["dtype"], "reference_revision": reference.revision}
        config["reference_trust_remote_code"] = trusts_code(lineage, spec.reference)
        config["policy_is_reference"] = model.identity == reference.identity
        settings["reference"] = None if config["policy_is_reference"] else reference
    return settings


def pair_source(lineage: Lineage, member: Member) -> PairSource:
    """The pairs a model is trained on.

    Raises:
        UserError: the part it is trained on is empty.
    """
    spec = lineage.training(member.training)
    reference = spec.reference if isinstance(spec, Train) else None
    divergence = spec.divergence if isinstance(spec, Train) else None
    rows: Dataset | Selected | Part
    if spec.selection in PARTS:
        reason = None if spec.selection == "all" else spec.selection
        rows = corpus_part(lineage, reference, reason, field=f"train.{spec.name}.selection")
    elif dataset := lineage.selected_dataset(spec.selection):
        rows = Dataset(lineage.storage, dataset)
    else:
        reader = lineage.reader_of([lineage.logps_scorer(reference)] if reference else [], lengths=False)
        rows = Selected(reader, tuple(lineage.catalog.shards), lineage.selected_path(spec.selection))
    return PairSource(
        rows,
        reference=reference,
        divergence=lineage.scores_folder(divergence) if divergence else None,
        aspect=member.aspect,
        fold=member.fold,
        cross_fit=spec.cross_fit,
    )


def corpus_part(lineage: Lineage, reference: str | None, reason: str | None, *, field: str) -> Part:
    """A part of the corpus with a model's log-probs.

    Raises:
        UserError: no pair is in it.
    """
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before anything is trained"
    if not (eligible.rows_out if reason is None else eligible.dropped.get(reason, 0)):
        hint = {"validation": "set split.validation, or give a source the role validation"}.get(reason or "", "")
        raise UserError(f"{field}: no pair is in the part {reason or 'all'!r}" + (f"; {hint}" if hint else ""))
    reader = lineage.reader_of([lineage.logps_scorer(reference)] if reference else [], lengths=False)
    return Part(reader, tuple(lineage.catalog.shards), reason)


def holdout_source(lineage: Lineage, spec: Train) -> PairSource | None:
    """The held-out pairs that a training is evaluated on, the first by pair_id; None when there are none."""
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    if eligible is None or not eligible.dropped.get("holdout") or not spec.max_eval_pairs:
        return None
    part = corpus_part(lineage, spec.reference, "holdout", field=f"train.{spec.name}")
    found = over_shards(_smallest_ids, lineage.catalog.shards, shared=(part, spec.max_eval_pairs))
    only = frozenset(heapq.nsmallest(spec.max_eval_pairs, itertools.chain.from_iterable(found)))
    counted = over_shards(_has_any, lineage.catalog.shards, shared=(part, only))
    shards = tuple(shard for shard, has in zip(lineage.catalog.shards, counted) if has)
    return PairSource(replace(part, shards=shards, only=only), reference=spec.reference)


def _smallest_ids(shard: ShardRef, shared: Any) -> list[bytes]:
    part, limit = shared
    return smallest_ids(part, shard, limit)


def _has_any(shard: ShardRef, shared: Any) -> bool:
    part, only = shared
    return not only.isdisjoint(part.reader.pairs(shard)["pair_id"].to_pylist())


def trusts_code(lineage: Lineage, name: str) -> bool:
    """Whether the code of a model's repository may run."""
    if name in lineage.trainings:  # exported by us: its code is the library's
        return False
    spec = lineage.model_spec(name)
    return isinstance(spec, PretrainedModel) and spec.trust_remote_code


def run_trainer(storage: Storage, spec: Training, path: str, settings: dict[str, Any], counter: Counter) -> None:
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


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker."""
    table, dropped = settings["pairs"].table()
    if table is None:
        pairs = settings["pairs"]
        lacks = f"log-probs of {pairs.reference!r}" if pairs.aspect is None else f"the aspect {pairs.aspect!r}"
        raise UserError(f"train.{settings['name']}: no pair is left to train on; {dropped or f'none has {lacks}'}")
    if settings["max_pairs"]:
        table = table.sort_by("pair_id")
        dropped |= {"over_max_pairs": max(0, table.num_rows - settings["max_pairs"])}
        table = table.slice(0, settings["max_pairs"])
    checkpoint = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {
            "model_dir": model_folder(settings["storage"], settings["model"]),
            "output_dir": folder,
            "report": partial(_report, settings["records"]),
            "resume_dir": Path(checkpoint.to_directory()) if checkpoint else None,
        }
        train = _train_policy if settings["kind"] == "dpo" else _train_reward
        result = train(settings, table, more)
        if ray.train.get_context().get_world_rank() == 0:
            _commit(settings, result, table.num_rows + sum(dropped.values()), dropped)


def _train_policy(settings: dict[str, Any], table: pa.Table, more: dict[str, Any]) -> dict[str, Any]:
    from prefsel.train.data import TrainingPairs
    from prefsel.train.deepspeed_config import DpoConfig
    from prefsel.train.loop import train_dpo

    reference = settings["reference"]
    reference_dir = None if reference is None else model_folder(settings["storage"], reference)
    rows = settings["holdout"].table()[0] if settings["holdout"] else None
    held_out = None if rows is None else TrainingPairs.from_table(rows)
    config = DpoConfig(**settings["config"], reference_dir=reference_dir)
    result = train_dpo(config, TrainingPairs.from_table(table), held_out, **more)
    prompts = {} if rows is None else dict(zip(rows["pair_id"].to_pylist(), rows["prompt_id"].to_pylist()))
    history, margins = split_margins(result["history"], result["held_out_ids"] or [], prompts)
    return result | {"history": history, "margins": margins}


def _train_reward(settings: dict[str, Any], table: pa.Table, more: dict[str, Any]) -> dict[str, Any]:
    from prefsel.train.reward_config import RewardConfig
    from prefsel.train.reward_loop import train_reward_model

    return train_reward_model(RewardConfig(**settings["config"]), table, **more)


def _report(records: Queue, record: dict[str, Any], checkpoint: Path | None) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        records.put(record)
    # Ray Train's report is a barrier that took about two seconds a step here; only checkpoints need it.
    if checkpoint is not None:
        ray.train.report(record, checkpoint=Checkpoint.from_directory(str(checkpoint)))


def _commit(settings: dict[str, Any], result: dict[str, Any], rows_in: int, dropped: dict[str, int]) -> None:
    """Copy the exported model into the workspace and seal it; adapter and Adam's moments have folders of their own."""
    from prefsel.train.export import LOGIT_TOLERANCE
    from prefsel.train.reward_export import OUTPUT_TOLERANCE

    bulky = {"model_dir", "adapter_dir", "optimizer_dir", "dropped", "held_out_ids", "margins"}
    info = {key: value for key, value in result.items() if key not in bulky}
    info |= {"dropped": dict(result["dropped"]) | dropped, "rows_in": rows_in}
    limits = LOGIT_TOLERANCE if settings["kind"] == "dpo" else OUTPUT_TOLERANCE
    info["export_tolerance"] = limits[settings["config"]["dtype"]]
    folders = {"": Path(result["model_dir"])}
    for inside in ("adapter", "optimizer"):
        if result.get(f"{inside}_dir"):
            folders[inside] = Path(result[f"{inside}_dir"])
    if result.get("margins") is not None:
        save_margins(settings["storage"], settings["path"], result["margins"])
    commit_folder(settings["storage"], folders, settings["path"], info)


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
