"""The best prompts of a corpus → new prompts: a policy rewrites them; what it wrote is checked against all there are.

    kept pairs ─▶ pool: answers, shard by shard ─▶ candidates ─▶ which of them were seen, or must stay unseen ─▶ prompts

Texts stay where they are: ids and hashes of the candidates travel to the corpus, and those that are met come back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.errors import UserError
from prefsel.models.writer import as_they_came
from prefsel.plan.generated import prompts_before
from prefsel.plan.made import EvolvedPrompts
from prefsel.plan.models import find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.score.job import local
from prefsel.select.eligible import Rules, base_codes, prompt_ids
from prefsel.selfplay.evolve import Evolved, Excluded, first_of_each, text_key
from prefsel.selfplay.shard import (
    new_prompts,
    prompts_table,
)
from prefsel.selfplay.strategies import Strategy
from prefsel.stages.prompts import commit_prompts, prompts_report
from prefsel.stages.rewrite import answers_folder, rewrite_all, strategies_of
from prefsel.stages.score import loading
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import finished


def evolve_prompts(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Make new prompts of the prompts that a selection kept, all of which its policy is asked to rewrite.

    Raises:
        UserError: no new prompt is left; says why.
    """
    started = time.monotonic()
    spec: EvolvedPrompts = node.spec
    storage, path = plan.storage, node.path
    if (done := finished(storage, path)) is not None:
        return done
    shards = rewrite_all(plan, node, progress)
    checks = Checks(storage, answers_folder(node), strategies_of(node), spec.evolve.length_factor, _judges(plan, spec))
    found = map_shards(_candidates, shards, shared=checks)
    met = _met(plan, [one for many in found for one in many if isinstance(one, Evolved)])
    checked = map_shards(_checked, shards, shared=(checks, met))
    ways = [[one for one in many if isinstance(one, Evolved)] for many in checked]
    first = {(one.prompt_id, one.parent, one.strategy) for one in first_of_each(one for many in ways for one in many)}
    dropped = Counter(one for many in checked for one in many if isinstance(one, str))
    rows_in = sum(map(len, checked))
    dropped["seen_prompt"] += rows_in - sum(dropped.values()) - len(first)
    items = [(shard, [one for one in many if _key(one) in first]) for shard, many in zip(shards, ways)]
    work = [item for item in items if item[1]]
    shared = (storage, path, checks.answers, spec.per_shard)
    entries = [one for many in map_shards(_commit, work, shared=shared) for one in many]
    report = prompts_report(node, entries, rows_in, dict(+dropped), time.monotonic() - started)
    if not report.rows_out:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.dropped.items()))
        raise UserError(f"prompts {node.name}: no new prompt is left of {rows_in:,} rewritten ones ({lost})")
    save_summary(storage, report)
    return report


def _key(one: Evolved) -> tuple[bytes, bytes, str]:
    return one.prompt_id, one.parent, one.strategy


@dataclass(frozen=True)
class Checks:
    """What an answer is held against; pickles small."""

    storage: Storage
    answers: str
    """Folder of the answers, without the source."""
    strategies: tuple[Strategy, ...]
    length_factor: float | None
    judges: tuple[dict[str, Any], ...]
    """Loading arguments of the models that must be able to read a new prompt."""


@dataclass(frozen=True)
class Met:
    """Candidates that were met in the corpus."""

    seen: frozenset[bytes]
    """prompt_ids of any prompt there is."""
    excluded: Excluded
    """Of those that must stay unseen."""


def _judges(plan: Plan, spec: EvolvedPrompts) -> tuple[dict[str, Any], ...]:
    return tuple(loading(find_model(plan, name)) for name in spec.judges)


def _candidates(shard: ShardRef, checks: Checks) -> list[Evolved | str]:
    """The new prompts of a shard, whether or not they were seen."""
    return _checked(shard, (checks, Met(frozenset(), Excluded(frozenset(), frozenset()))))


def _checked(shard: ShardRef, shared: tuple[Checks, Met]) -> list[Evolved | str]:
    """The new prompts of a shard, or why there are none, in the order of its answers."""
    from prefsel.models.chat import Encoder
    from prefsel.models.loading import load_tokenizer

    checks, met = shared
    encoders = []
    for settings in checks.judges:
        found = local(settings, checks.storage)
        more = {key: found[key] for key in ("revision", "trust_remote_code")}
        encoders.append(Encoder(load_tokenizer(found["path"], **more), found["template"], found["max_length"]))

    def fits(messages: Sequence[Mapping[str, Any]]) -> bool:
        prompt, answer = messages[:-1], messages[-1:]
        return all(one.encode_groups([(prompt, [answer])], strict=False)[0].status == ["ok"] for one in encoders)

    answers = Artifact(checks.storage, f"{checks.answers}/{shard.source}").read(shard.shard)
    return list(
        new_prompts(
            answers,
            checks.strategies,
            length_factor=checks.length_factor,
            excluded=met.excluded,
            seen=met.seen,
            fits=fits,
        )
    )


def _met(plan: Plan, candidates: Sequence[Evolved]) -> Met:
    """Which candidates stand in the corpus, in an earlier round, or say what must stay unseen."""
    root, storage = plan.root, plan.storage
    catalog = root.catalog
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    ids = frozenset(one.prompt_id for one in candidates)
    texts = frozenset(text_key(one.messages) for one in candidates)
    shared = (storage, Rules(root.config.split, excluded, held_out), ids, texts)
    hidden = [
        ShardRef(source.name, shard, source.role, 0)
        for source in catalog.sources
        if source.role == "exclude"
        for file in source.files
        for shard in file.shards
    ]
    found = map_shards(_met_in, [*catalog.prompt_shards, *hidden], shared=shared)
    seen = {one for ids, _, _ in found for one in ids}
    for folder in prompts_before(plan):
        artifact = Artifact(storage, folder)
        for shard in artifact.entries():
            seen |= ids.intersection(artifact.read(shard, ["prompt_id"])["prompt_id"].to_pylist())
    return Met(
        frozenset(seen),
        Excluded({one for _, ids, _ in found for one in ids}, {one for _, _, texts in found for one in texts}),
    )


def _met_in(shard: ShardRef, shared: Any) -> tuple[set[bytes], set[bytes], set[bytes]]:
    """Candidates that a shard of the corpus has: their ids, and ids and texts of those that must stay unseen."""
    storage, rules, ids, texts = shared
    table = Artifact(storage, f"groups/{shard.source}").read(shard.shard, ["prompt_id", "prompt"])
    seen = ids.intersection(table["prompt_id"].to_pylist())
    is_hidden_N = np.full(table.num_rows, True)
    if shard.role != "exclude":
        is_hidden_N = base_codes(table, shard, rules) >= 0
    hidden = table.filter(is_hidden_N)
    hidden_ids = ids.intersection(hidden["prompt_id"].to_pylist())
    keys = {text_key(as_they_came(one)) for one in hidden["prompt"].to_pylist()}
    return seen, hidden_ids, keys & texts


def _commit(item: tuple[ShardRef, list[Evolved]], shared: Any) -> list[Entry]:
    (shard, evolved), (storage, path, answers, per_shard) = item, shared
    table = Artifact(storage, f"{answers}/{shard.source}").read(shard.shard)
    return commit_prompts(storage, path, prompts_table(evolved, table), per_shard)
