"""Fences: some exact order statistics of a shard's scores, committed with them, that bound every rank of the corpus.

    shard      s s s s s s s s s      of n sorted scores those at the positions 0, …, n − 1 of `positions`
               │       │       │
    corpus     the fences in order: between which two scores the row of a rank must lie, and how many rows do

A histogram of the top 16 bits puts a million rows of a normal distribution, or a whole corpus of offset scores, into
one bin; fences follow the rows, so a single round over the scores finds any threshold.

Suffixes: N rows of a shard, F fences of a shard, E fences of all shards; of those near a rank M, and G different ones;
K of a sample.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLE = 8192
"""Fences that are sorted to find where a rank is."""
MAX_FENCES, ROWS_PER_FENCE = 256, 256
"""A shard of 100 000 rows has a fence every 392 rows: 2.7 KB in its ledger, and at most 0.8 % of a corpus between the
two fences around a rank."""


def positions(num_rows: int) -> np.ndarray:
    """Places of the fences in the sorted scores of a shard, int64 [F], ascending; the first and the last included."""
    num_fences = min(MAX_FENCES, 2 + num_rows // ROWS_PER_FENCE, num_rows)
    return np.arange(num_fences) * (num_rows - 1) // max(1, num_fences - 1)


def fences(score_N: np.ndarray) -> str:
    """The fences of finite scores as text for a ledger."""
    score_F = np.sort(score_N)[positions(len(score_N))] + 0.0
    return base64.b64encode(score_F.astype("<f8").tobytes()).decode()


@dataclass(frozen=True)
class Bracket:
    """Where the row of a rank must lie."""

    low: float
    high: float
    most_inside: int
    """Rows strictly between them, at most."""


@dataclass(frozen=True)
class Bounds:
    """What the fences of all shards say about the ranks of the corpus."""

    num_rows: int
    score_E: np.ndarray
    """Fences, ascending within each shard."""
    least_E: np.ndarray
    """Rows that a score surely has at or below it, from this fence on."""
    most_E: np.ndarray
    """Rows that a score may have below it, beyond this fence."""

    @classmethod
    def of(cls, shards: Sequence[tuple[int, str]]) -> Bounds:
        """From (number of rows, `fences`) of every shard."""
        given = [(count, np.frombuffer(base64.b64decode(text), "<f8")) for count, text in shards if count]
        if not given:
            return cls(0, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
        # A score at or above the fence of place p has p + 1 rows of its shard at or below it; one at or below the next
        # fence, of place q, has at most q rows below it. Shards of one size have the same places.
        place = {count: positions(count) for count in {count for count, _ in given}}
        least = {count: np.diff(place_F + 1, prepend=0) for count, place_F in place.items()}
        most = {count: np.diff(place_F, append=count) for count, place_F in place.items()}
        return cls(
            num_rows=sum(count for count, _ in given),
            score_E=np.concatenate([score_F for _, score_F in given]),
            least_E=np.concatenate([least[count] for count, _ in given]),
            most_E=np.concatenate([most[count] for count, _ in given]),
        )

    def bracket(self, rank: int) -> Bracket:
        """Where the row of an ascending rank (0 is the smallest of `num_rows`) lies."""
        first, last = self._about(rank)
        is_near_E = (self.score_E >= first) & (self.score_E <= last)
        is_before_E = self.score_E < first
        score_M, least_M, most_M = (of_E[is_near_E] for of_E in (self.score_E, self.least_E, self.most_E))
        order_M = np.argsort(score_M)
        score_M, least_M, most_M = score_M[order_M], least_M[order_M], most_M[order_M]
        start_G = np.flatnonzero(np.concatenate([[True], score_M[1:] != score_M[:-1]]))  # equal fences are one
        most_G = np.add.reduceat(most_M, start_G)
        upto_G = np.cumsum(np.add.reduceat(least_M, start_G)) + self.least_E[is_before_E].sum()
        below_G = np.cumsum(most_G) - most_G + self.most_E[is_before_E].sum()
        low = int(np.searchsorted(below_G, rank, side="right")) - 1
        high = int(np.searchsorted(upto_G, rank + 1, side="left"))
        most_inside = max(0, int(below_G[high] - upto_G[low]))
        return Bracket(float(score_M[start_G[low]]), float(score_M[start_G[high]]), most_inside)

    def _about(self, rank: int) -> tuple[float, float]:
        """Two fences around those of the bracket: sorting all fences took longer than all else the driver does.

        Guessed from a sample; when they do not enclose the rank, the outermost fences do.
        """
        # At random: every 32nd of 256 fences would be the same eight places of every shard.
        place_K = np.random.default_rng(0).integers(0, len(self.score_E), min(SAMPLE, len(self.score_E)))
        sample_K = np.sort(self.score_E[place_K])
        place, margin = rank / self.num_rows * len(sample_K), 4 * math.sqrt(len(sample_K))
        first, last = (
            float(sample_K[min(max(0, int(at)), len(sample_K) - 1)]) for at in (place - margin, place + margin)
        )
        may_be_below, are_upto = self.most_E[self.score_E < first].sum(), self.least_E[self.score_E <= last].sum()
        if may_be_below <= rank < are_upto:
            return first, last
        return -math.inf, math.inf
