"""A few pairs a reader can judge: those nearest to a rule's cut, and a sample of all, wherever in the corpus they lie.

    every shard ── its candidates: row, distance to the cut, hash ──▶ pick ──▶ the shards that hold them ── texts

N: rows of a shard. M: those the rule chose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.metrics.random_control import RandomControl
from prefsel.metrics.random_control import score as hash_of
from prefsel.pairs.export import export_rows
from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_shards import ScoreReader
from prefsel.rules import parse_rule
from prefsel.schema import FLIPPED, REST
from prefsel.select.compose import CompiledRule, Keep, compile_rule
from prefsel.select.percentiles import Percentiles
from prefsel.select.thresholds import label_text
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport

KINDS = ("just kept", "just dropped", "kept", "dropped")
"""The first two are nearest to the cut, the others a sample."""
SEED = 20_261_126
"""Of the sample's hash: another one than that of random controls, or a sample of theirs would be of its first pairs."""
TEXT_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt",
    "chosen",
    "rejected",
    "source",
    "aspect",
    "score",
    "percentile",
    "stratum",
    FLIPPED,
)


@dataclass(frozen=True)
class ExamplesWanted:
    """What tasks need to find the examples of one selection; pickles small."""

    scores: ScoreReader
    plan: CompiledRule
    folder: str
    """Of the selection."""
    cuts: Mapping[str, tuple[float, ...]]
    """Where the rule cuts its score, by stratum; empty: nothing is near it."""
    length_edges: tuple[float, ...] | None
    number: Mapping[str, int]
    """Examples of each kind."""


@dataclass(frozen=True)
class Candidate:
    """A pair that may be shown."""

    distance: float
    """From the cut of its stratum, in units of the score; 0 in a sample."""
    hash: float
    """Decides among equal distances; the same for any sharding."""
    shard: int
    row: int
    score: float


def examples_wanted(scores: ScoreReader, selection: StageReport, number: int, *, is_random: bool) -> ExamplesWanted:
    """What to look for.

    Args:
        scores: A reader of every score of its rule.
        selection: The selection's report.
        number: Examples of kept pairs, and of dropped ones; one half near the cut, the other a sample.
        is_random: Whether the rule draws at random: then its cut means nothing, and there is only the sample.
    """
    details = selection.details
    plan = compile_rule(parse_rule(details["rule"]))
    edges = details.get("length_edges")
    near, sample = (number + 1) // 2, number // 2
    return ExamplesWanted(
        scores=scores,
        plan=plan,
        folder=selection.artifact,
        cuts=_cuts(plan, details),
        length_edges=tuple(edges[0]) if edges else None,
        number=dict(zip(KINDS, (0, 0, sample, sample) if is_random else (near, near, sample, sample))),
    )


