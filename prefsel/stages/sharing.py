"""Which scorers go through the shards together: causal models that need the same tokens and fit into memory together.

policy, reference ─ same tokens? both fit? ─► one pool that reads, tokenises and packs once; else one after another
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from prefsel.config import Pool
from prefsel.progress import Progress
from prefsel.score.job import Job
from prefsel.stages.pool import fitting_actors, gpus_per_actor
from prefsel.stages.tasks import unwrap
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.storage import Storage

WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model that its configuration and tokenizer are read from."""
MEMORY_SHARE = 0.6
"""Of an actor's memory for the weights of all its models; the rest is for activations and shards."""


def shared_passes(jobs: Sequence[Job], storage: Storage, num_shards: int, progress: Progress) -> list[list[Job]]:
    """The jobs in their order, those that share a pass put together."""
    by_tokens: dict[Any, list[Job]] = {}
    for job in jobs:
        by_tokens.setdefault(sharing_key(job) or id(job), []).append(job)
    passes: list[list[Job]] = []
    for alike in by_tokens.values():
        if len(alike) == 1:
            passes.append(alike)
            continue
        for same in _by_tokenizer(alike, storage).values():
            passes += _by_memory(same, storage, num_shards, progress)
    return passes


def sharing_key(job: Job) -> tuple[Any, ...] | None:
    """What jobs that share a pass have in common, as far as the configuration says; None: this one never does."""
    scorer = job.scorer
    if not scorer.can_share_pass:
        return None
    if len(job.models) != 1 or job.cross_fit is not None:
        return None
    settings = job.models[0][1]
    if settings["gpus_per_replica"] != 1 or settings["max_length"] is None:
        return None
    same = ("template", "max_length", "truncation")
    return scorer.pool.model_dump_json(), scorer.token_budget, *(settings[name] for name in same)


def _by_tokenizer(jobs: Sequence[Job], storage: Storage) -> dict[Any, list[Job]]:
    from prefsel.models.loading import load_tokenizer
    from prefsel.score.multi_model import tokenizer_key

    found: dict[Any, list[Job]] = {}
    for job in jobs:
        settings = without_weights(job, storage)
        tokenizer = load_tokenizer(
            settings["path"], revision=settings["revision"], trust_remote_code=settings["trust_remote_code"]
        )
        found.setdefault(tokenizer_key(tokenizer) or id(job), []).append(job)
    return found


def without_weights(job: Job, storage: Storage) -> dict[str, Any]:
    """Loading arguments whose path holds the configuration and the tokenizer; a remote workspace keeps the weights."""
    settings = dict(job.models[0][1])
    if not settings["made_here"]:
        return settings
    return settings | {"path": str(fetch_folder(storage, settings["path"], WITHOUT_WEIGHTS))}


def _by_memory(jobs: Sequence[Job], storage: Storage, num_shards: int, progress: Progress) -> list[list[Job]]:
    """Jobs of the same tokens, as many side by side as fit."""
    from prefsel.score.multi_model import weights_bytes

    limit = MEMORY_SHARE * memory_per_actor(jobs[0].scorer.pool, jobs[0].gpus_per_replica, num_shards)
    passes: list[list[Job]] = []
    taken = 0
    for job in jobs:
        settings = without_weights(job, storage)
        more = {name: settings[name] for name in ("revision", "trust_remote_code")}
        size = weights_bytes(settings["path"], settings["dtype"], **more)
        if passes and taken + size <= limit:
            passes[-1].append(job)
            taken += size
        else:
            passes.append([job])
            taken = size
    if len(passes) > 1:
        names = ", ".join(job.label for job in jobs)
        progress.line(f"score     {names}: not in one pass, together they exceed {limit / 2**30:.1f} GiB an actor")
    return passes


def memory_per_actor(pool: Pool, gpus_per_replica: int, num_shards: int) -> float:
    """Bytes of the device that an actor works on: its part of a GPU, or of the smallest node's memory."""
    num_gpus = gpus_per_actor(pool, gpus_per_replica)
    if num_gpus:
        return num_gpus * float(unwrap(ray.remote(num_gpus=num_gpus)(_gpu_bytes).remote()))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    size = min(pool.size or pool.max_size or fitting_actors(pool, 0), num_shards)
    on_node = max(1, min(size, *(int(node.get("CPU", 0) / pool.num_cpus) for node in nodes)))
    return min(node.get("memory", 0.0) for node in nodes) / on_node


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
