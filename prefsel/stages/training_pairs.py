"""Which pairs a training reads: those of its selection or part, and the held-out ones it is evaluated on."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from typing import Any

from prefsel.config import PARTS
from prefsel.errors import UserError
from prefsel.pairs.reader import PairReader
from prefsel.plan.columns import pair_reader, reference_scorer
from prefsel.plan.node import Node
from prefsel.plan.nodes import writes_dataset
from prefsel.plan.plan import Plan
from prefsel.stages.tasks import map_shards
from prefsel.train.pair_source import Dataset, Mixed, PairSource, SelectionPairs, SplitPairs, smallest_ids
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.manifest import load_summary


def pair_source(plan: Plan, node: Node) -> PairSource:
    """The pairs a model is trained on.

    Raises:
        UserError: the part it is trained on is empty.
    """
    spec, member = node.spec, node.member
    own = _rows(plan, spec, spec.selection)
    return PairSource(
        Mixed((own, _rows(plan.root, spec, spec.mixed_with))) if spec.mixed_with else own,
        reference=spec.reference,
        divergence=plan.node("scores", spec.divergence).path if spec.divergence else None,
        weight=plan.node("scores", spec.weight).path if spec.weight else None,
        aspect=member.aspect,
        fold=member.fold,
        cross_fit=spec.cross_fit,
    )


def _rows(plan: Plan, spec: Any, name: str) -> Dataset | SelectionPairs | SplitPairs:
    """The rows of a selection, or of a part, of a plan's corpus."""
    if name in PARTS:
        reason = None if name == "all" else name
        return corpus_part(plan, spec.reference, reason, field=f"train.{spec.name}.selection")
    if writes_dataset(plan, name):
        return Dataset(plan.storage, plan.node("dataset", name).path)
    return SelectionPairs(
        _logps_reader(plan, spec.reference), tuple(plan.catalog.shards), plan.node("selection", name).path
    )


def _logps_reader(plan: Plan, reference: str | None) -> PairReader:
    """A reader of pairs with the log-probs of a reference, if there is one."""
    return pair_reader(plan, [reference_scorer(plan, reference)] if reference else [], lengths=False)


def corpus_part(plan: Plan, reference: str | None, reason: str | None, *, field: str) -> SplitPairs:
    """A part of the corpus with a model's log-probs.

    Raises:
        UserError: no pair is in it.
    """
    eligible = load_summary(plan.storage, plan.node("eligible", "all").path)
    assert eligible is not None, "eligibility is complete before anything is trained"
    if not (eligible.rows_out if reason is None else eligible.dropped.get(reason, 0)):
        hint = {"validation": "set split.validation, or give a source the role validation"}.get(reason or "", "")
        raise UserError(f"{field}: no pair is in the part {reason or 'all'!r}" + (f"; {hint}" if hint else ""))
    return SplitPairs(_logps_reader(plan, reference), tuple(plan.catalog.shards), reason)


def holdout_source(plan: Plan, spec: Any) -> PairSource | None:
    """The held-out pairs that a training is evaluated on, the first by pair_id; None when there are none.

    Those of a round are the corpus', where it has the log-probs of the round's reference.
    """
    if plan.made is not None:
        known = {one.reference_model for one in plan.root.scorers}
        return holdout_source(plan.root, spec) if spec.reference in known else None
    eligible = load_summary(plan.storage, plan.node("eligible", "all").path)
    if eligible is None or not eligible.dropped.get("holdout") or not spec.max_eval_pairs:
        return None
    part = corpus_part(plan, spec.reference, "holdout", field=f"train.{spec.name}")
    shards = plan.catalog.shards
    found = map_shards(_smallest_ids, shards, shared=(part, spec.max_eval_pairs))
    only = frozenset(heapq.nsmallest(spec.max_eval_pairs, itertools.chain.from_iterable(found)))
    counted = map_shards(_has_any, shards, shared=(part, only))
    with_some = tuple(shard for shard, has in zip(shards, counted) if has)
    return PairSource(replace(part, shards=with_some, only=only), reference=spec.reference)


def _smallest_ids(shard: ShardRef, shared: Any) -> list[bytes]:
    part, limit = shared
    return smallest_ids(part, shard, limit)


def _has_any(shard: ShardRef, shared: Any) -> bool:
    part, only = shared
    return not only.isdisjoint(part.reader.pairs(shard)["pair_id"].to_pylist())
