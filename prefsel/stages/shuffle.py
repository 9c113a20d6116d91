"""Decisions about rows that share a key, wherever in the corpus they stand: a hash-partitioned pass on Ray.

shards ─ rows by partition of their key ─▶ partitions ─ drops by shard ─▶ shards: commit
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import ray

from prefsel.plugins.failures import prepared
from prefsel.progress import Progress
from prefsel.stages.tasks import draining, unwrap
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


def hash_shuffle(work: HashPass, shards: Sequence[ShardRef], progress: Progress, label: str) -> list[dict[str, int]]:
    """Run a pass: chunks of shards send each partition its rows, partitions send each chunk their drops.

    The driver holds references only; returns the counts of the chunks.
    """
    num_parts = num_partitions(shards)
    chunks = [[shards[i] for i in part] for part in np.array_split(np.arange(len(shards)), num_parts)]
    shared = ray.put((work, num_parts, [chunk[-1].number for chunk in chunks]))
    # With one part Ray would wrap the single return value; a list of references keeps both cases alike.
    send = ray.remote(num_returns=num_parts)(prepared(_send_chunk))
    settle = ray.remote(num_returns=num_parts)(prepared(_settle_partition))
    commit = ray.remote(prepared(_commit_chunk))
    sent = [_as_list(send.remote(chunk, shared)) for chunk in chunks]
    drops = [_as_list(settle.remote(shared, *[row[p] for row in sent])) for p in range(num_parts)]
    done = [commit.remote(chunk, shared, *[d[c] for d in drops]) for c, chunk in enumerate(chunks)]
    counts = []
    references = [*done, *itertools.chain.from_iterable([*drops, *sent])]
    with progress.track(label, len(done), "parts") as counter, draining(references):
        for reference in done:
            counts.append(unwrap(reference))
            counter.advance()
    return counts


def _as_list(references: Any) -> list[Any]:
    return references if isinstance(references, list) else [references]


def _one_or_many(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _send_chunk(chunk: list[ShardRef], shared: Any) -> Any:
    work, num_parts, _ = shared
    by_shard = [work.send(shard, num_parts) for shard in chunk]
    return _one_or_many([work.merge(sent[p] for sent in by_shard) for p in range(num_parts)])


def _settle_partition(shared: Any, *sent: Any) -> Any:
    work, _, ends = shared
    drops = work.settle(work.merge(sent))
    chunk_M = np.searchsorted(ends, drops.shard_M)
    return _one_or_many([drops.take(chunk_M == number) for number in range(len(ends))])


def _commit_chunk(chunk: list[ShardRef], shared: Any, *drops: Any) -> dict[str, int]:
    work = shared[0]
    return merge_counts(work.commit(shard, drops) for shard in chunk)
