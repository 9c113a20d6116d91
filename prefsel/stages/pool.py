"""Shard names through a pool of actors, on Ray Data: what runs where, and nothing of what is computed.

The dataset holds names of shards, not rows: an actor reads its own shards and commits its own columns, so a lost actor
costs the two shards it held and nothing else, and no text travels through the object store. Pools follow each other, so
two never wait for each other's GPUs.

On a Ray of this process a dead actor ends the pass, and the shards that it leaves are streamed once more, a bounded
number of times: restarts by Ray itself would have no end there (an actor too large for the memory dies for ever), and
Ray answers every pool that may restart its actors with an error line about arguments in the object store. A cluster,
whose nodes come and go, keeps Ray's restarts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.util.annotations import RayDeprecationWarning

from prefsel.config import Pool
from prefsel.errors import PrefselError, UserError
from prefsel.plugins.registry import loaded
from prefsel.progress import Progress
from prefsel.score.job import Job
from prefsel.stages.actor import SHARDS_IN_HAND, ScoreShards
from prefsel.stages.session import is_own, quiet_data
from prefsel.stages.silence import EndedWhenSilent
from prefsel.stages.tasks import known_errors
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

MAX_LOST_ACTORS = 3
"""Passes that a dead actor may end on a Ray of this process."""


class Work(Protocol):
    """What happens to shards on its way through actors."""

    @property
    def verb(self) -> str:
        """What it is called in front of its label: `score`, `generate`."""

    @property
    def label(self) -> str:
        """What it is done for."""

    @property
    def silence_s(self) -> float | None:
        """Seconds after which an actor that says nothing is ended."""

    def is_done(self, shard: ShardRef, made_from: str) -> bool:
        """Whether all of a shard is committed."""

    def stream(self, items: Sequence[tuple[ShardRef, str]]) -> Iterator[dict[str, Any]]:
        """One pass: source, shard and number of tokens of every shard, when it is committed."""


@dataclass(frozen=True)
class PoolWork:
    """What the actors of a pool do with shards."""

    verb: str
    """What it is called in front of its label: `score`, `generate`."""
    label: str
    actor: type
    """Called with a batch of one row, `source`, `shard` and `made_from`; returns it with its `tokens`, committed."""
    arguments: Mapping[str, Any]
    """Of the actor's constructor."""
    folders: tuple[str, ...]
    """What it commits to, each with a folder per source."""
    storage: Storage
    pool: Pool
    gpus_per_replica: float

    @property
    def silence_s(self) -> float | None:
        """Seconds after which an actor that says nothing is ended."""
        return self.pool.silence_s

    def is_done(self, shard: ShardRef, made_from: str) -> bool:
        """Whether all of a shard is committed."""
        artifacts = [Artifact(self.storage, f"{folder}/{shard.source}") for folder in self.folders]
        return all(artifact.is_done(shard.shard, made_from) for artifact in artifacts)

    def stream(self, items: Sequence[tuple[ShardRef, str]]) -> Iterator[dict[str, Any]]:
        """One pass: source, shard and number of tokens of every shard, when it is committed."""
        return _stream(self, items)


def scoring_work(jobs: Sequence[Job], folders: Sequence[str], storage: Storage) -> PoolWork:
    """Scorers of one pass: one, or several that share it and have the same pool; each with its column set."""
    return PoolWork(
        verb="score",
        label=" + ".join(job.label for job in jobs),
        actor=ScoreShards,
        arguments={"jobs": tuple(jobs), "storage": storage, "folders": tuple(folders), "plugins": loaded()},
        folders=tuple(folders),
        storage=storage,
        pool=jobs[0].scorer.pool,
        gpus_per_replica=jobs[0].gpus_per_replica,
    )


