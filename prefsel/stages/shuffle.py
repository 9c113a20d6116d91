"""Decisions about rows that share a key, wherever in the corpus they stand: a hash-partitioned pass on Ray.

shards ─ rows by partition of their key ─▶ partitions ─ drops by shard ─▶ shards: commit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray

from prefsel.plugins.failures import prepared
from prefsel.progress import Progress
from prefsel.stages.tasks import Halt, unwrap
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import merge_counts

MAX_PARTITIONS = 64
"""Of a hash-partitioned pass: 64 x 64 references at the driver, whatever the corpus."""


class HashPass(Protocol):
    """A decision about rows of all shards that share a key."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[Any]:
        """The rows of a shard, by partition of their key."""

    def merge(self, sent: Any) -> Any:
        """Rows of one partition, from several shards."""

    def settle(self, rows: Any) -> Any:
        """What a partition decides about rows: `shard_M`, and `take` for some of them."""

    def commit(self, shard: ShardRef, drops: Sequence[Any]) -> dict[str, int]:
        """Commit a shard with what all partitions decided; returns counts."""


def num_partitions(shards: Sequence[ShardRef]) -> int:
    """How many partitions a pass over these shards has."""
    return min(MAX_PARTITIONS, len(shards))


def hash_shuffle(
    work: HashPass,
    shards: Sequence[ShardRef],
    progress: Progress,
    label: str,
    *,
    done: Mapping[str, Mapping[str, int]],
) -> dict[str, int]:
    """Run a pass: chunks of shards send each partition its rows, partitions send each chunk their drops.

    Args:
        work: The pass.
        shards: All that its decision is about.
        progress: Where it is told.
        label: What it is called there.
        done: Key of a shard that is committed already → its counts. It sends its rows, and is not committed again.

    Returns:
        The counts of all shards. The driver holds references only.
    """
    before = [dict(done[shard.key]) for shard in shards if shard.key in done]
    if len(before) == len(shards):  # or a corpus of prompts alone
        return merge_counts(before)
    num_parts = num_partitions(shards)
    chunks = [[shards[i] for i in part] for part in np.array_split(np.arange(len(shards)), num_parts)]
    halt = Halt()
    shared = ray.put((work, num_parts, [chunk[-1].number for chunk in chunks], frozenset(done), halt))
    # The first value of a task says that it went well: no data is fetched to learn that.
    send = ray.remote(num_returns=1 + num_parts)(prepared(_send_chunk))
    settle = ray.remote(num_returns=1 + num_parts)(prepared(_settle_partition))
    commit = ray.remote(prepared(_commit_chunk))
    sent = [send.remote(chunk, shared) for chunk in chunks]
    drops = [settle.remote(shared, *[parts[1 + p] for parts in sent]) for p in range(num_parts)]
    committed = [commit.remote(chunk, shared, *[parts[1 + c] for parts in drops]) for c, chunk in enumerate(chunks)]
    counts: dict[Any, dict[str, int]] = {}
    running = [*(parts[0] for parts in (*sent, *drops)), *committed]
    with progress.track(label, len(committed), "parts") as counter, halt.draining([*committed, *drops, *sent]):
        # Each as it ends: a task that waits for others learns of a failure only after all of them.
        while running:
            ready, running = ray.wait(running, num_returns=1, fetch_local=False)
            for reference in ready:
                if (counted := unwrap(reference)) is not None:
                    counts[reference] = counted
                    counter.advance()
    return merge_counts([*before, *(counts[reference] for reference in committed)])


def _send_chunk(chunk: list[ShardRef], shared: Any) -> tuple[Any, ...]:
    work, num_parts, _, _, halt = shared
    by_shard = [work.send(shard, num_parts) for shard in _unless(halt, chunk)]
    return None, *(work.merge(sent[p] for sent in by_shard) for p in range(num_parts))


def _settle_partition(shared: Any, *sent: Any) -> tuple[Any, ...]:
    work, _, ends, _, halt = shared
    halt.check()
    drops = work.settle(work.merge(sent))
    chunk_M = np.searchsorted(ends, drops.shard_M)
    return None, *(drops.take(chunk_M == number) for number in range(len(ends)))


def _commit_chunk(chunk: list[ShardRef], shared: Any, *drops: Any) -> dict[str, int]:
    work, _, _, done, halt = shared
    return merge_counts(work.commit(shard, drops) for shard in _unless(halt, chunk) if shard.key not in done)


def _unless(halt: Halt, chunk: list[ShardRef]) -> Iterator[ShardRef]:
    """The shards of a chunk, until the pass fails."""
    for shard in chunk:
        halt.check()
        yield shard
