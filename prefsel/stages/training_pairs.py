"""Which pairs a training reads: those of its selection or part, and the held-out ones it is evaluated on."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from typing import Any

from prefsel.config import PARTS, Train
from prefsel.config.naming import Member
from prefsel.errors import UserError
from prefsel.plan.lineage import Lineage
from prefsel.stages.tasks import over_shards
from prefsel.train.pair_source import Dataset, PairSource, SelectionPairs, SplitPairs, smallest_ids
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.manifest import load_summary


def pair_source(lineage: Lineage, member: Member) -> PairSource:
    """The pairs a model is trained on.

    Raises:
        UserError: the part it is trained on is empty.
    """
    spec = lineage.training(member.training)
    reference = spec.reference if isinstance(spec, Train) else None
    divergence = spec.divergence if isinstance(spec, Train) else None
    rows: Dataset | SelectionPairs | SplitPairs
    if spec.selection in PARTS:
        reason = None if spec.selection == "all" else spec.selection
        rows = corpus_part(lineage, reference, reason, field=f"train.{spec.name}.selection")
    elif dataset := lineage.selected_dataset(spec.selection):
        rows = Dataset(lineage.storage, dataset)
    else:
        reader = lineage.reader_of([lineage.logps_scorer(reference)] if reference else [], lengths=False)
        rows = SelectionPairs(reader, tuple(lineage.catalog.shards), lineage.selected_path(spec.selection))
    return PairSource(
        rows,
        reference=reference,
        divergence=lineage.scores_folder(divergence) if divergence else None,
        aspect=member.aspect,
        fold=member.fold,
        cross_fit=spec.cross_fit,
    )


def corpus_part(lineage: Lineage, reference: str | None, reason: str | None, *, field: str) -> SplitPairs:
    """A part of the corpus with a model's log-probs.

    Raises:
        UserError: no pair is in it.
    """
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before anything is trained"
    if not (eligible.rows_out if reason is None else eligible.dropped.get(reason, 0)):
        hint = {"validation": "set split.validation, or give a source the role validation"}.get(reason or "", "")
        raise UserError(f"{field}: no pair is in the part {reason or 'all'!r}" + (f"; {hint}" if hint else ""))
    reader = lineage.reader_of([lineage.logps_scorer(reference)] if reference else [], lengths=False)
    return SplitPairs(reader, tuple(lineage.catalog.shards), reason)


def holdout_source(lineage: Lineage, spec: Train) -> PairSource | None:
    """The held-out pairs that a training is evaluated on, the first by pair_id; None when there are none."""
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    if eligible is None or not eligible.dropped.get("holdout") or not spec.max_eval_pairs:
        return None
    part = corpus_part(lineage, spec.reference, "holdout", field=f"train.{spec.name}")
    found = over_shards(_smallest_ids, lineage.catalog.shards, shared=(part, spec.max_eval_pairs))
    only = frozenset(heapq.nsmallest(spec.max_eval_pairs, itertools.chain.from_iterable(found)))
    counted = over_shards(_has_any, lineage.catalog.shards, shared=(part, only))
    shards = tuple(shard for shard, has in zip(lineage.catalog.shards, counted) if has)
    return PairSource(replace(part, shards=shards, only=only), reference=spec.reference)


def _smallest_ids(shard: ShardRef, shared: Any) -> list[bytes]:
    part, limit = shared
    return smallest_ids(part, shard, limit)


def _has_any(shard: ShardRef, shared: Any) -> bool:
    part, only = shared
    return not only.isdisjoint(part.reader.pairs(shard)["pair_id"].to_pylist())
