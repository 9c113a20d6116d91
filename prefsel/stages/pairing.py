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
from prefsel.schema import RESPONSES
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef, required_entries
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
        unread = [f"; {label} gave no number for {told}" for label, told in _unread(plan, made).items()]
        raise UserError(f"{made.name}: no pair is left: {rows_in:,} prompts, {lost}{''.join(unread)}")
    artifact.compact()
    return report


def _unread(plan: Plan, made: Made) -> dict[str, str]:
    """Of every judge that could not read all answers: how many, why, and the first error of its template."""
    found = {}
    (source,) = plan.catalog.sources
    for label in made.judges:
        path = f"{plan.node('columns', label).path}/{source.name}"
        entries = required_entries(plan.storage, path, [shard.shard for shard in plan.catalog.shards])
        infos = [entries[shard.shard].info for shard in plan.catalog.shards]
        dropped = merge_counts(info["dropped"] for info in infos)
        first = next((info["template_error"] for info in infos if info["template_error"]), "")
        told = ", ".join(f"{count:,} answers ({reason})" for reason, count in dropped.items())
        if told:
            found[label] = told + (f": {first}" if first else "")
    return found


def _pair_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    """Commit the pairs of one shard."""
    (shard, made_from), (storage, folders, made) = item, shared
    artifact = Artifact(storage, shard.pairs_path)
    attempt = artifact.log_attempt(shard.shard)
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    found = [Artifact(storage, f"{folder}/{shard.source}").read(shard.shard) for folder in folders]
    wanted = {f"rm_{name}" for name in made.rewards}
    columns = {name: one[name].to_pylist() for one in found for name in one.column_names if name in wanted}
    # How many tokens a response has is said by whoever wrote it, in its own tokens.
    written = [[(one["policy"], float(one["num_tokens"])) for one in many] for many in groups[RESPONSES].to_pylist()]
    by_generator = made.pairing.kind == "by_generator"
    generators = [[policy for policy, _ in many] for many in written] if by_generator else None
    has_limit = by_generator and made.pairing.max_length_difference is not None
    lengths = [[tokens for _, tokens in many] for many in written] if has_limit else None
    pairs, dropped = make_pairs(groups, columns, made.pairing, generators=generators, lengths=lengths)
    info = {"dropped": dropped, "prompts": groups.num_rows}
    artifact.commit(shard.shard, pairs, made_from=made_from, attempt=attempt, info=info)
