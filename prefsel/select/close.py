"""Pairs so close to a threshold that the rounding of the corpus's moments may decide about them.

Means, deviations and slopes are equal across shardings to 1e-12 relative, not to the last bit. A score made from them
that lies nearer to a threshold than that might fall on its other side in another sharding: such pairs are listed.
Equal scores are not among them: a tie is a tie in any sharding, and is decided by pair_id.

M: rows of a shard that a leaf is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.numbers.shard_values import ShardValues
from prefsel.pairs.rows import Rows
from prefsel.select.compose import Keep
from prefsel.select.thresholds import Thresholds, limits_of

TOLERANCE = 1e-12
"""Of a distance from a threshold, in the scores' unit; relative where the threshold is above 1."""
SHOWN = 20
"""So many are listed, the nearest first; all are counted."""


@dataclass(frozen=True)
class ClosePair:
    """A pair beside a threshold."""

    distance: float
    pair_id: str
    score: float
    threshold: float


@dataclass(frozen=True)
class ClosePairs:
    """Those of a shard, or of all."""

    count: int
    nearest: tuple[ClosePair, ...]

    @classmethod
    def merge(cls, many: Iterable[ClosePairs]) -> ClosePairs:
        """Those of several shards or leaves."""
        found = list(many)
        nearest = sorted(
            (pair for one in found for pair in one.nearest), key=lambda pair: (pair.distance, pair.pair_id)
        )
        return cls(sum(one.count for one in found), tuple(nearest[:SHOWN]))

    def to_json(self) -> dict[str, Any]:
        """For the record of a selection."""
        pairs = [{"pair_id": one.pair_id, "score": one.score, "threshold": one.threshold} for one in self.nearest]
        return {"tolerance": TOLERANCE, "count": self.count, "pairs": pairs}


def rests_on_moments(fitted: Mapping[str, Any]) -> bool:
    """Whether a score with these fitted numbers is one that rounding may move: it has a deviation, a slope or a share
    that was searched for in it."""
    return any(isinstance(one, Mapping) and not {"std", "slope", "passes"}.isdisjoint(one) for one in fitted.values())


def close_pairs(leaf: Keep, cut: Thresholds, rows: Rows) -> ClosePairs:
    """The pairs of a shard beside the thresholds of one leaf.

    Args:
        leaf: Of a rule.
        cut: What it decided.
        rows: Of the shard, with pair_ids.
    """
    scores, _ = rows.select(leaf.column, leaf.population, by=leaf.by, length_edges=cut.length_edges, ids=True)
    assert scores.ids_NW is not None, "whoever lists pairs has read their ids"
    found = []
    for limit_M in _limits(cut, scores):
        distance_M = np.abs(scores.value_N - limit_M)
        is_close_M = distance_M <= TOLERANCE * np.maximum(1.0, np.abs(limit_M))
        if cut.neighbours is not None or (
            cut.edges is None and cut.limits is None
        ):  # a number that a person gave knows no ties
            is_close_M &= distance_M > 0
        row_M = np.flatnonzero(is_close_M)
        nearest = row_M[np.argsort(distance_M[row_M], kind="stable")][:SHOWN]
        pairs = (
            ClosePair(float(distance_M[row]), scores.ids_NW[row].tobytes().hex(), float(scores.value_N[row]), float(at))
            for row, at in zip(nearest, limit_M[nearest])
        )
        found.append(ClosePairs(len(row_M), tuple(pairs)))
    return ClosePairs.merge(found)


def _limits(cut: Thresholds, scores: ShardValues) -> Sequence[np.ndarray]:
    """The thresholds that each row is held against, float64 [M] each; infinite where there is none."""
    if cut.limits is not None:
        return limits_of(cut.limits, scores)
    if cut.edges is not None:
        return [np.full(len(scores.value_N), edge) for edge in cut.neighbours or cut.edges[:1]]
    last = [cut.last.get(label) for label in scores.labels]
    limit_S = np.array([np.nan if one is None else one.score for one in [*last, None]])
    return [limit_S[np.zeros(len(scores.value_N), int) if scores.code_N is None else scores.code_N]]