def _cuts(plan: CompiledRule, details: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Of a quota one per stratum; else those of the rule's own score, which a rule of several parts may lack."""
    if isinstance(plan.keep, Keep) and plan.keep.by:
        ends = ("score", "from", "to")
        given = {label: cut for label, cut in details["thresholds"].items() if cut is not None}
        return {label: tuple(cut[end] for end in ends if end in cut) for label, cut in given.items()}
    marks = tuple(details.get("marks", ()))
    return {label_text(()): marks} if marks else {}


def candidates(shard: ShardRef, wanted: ExamplesWanted) -> dict[str, list[Candidate]]:
    """The pairs of one shard that may be shown, by kind, the best first."""
    plan = wanted.plan
    by = plan.keep.by if isinstance(plan.keep, Keep) else ()
    columns = list(dict.fromkeys((plan.score, *plan.keep.population)))
    rows = wanted.scores.rows(shard, columns, ids=True, by=by)
    found, row_M = rows.select(plan.score, plan.keep.population, by=by, length_edges=wanted.length_edges, ids=True)
    row_M = np.arange(rows.num_rows) if row_M is None else row_M
    assert found.ids_NW is not None, "they were asked for"
    hash_M = hash_of({"pair_id": found.ids_NW}, RandomControl(seed=SEED), {})
    code_M = np.zeros(len(row_M), np.int64) if found.code_N is None else found.code_N
    distance_M = np.full(len(row_M), np.inf)
    for code, label in enumerate(found.labels):
        for cut in wanted.cuts.get(label_text(label), ()):
            gap_M = np.where(code_M == code, np.abs(found.value_N - cut), np.inf)
            distance_M = np.minimum(distance_M, gap_M)
    kept = Artifact(wanted.scores.reader.storage, f"{wanted.folder}/{shard.source}").read(shard.shard, ["row"])
    is_kept_M = np.isin(row_M, kept["row"].to_numpy())

    def first(is_mine_M: np.ndarray, distance_M: np.ndarray, number: int) -> list[Candidate]:
        place_P = np.flatnonzero(is_mine_M & np.isfinite(distance_M))
        order = place_P[np.lexsort((hash_M[place_P], distance_M[place_P]))[:number]]
        columns = (distance_M, hash_M, np.full(len(row_M), shard.number), row_M, found.value_N)
        return [Candidate(*values) for values in zip(*(column[order].tolist() for column in columns))]

    anywhere_M = np.zeros(len(row_M))
    near_kept, near_dropped, kept_number, dropped_number = (wanted.number[kind] for kind in KINDS)
    return {
        "just kept": first(is_kept_M, distance_M, near_kept),
        "just dropped": first(~is_kept_M, distance_M, near_dropped),
        # A sample may hold what is shown as near the cut; as many more replace it.
        "kept": first(is_kept_M, anywhere_M, kept_number + near_kept),
        "dropped": first(~is_kept_M, anywhere_M, dropped_number + near_dropped),
    }


def pick(
    found: Sequence[Mapping[str, Sequence[Candidate]]], wanted: ExamplesWanted
) -> dict[tuple[int, int], tuple[str, Candidate]]:
    """The examples of all shards' candidates, each once: (shard number, row) → kind and candidate, in page order."""
    picked: dict[tuple[int, int], tuple[str, Candidate]] = {}
    for kind in KINDS:
        many = sorted(
            (one for part in found for one in part[kind]), key=lambda one: (one.distance, one.hash, one.shard, one.row)
        )
        new = [one for one in many if (one.shard, one.row) not in picked]
        picked |= {(one.shard, one.row): (kind, one) for one in new[: wanted.number[kind]]}
    return picked


def example_rows(item: tuple[ShardRef, Sequence[int]], shared: tuple[PairReader, str | None]) -> list[dict[str, Any]]:
    """Some pairs of one shard with their texts and numbers, in the order of the rows; turned as the selection has them.

    Args:
        item: The shard, and the rows.
        shared: A reader, and the folder of a selection that turns labels; None: all pairs are as labelled.
    """
    shard, rows = item
    reader, folder = shared
    extra = {}
    if folder is not None:
        kept = Artifact(reader.storage, f"{folder}/{shard.source}").read(shard.shard, ["row", FLIPPED])
        extra[FLIPPED] = pa.array(np.isin(rows, kept["row"].filter(kept[FLIPPED]).to_numpy()))
    table = export_rows(np.array(rows), reader.pairs(shard), reader.groups(shard), reader.flat(shard), extra)
    return [_readable(row) for row in table.to_pylist()]


def shown(kind: str, one: Candidate, row: Mapping[str, Any], percentiles: Percentiles) -> dict[str, Any]:
    """An example as the page shows it."""
    (percentile,) = percentiles.of(np.array([one.score]))
    return {"kind": kind, "score": one.score, "percentile": float(percentile), **row}


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {side: transcript(row[side]) for side in ("prompt", "chosen", "rejected")}
    numbers = {
        name: value
        for name, value in row.items()
        if name not in TEXT_COLUMNS and not name.endswith(("_max", "_min")) and value is not None
    }
    shown = {name: row[name] for name in ("pair_id", "source", "aspect", FLIPPED) if name in row}
    return shown | texts | {"numbers": numbers}


def transcript(messages: Sequence[Mapping[str, str | None]]) -> str:
    """Messages as text, with what they hold besides, such as calls; the role is named where there is more than one."""
    texts = ["\n".join(part for part in (message["content"], message.get(REST)) if part) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts))
