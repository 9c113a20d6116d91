"""Which prompts a model is to answer: drawn from the corpus, each once, in shards that are named by what is in them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prefsel.errors import UserError
from prefsel.ingest.identity import hash_bits
from prefsel.plan.made import SeedPrompts
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.schema import ID, has_rest, prompts_schema
from prefsel.select.eligible import EXCLUDED, HOLDOUT, VALIDATION, Rules, base_codes, prompt_ids
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.recipes import canonical, hash_hex
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import finished

CODES = {"train": -1, "holdout": HOLDOUT, "validation": VALIDATION, "exclude": EXCLUDED}
"""What eligibility says of the prompts of a part."""


class Drawn(NamedTuple):
    """Prompts of a shard that may be answered, in the order they are drawn in."""

    hash_N: np.ndarray
    row_N: np.ndarray
    ids: list[bytes]
    total: int
    """Prompts of the part in the shard; with a count no more are drawn than could be needed."""


def seed_prompts(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Draw prompts of the corpus that was read from files: every prompt once, the smallest hashes first.

    Raises:
        UserError: none is left to draw.
    """
    started = time.monotonic()
    spec: SeedPrompts = node.spec
    storage, path = plan.storage, node.path
    if (done := finished(storage, path)) is not None:
        return done
    catalog = plan.root.catalog
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    rules = Rules(plan.root.config.split, excluded, held_out)
    shards = catalog.excluded_shards if spec.part == "exclude" else catalog.prompt_shards
    with progress.track(f"prompts {node.name}", len(shards)) as counter:
        found = map_shards(_draw, shards, shared=(storage, rules, spec), counter=counter)
    num_found, rows = sum(one.total for one in found), chosen_rows(found, spec)
    if not rows:
        used = f"; the rounds before used {spec.skip:,}" if spec.skip else ""
        raise UserError(f"prompts {node.name}: none is left of the {num_found:,} of part {spec.part!r}{used}")
    require_all_rounds(found, spec)
    work = [(shards[number], row_M) for number, row_M in rows.items()]
    entries = [one for many in map_shards(_commit, work, shared=(storage, path, spec.per_shard)) for one in many]
    report = prompts_report(node, entries, num_found, {}, time.monotonic() - started)
    save_summary(storage, report)
    return report


def require_all_rounds(found: Sequence[Drawn], spec: SeedPrompts) -> None:
    """Refuse, before the first round is trained, rounds that the last of would find too few prompts for.

    Raises:
        UserError: says how many are asked for, and how many there are.
    """
    if spec.skip or not spec.later or spec.count is None:
        return
    asked, there = spec.count + spec.later, len({prompt for one in found for prompt in one.ids})
    if there < asked:
        valid = f"{there // (asked // spec.count):,} or fewer, or fewer rounds"
        rounds = f"{asked // spec.count} rounds need {asked:,} prompts, and part {spec.part!r} has {there:,}"
        raise UserError(f"selfplay.prompts.count: got {spec.count:,}; {rounds}; valid: {valid}")


def prompts_report(
    node: Node, entries: Sequence[Entry], rows_in: int, dropped: dict[str, int], seconds: float
) -> StageReport:
    """What a set of prompts is, and of which shards; prompts that were not drawn are `not_drawn`."""
    rows_out = sum(entry.rows for entry in entries)
    if left := rows_in - rows_out - sum(dropped.values()):
        dropped = dropped | {"not_drawn": left}
    return StageReport(
        stage="prompts",
        name=node.name,
        unit="prompts",
        rows_in=rows_in,
        rows_out=rows_out,
        dropped=dropped,
        shards=len(entries),
        computed_shards=len(entries),
        seconds=seconds,
        artifact=node.path,
        details={
            "shards": [(entry.shard, entry.content) for entry in entries],
            "content": hash_hex(*(entry.content for entry in entries)),
        },
    )


def chosen_rows(found: Sequence[Drawn], spec: SeedPrompts) -> dict[int, np.ndarray]:
    """The rows of each shard that are drawn, ascending, by the shard's place.

    Args:
        found: Of each shard in order. A prompt that stands in several is taken from the first.
        spec: How many, after how many.
    """
    if not found:  # a part that no source is of
        return {}
    hash_N = np.concatenate([one.hash_N for one in found])
    row_N = np.concatenate([one.row_N for one in found])
    shard_N = np.concatenate([np.full(len(one.row_N), place) for place, one in enumerate(found)])
    ids_N = np.array([prompt for one in found for prompt in one.ids], dtype="S16")
    order_N = np.lexsort((shard_N, ids_N, hash_N))
    ids_N = ids_N[order_N]
    first_N = np.ones(len(order_N), bool)
    first_N[1:] = ids_N[1:] != ids_N[:-1]
    unique_M = order_N[first_N]
    end = None if spec.count is None else spec.skip + spec.count
    taken_K = unique_M[spec.skip : end]
    shards = np.unique(shard_N[taken_K]).tolist()
    return {number: np.sort(row_N[taken_K[shard_N[taken_K] == number]]) for number in shards}


def _draw(shard: ShardRef, shared: Any) -> Drawn:
    """The prompts of a shard that are of the part; all of them, as a count is over the whole corpus."""
    storage, rules, spec = shared
    table = Artifact(storage, f"groups/{shard.source}").read(shard.shard, ["prompt_id"])
    row_N = np.flatnonzero(base_codes(table, shard, rules) == CODES[spec.part])
    ids = table["prompt_id"].combine_chunks().take(pa.array(row_N)).to_pylist()
    hash_N = hash_bits(ids, f"draw {spec.seed} ")
    if spec.count is not None and len(ids) > (most := spec.skip + spec.count + spec.later):
        place_M = np.argsort(hash_N, kind="stable")[:most]
        return Drawn(hash_N[place_M], row_N[place_M], [ids[place] for place in place_M], len(ids))
    return Drawn(hash_N, row_N, ids, len(ids))


def _commit(item: tuple[ShardRef, np.ndarray], shared: Any) -> list[Entry]:
    """Write the drawn prompts of a shard of the corpus as shards of their own."""
    (shard, row_M), (storage, path, per_shard) = item, shared
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard, ["prompt_id", "prompt"])
    drawn = groups.take(pa.array(row_M))
    table = pa.table(
        {
            "prompt_id": drawn["prompt_id"],
            "prompt": drawn["prompt"],
            "parent_id": pa.nulls(drawn.num_rows, ID),
            "strategy": pa.nulls(drawn.num_rows, pa.string()),
        },
        schema=prompts_schema(has_rest=has_rest(groups)),
    )
    return commit_prompts(storage, path, table, per_shard)


def commit_prompts(storage: Storage, path: str, prompts: pa.Table, per_shard: int) -> list[Entry]:
    """Write prompts in shards of at most `per_shard`, named by the prompts in them and by what these were made of."""
    artifact, entries = Artifact(storage, path), []
    for start in range(0, prompts.num_rows, per_shard):
        window = prompts.slice(start, per_shard).combine_chunks()
        kept = zip(*(window[name].to_pylist() for name in ("prompt_id", "parent_id", "strategy")))
        name = digest(canonical([(id_.hex(), parent and parent.hex(), strategy) for id_, parent, strategy in kept]))[
            :16
        ]
        entries.append(artifact.commit(name, window, made_from=name, attempt=artifact.log_attempt(name)))
    return entries
