"""Committed scores → histograms that can be read: even bins, an edge on the cut of the rule, outliers in the end bins.

    every shard ── sketch: a few of its scores, evenly by rank ──▶ bin_edges ──▶ every shard ── counts ──▶ added up

The ledgers' own histograms are too coarse to be drawn: their bins are a sixteenth of a power of two wide, and scores
between 96 and 104 fill two of them. B: bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

SKETCH = 256
"""Scores in the sketch of a shard: a quantile is wrong by 1/512 of its pairs at most."""
MOST_BINS, FEWEST_BINS = 48, 8
REACH = 2.0
"""Bins reach so many times the width of the middle 80 % beyond it: 6.4 standard deviations of a normal distribution."""


@dataclass(frozen=True)
class Sketch:
    """A few scores of one shard, ascending, evenly by rank, the smallest and the largest among them."""

    num_scores: int
    score_K: np.ndarray
    """float64."""


@dataclass(frozen=True)
class Drawn:
    """What a task counts; pickles small."""

    storage: Storage
    scores: str
    """Folder of all scores, without the source."""
    kept: str | None
    """Folder of a selection made by them; None: only all scores are counted."""
    edges: np.ndarray
    """[B + 1], ascending."""
    is_closed_right: bool = False
    """Whether a score on an edge lies in the bin below it, as where a rule keeps what is smaller."""


def sketch(shard: ShardRef, shared: tuple[Storage, str]) -> Sketch:
    """The sketch of one shard of a folder of scores."""
    storage, folder = shared
    score_N = np.sort(_scores(storage, folder, shard))
    if len(score_N) <= SKETCH:
        return Sketch(len(score_N), score_N)
    return Sketch(len(score_N), score_N[np.linspace(0, len(score_N) - 1, SKETCH).round().astype(np.int64)])


def counts(shard: ShardRef, drawn: Drawn) -> np.ndarray:
    """How many scores of one shard, of all and of kept pairs, lie in each bin, int64 [2, B]; the ends hold the rest."""
    found = np.zeros((2, len(drawn.edges) - 1), np.int64)
    for row, folder in zip(found, (drawn.scores, drawn.kept)):
        if folder is not None:
            bin_N = np.digitize(_scores(drawn.storage, folder, shard), drawn.edges[1:-1], right=drawn.is_closed_right)
            row += np.bincount(bin_N, minlength=len(row))
    return found


def _scores(storage: Storage, folder: str, shard: ShardRef) -> np.ndarray:
    """The scores of a shard that has some, without nulls."""
    column = Artifact(storage, f"{folder}/{shard.source}").read(shard.shard, ["score"])["score"]
    return pc.drop_null(column).to_numpy()


def bin_edges(sketches: Sequence[Sketch], marks: Sequence[float] = ()) -> np.ndarray:
    """Edges of even bins over nearly all scores; some shard has one.

    Args:
        sketches: Of all shards.
        marks: Where a rule cuts; the first one inside becomes an edge, and so does a second one.

    Returns:
        The edges of 8 to 48 bins, twice the cube root of the number of scores (the Rice rule), and at most two more.
    """
    filled = [one for one in sketches if one.num_scores]
    score_K = np.concatenate([one.score_K for one in filled])
    weight_K = np.concatenate([np.full(len(one.score_K), one.num_scores / len(one.score_K)) for one in filled])
    order = np.argsort(score_K, kind="stable")
    score_K, share_K = score_K[order], np.cumsum(weight_K[order]) / weight_K.sum()
    low, high = (float(score_K[int(np.argmax(share_K >= share))]) for share in (0.1, 0.9))
    first, last = float(score_K[0]), float(score_K[-1])
    if high > low:  # else most scores are equal, and all the others are shown around them
        first, last = max(first, low - REACH * (high - low)), min(last, high + REACH * (high - low))
    if last <= first:
        first, last = first - 0.5, first + 0.5
    num_scores = sum(one.num_scores for one in filled)
    width = (last - first) / min(MOST_BINS, max(FEWEST_BINS, math.ceil(2 * num_scores ** (1 / 3))))
    inside = [mark for mark in marks if first < mark < last]
    if not inside:
        return np.linspace(first, last, round((last - first) / width) + 1)
    gap = abs(inside[1] - inside[0]) if len(inside) > 1 else inside[0] - first
    width = gap / round(gap / width) if gap > width else width
    below, above = (math.ceil(round(side / width, 9)) for side in (inside[0] - first, last - inside[0]))
    edges = inside[0] + width * np.arange(-below, above + 1)
    for mark in inside[: 2 if gap >= width else 1]:  # exactly: a score on a cut lies on its own side
        edges[np.argmin(np.abs(edges - mark))] = mark
    return edges


def histograms(drawn: Drawn, found: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """The added counts of all shards, as the page takes them: `all`, and `kept` where a selection was counted."""
    all_B, kept_B = np.sum(found, axis=0)
    parts: Mapping[str, np.ndarray] = {"all": all_B} | ({} if drawn.kept is None else {"kept": kept_B})
    return {name: {"edges": drawn.edges.tolist(), "counts": part.tolist()} for name, part in parts.items()}
