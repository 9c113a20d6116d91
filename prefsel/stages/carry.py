"""Before a column set is scored: numbers of completions that stand in other shards now than when they were scored.

    ids of shards to score ─▶ driver ─▶ shards that left the corpus: numbers of those ids ─▶ shards to score
                                                                       all of a shard: its columns, committed
                                                                       some of it: carried/, read by the actor

Only shards of an earlier corpus are looked through: in a refresh those of the run before, else those that have left.
After a file has grown, shrunk or been replaced they hold what its new windows repeat. What this very run has committed
is not among them, so a run that was killed and goes on finds the same numbers, and its bytes are those of one that was
not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from prefsel.plan.columns import column_names
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.score.carried import Numbers, completion_ids, ids_of, joined
from prefsel.score.shards import commit_scored
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact

MAX_IDS = 4_000_000
"""Completions that are looked for in one pass: 64 MB at the driver, and 16 bytes and their numbers for those found."""
CARRIED = "carried"
IDS = "completions.list.element.completion_id"


def carry_over(
    plan: Plan, node: Node, shards: Sequence[ShardRef], groups: Mapping[str, Entry], progress: Progress
) -> int:
    """Commit the columns of shards all of whose completions have numbers, and leave the rest for the actors to read.

    Args:
        plan: Of the corpus.
        node: A column set.
        shards: Which it lacks.
        groups: Ledger entries of the groups, by shard key.
        progress: Where it is told.

    Returns:
        How many completions had their numbers already.
    """
    if not node.spec.is_by_completion or plan.made is not None or not (former := _former_shards(plan, node)):
        return 0
    names, total, committed = tuple(column_names(plan, node.spec)), 0, 0
    with progress.track(f"carry over {node.name}", len(shards), "shards") as counter:
        for part in _parts(shards, groups):
            wanted = np.unique(np.concatenate(map_shards(_ids, part, shared=plan.storage)))
            found = map_shards(_numbers, former, shared=(plan.storage, node.path, names, wanted))
            known = Numbers.merged(found)
            items = [(shard, groups[shard.key].content) for shard in part]
            if len(known.ids_N):
                counts = map_shards(_commit, items, shared=(plan.storage, node.path, names, known))
                total += sum(carried for carried, _ in counts)
                committed += sum(is_whole for _, is_whole in counts)
            counter.advance(len(part))
    if total:
        told = f"{total:,} completions have their numbers already, {committed:,} of {len(shards):,} shards are whole"
        progress.line(f"score     {node.name}: {told}")
    return total


def carried_folder(node: Node) -> str:
    """Where numbers wait for the actors that score the rest of a shard."""
    return f"{CARRIED}/{node.path.removeprefix('columns/')}"


def _former_shards(plan: Plan, node: Node) -> list[ShardRef]:
    """Shards of a column set that were scored for an earlier corpus; their sources may be gone."""
    live = {shard.key for shard in plan.catalog.shards} - plan.former_shards
    found = []
    for source in plan.storage.folders(node.path):
        artifact = Artifact(plan.storage, f"{node.path}/{source}")
        found += [
            ShardRef(source, shard, "", 0) for shard in sorted(artifact.there()) if f"{source}/{shard}" not in live
        ]
    return found


def _parts(shards: Sequence[ShardRef], groups: Mapping[str, Entry]) -> Iterator[list[ShardRef]]:
    """The shards in parts whose completions are few enough to be looked for at once; a group has two as a rule."""
    part, size = list[ShardRef](), 0
    for shard in shards:
        rows = 2 * groups[shard.key].rows
        if part and size + rows > MAX_IDS:
            yield part
            part, size = [], 0
        part.append(shard)
        size += rows
    if part:
        yield part


def _ids(shard: ShardRef, storage: Any) -> np.ndarray:
    """The completion_ids of a shard of groups, each once."""
    table = Artifact(storage, f"groups/{shard.source}").read(shard.shard, [IDS])
    return np.unique(completion_ids(table))


def _numbers(shard: ShardRef, shared: Any) -> Numbers:
    """The numbers of wanted completions in a shard of columns."""
    storage, folder, names, wanted = shared
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    ids_N = np.unique(
        ids_of(pc.list_flatten(artifact.read(shard.shard, ["completion_ids"])["completion_ids"].combine_chunks()))
    )
    if not np.isin(ids_N, wanted, assume_unique=True).any():
        empty = np.empty(0, "S16")
        return Numbers(empty, empty, np.empty((0, len(names))))
    numbers = Numbers.of(artifact.read(shard.shard), names)
    return numbers.take(np.flatnonzero(np.isin(numbers.ids_N, wanted)))


def _commit(item: tuple[ShardRef, str], shared: Any) -> tuple[int, bool]:
    """Commit a shard all of whose completions are known; otherwise keep what is known of it for the actor.

    Returns:
        How many completions of it are known, and whether that is all.
    """
    (shard, made_from), (storage, folder, names, known) = item, shared
    started = time.monotonic()
    ids_N = completion_ids(Artifact(storage, f"groups/{shard.source}").read(shard.shard, [IDS]))
    place_N = known.places(ids_N)
    mine = known.take(np.unique(place_N[place_N >= 0]))
    count = int((place_N >= 0).sum())
    if not count:
        return 0, False
    if count < len(ids_N):
        artifact = Artifact(storage, f"{CARRIED}/{folder.removeprefix('columns/')}/{shard.source}")
        attempt = artifact.log_attempt(shard.shard)
        artifact.commit(shard.shard, mine.to_table(names), made_from=made_from, attempt=attempt)
        return count, False
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    seconds = time.monotonic() - started
    scored = joined(groups, mine, names)
    commit_scored(artifact, shard, groups, scored, made_from=made_from, attempt=attempt, seconds=seconds, carried=count)
    return count, True
