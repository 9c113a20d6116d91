"""Judged groups → pairs: which answers of a prompt are chosen and rejected, shard by shard."""

from __future__ import annotations

import time
from typing import Any

from prefsel.errors import UserError
from prefsel.pairs.pairing import make_pairs
from prefsel.plan.made import Made
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import StageReport


def pair_answers(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Make the pairs of a corpus that a model answered; its judges have scored it.

    Raises:
        UserError: no prompt gives a pair; says why.
    """
    started = time.monotonic()
    made: Made = node.spec
    storage, catalog = plan.storage, plan.catalog
    (source,) = catalog.sources
    artifact = Artifact(storage, f"pairs/{source.pairs}")
    groups = catalog.entries(storage, "groups")
    inputs = {shard.shard: groups[shard.key].content for shard in catalog.shards}
    known = artifact.done(inputs)
    pending = [shard for shard in catalog.shards if shard.shard not in known]
    folders = [plan.node("columns", label).path for label in made.judges]
    with progress.track(f"pair {node.name}", len(pending), commits=True) as counter:
        items = [(shard, inputs[shard.shard]) for shard in pending]
        map_shards(_pair_shard, items, shared=(storage, folders, made), counter=counter)
    entries = artifact.done(inputs)
    dropped = merge_counts(entry.info["dropped"] for entry in entries.values())
    rows_in = sum(entry.info["prompts"] for entry in entries.values())
    report = StageReport(
        stage="pair",
        name=node.name,
        unit="prompts",
        rows_in=rows_in,
        rows_out=rows_in - sum(dropped.values()),
        dropped=dropped,
        shards=len(catalog.shards),
        computed_shards=len(pending),
        seconds=time.monotonic() - started,
        artifact=node.path,
        details={"corpus": made.name, "pairs": sum(entry.rows for entry in entries.values()), "rewards": made.rewards},
    )
    if not report.rows_out:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "there is none"
        raise UserError(f"{made.name}: no pair is left: {rows_in:,} prompts, {lost}")
    artifact.compact()
    return report


def _pair_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    """Commit the pairs of one shard."""
    (shard, made_from), (storage, folders, made) = item, shared
    artifact = Artifact(storage, shard.pairs_path)
    attempt = artifact.log_attempt(shard.shard)
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    found = [Artifact(storage, f"{folder}/{shard.source}").read(shard.shard) for folder in folders]
    wanted = {f"rm_{name}" for name in made.rewards}
    columns = {name: one[name].to_pylist() for one in found for name in one.column_names if name in wanted}
    pairs, dropped = make_pairs(groups, columns, made.pairing)
    info = {"dropped": dropped, "prompts": groups.num_rows}
    artifact.commit(shard.shard, pairs, made_from=made_from, attempt=attempt, info=info)
