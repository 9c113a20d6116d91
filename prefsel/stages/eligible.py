"""Which pairs may be selected at all: splits, exclusions, duplicates across files, in one shuffle by pair_id."""

from __future__ import annotations

import time
from typing import Any

from prefsel.pairs.score_shards import committed
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.select.eligible import EligiblePass, Rules, prompt_ids, require_disjoint, shared_prompts
from prefsel.stages.shuffle import hash_shuffle
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.verify import finished


def resolve_eligible(plan: Plan, progress: Progress) -> StageReport:
    """Decide for every pair whether it may be selected, duplicates across files included.

    Raises:
        UserError: a prompt stands in a validation source and in one that is selected from.
    """
    started = time.monotonic()
    node = plan.node("eligible", "all")
    storage, catalog, folder = plan.storage, plan.catalog, node.path
    if done := finished(storage, folder):
        return done
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    rules = Rules(node.spec, excluded, held_out)
    validation = [source.name for source in catalog.sources if source.role == "validation"]
    if validation:
        aims = prompt_ids(storage, catalog, "validation")
        found = map_shards(_shared_prompts, catalog.shards, shared=(storage, rules, aims))
        require_disjoint(catalog.shards, found, validation)
    pairs = catalog.entries(storage, "pairs")
    inputs = {key: entry.content for key, entry in pairs.items()}
    work = EligiblePass(storage, rules, plan.config.duplicates.contradictions, folder, inputs)
    done_before = {key: one.info["counts"] for key, one in committed(storage, catalog, folder, inputs).items()}
    dropped = hash_shuffle(work, catalog.shards, progress, "eligible", done=done_before)
    rows_out = dropped.pop("eligible", 0)
    report = StageReport(
        stage="eligible",
        name=node.name,
        unit="pairs",
        rows_in=sum(entry.rows for entry in pairs.values()),
        rows_out=rows_out,
        dropped=dropped,
        shards=len(catalog.shards),
        computed_shards=len(catalog.shards) - len(done_before),
        seconds=time.monotonic() - started,
        artifact=folder,
    )
    save_summary(storage, report)
    return report


def _shared_prompts(shard: ShardRef, shared: Any) -> list[bytes]:
    storage, rules, validation = shared
    pairs = Artifact(storage, shard.pairs_path).read(shard.shard, ["prompt_id"])
    return shared_prompts(pairs, shard, rules, validation)
