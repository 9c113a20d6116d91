"""Shard names through a pool of actors, on Ray Data: what runs where, and nothing of what is computed.

The dataset holds names of shards, not rows: an actor reads its own shards and commits its own columns, so a lost actor
costs the two shards it held and nothing else, and no text travels through the object store. Pools follow each other, so
two never wait for each other's GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from prefsel.config import Pool
from prefsel.errors import UserError
from prefsel.plugins.registry import loaded
from prefsel.progress import Progress
from prefsel.score.job import Job
from prefsel.stages.actor import SHARDS_IN_HAND, ScoreShards
from prefsel.stages.session import is_own
from prefsel.stages.tasks import known_errors
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.storage import Storage


def run_pool(
    jobs: Sequence[Job],
    folders: Sequence[str],
    storage: Storage,
    items: Sequence[tuple[ShardRef, str]],
    progress: Progress,
) -> None:
    """Stream shards, with the hashes they are made from, through an actor pool.

    Args:
        jobs: One, or several that share a pass; they have the same pool.
        folders: The column set of each job.
        storage: The workspace.
        items: Shards to score.
        progress: Where it is told.
    """
    pool = jobs[0].scorer.pool
    num_gpus = gpus_per_actor(pool, jobs[0].models[0][1])
    size = min(pool.size or fitting_actors(pool, num_gpus), len(items))
    require_cpus(pool, pool.min_size or size)
    scaled = {"min_size": pool.min_size, "max_size": pool.max_size} if pool.min_size else {"size": size}
    strategy = ray.data.ActorPoolStrategy(
        **scaled,
        max_tasks_in_flight_per_actor=SHARDS_IN_HAND,
        max_concurrent_calls_per_actor=SHARDS_IN_HAND,
        enable_true_multi_threading=True,
    )
    rows = [{"source": shard.source, "shard": shard.shard, "made_from": made_from} for shard, made_from in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ScoreShards,
        fn_constructor_kwargs={
            "jobs": tuple(jobs),
            "storage": storage,
            "folders": tuple(folders),
            "plugins": loaded(),
        },
        batch_size=1,
        compute=strategy,
        num_gpus=num_gpus,
        num_cpus=pool.num_cpus,
    )
    label = " + ".join(job.label for job in jobs)
    with progress.track(f"score {label}", len(rows)) as counter, known_errors():
        for _ in dataset.iter_rows():
            counter.advance()


def gpus_per_actor(pool: Pool, settings: Mapping[str, Any]) -> float:
    """GPUs an actor reserves.

    Raises:
        UserError: the pool asks for GPUs that the cluster does not have.
    """
    have = ray.cluster_resources().get("GPU", 0)
    wanted = pool.num_gpus
    if wanted is None:
        wanted = settings["gpus_per_replica"] if have else 0
    if wanted > have and is_own():
        raise UserError(f"scorers.pool.num_gpus: got {wanted:g}, but this cluster has {have:g} GPUs")
    return wanted


def require_cpus(pool: Pool, size: int) -> None:
    """Refuse a pool that a Ray of this process can never hold; a cluster may grow.

    Raises:
        UserError: names what is asked and what there is.
    """
    have = ray.cluster_resources().get("CPU", 0)
    if is_own() and size * pool.num_cpus > have:
        raise UserError(f"scorers.pool.num_cpus: {size} x {pool.num_cpus:g} CPUs asked, this Ray has {have:g}")


def fitting_actors(pool: Pool, num_gpus: float) -> int:
    """As many actors as the cluster holds, at least one."""
    resources = ray.cluster_resources()
    by_cpu = max(1, int(resources.get("CPU", 1) / pool.num_cpus))
    by_gpu = int(resources.get("GPU", 0) / num_gpus) if num_gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))