def run_pool(
    work: Work, items: Sequence[tuple[ShardRef, str]], progress: Progress, *, sizes: Mapping[str, int]
) -> None:
    """Stream shards, with the hashes they are made from, through an actor pool.

    Args:
        work: What is done with them.
        items: The shards.
        progress: Where it is told.
        sizes: Bytes of the input of each shard, by its key: what the time left is estimated from.

    Raises:
        PrefselError: as an actor raises it, or too many actors died.
    """
    label = f"{work.verb} {work.label}"
    left, lost = list(items), 0
    total = sum(sizes[shard.key] for shard, _ in items)
    note = f"loading {work.label}"
    with progress.track(label, len(items), note=note, total_size=total, commits=True) as counter:
        while left:
            waiting = {shard.key for shard, _ in left}
            try:
                for row in work.stream(left):
                    key = f"{row['source']}/{row['shard']}"
                    waiting.remove(key)
                    counter.advance(tokens=row["tokens"], size=sizes[key])
                return
            except RayActorError as error:
                lost += 1
                if not is_own() or lost > MAX_LOST_ACTORS:
                    hint = "too little memory is the usual cause: try a smaller pool.size or token_budget"
                    raise PrefselError(f"{label}: an actor died for the {lost}. time; {hint}; {error}") from error
            left = [item for item in left if not work.is_done(*item)]
            for key in waiting - {shard.key for shard, _ in left}:  # committed, but not told any more
                counter.advance(size=sizes[key])
            silent = f", or said nothing for {work.silence_s:g} s" if work.silence_s else ""
            told = f"{len(left)} shards left, begun again with a new one"
            progress.line(f"{work.verb:<9} {work.label}: an actor died{silent}; {told}")


def _stream(work: PoolWork, items: Sequence[tuple[ShardRef, str]]) -> Iterator[dict[str, Any]]:
    pool = work.pool
    num_gpus = gpus_per_actor(pool, work.gpus_per_replica)
    size = min(pool.size or fitting_actors(pool, num_gpus), len(items))
    require_cpus(pool, pool.min_size or size)
    scaled = {"min_size": pool.min_size, "max_size": pool.max_size} if pool.min_size else {"size": size}
    strategy = ray.data.ActorPoolStrategy(
        **scaled,
        max_tasks_in_flight_per_actor=SHARDS_IN_HAND,
        max_concurrent_calls_per_actor=SHARDS_IN_HAND,
        enable_true_multi_threading=True,
    )
    actor, arguments = work.actor, dict(work.arguments)
    if pool.silence_s is not None:
        arguments = {"actor": actor, "arguments": arguments, "silence_s": pool.silence_s}
        actor = EndedWhenSilent
    rows = [{"source": shard.source, "shard": shard.shard, "made_from": made_from} for shard, made_from in items]
    quiet_data()
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings(category=RayDeprecationWarning, action="ignore"):  # of `_without_restarts`
        dataset = shards.map_batches(
            actor,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            compute=strategy,
            num_gpus=num_gpus,
            num_cpus=pool.num_cpus,
            **_without_restarts(),
        )
    with known_errors():
        yield from dataset.iter_rows()


def _without_restarts() -> dict[str, Any]:
    """Options of a pool on a Ray of this process. Ray 2.64 takes them away; a newer one restarts actors everywhere."""
    if not is_own() or "ray_remote_args_fn" not in inspect.signature(ray.data.Dataset.map_batches).parameters:
        return {}
    return {"ray_remote_args_fn": lambda: {"max_restarts": 0, "max_task_retries": 0}}


def gpus_per_actor(pool: Pool, gpus_per_replica: float) -> float:
    """GPUs an actor reserves: what the pool says, else those of a copy of its model where there are any.

    Raises:
        UserError: the pool asks for GPUs that the cluster does not have.
    """
    have = ray.cluster_resources().get("GPU", 0)
    wanted = pool.num_gpus
    if wanted is None:
        wanted = gpus_per_replica if have else 0
    if wanted > have and is_own():
        raise UserError(f"scorers.pool.num_gpus: got {wanted:g}, but this cluster has {have:g} GPUs")
    return wanted


def require_cpus(pool: Pool, size: int, *, spare: float = 0) -> None:
    """Refuse a pool that a Ray of this process can never hold; a cluster may grow.

    Args:
        pool: What each actor reserves.
        size: How many there are.
        spare: CPUs that something else needs.

    Raises:
        UserError: names what is asked and what there is.
    """
    have = ray.cluster_resources().get("CPU", 0)
    if is_own() and size * pool.num_cpus + spare > have:
        beside = f" and {spare:g} beside them" if spare else ""
        raise UserError(f"scorers.pool.num_cpus: {size} x {pool.num_cpus:g} CPUs asked{beside}, this Ray has {have:g}")


def fitting_actors(pool: Pool, num_gpus: float) -> int:
    """As many actors as the cluster holds, at least one."""
    resources = ray.cluster_resources()
    by_cpu = max(1, int(resources.get("CPU", 1) / pool.num_cpus))
    by_gpu = int(resources.get("GPU", 0) / num_gpus) if num_gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))
