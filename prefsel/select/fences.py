"""Fences: some exact order statistics of a shard's scores, committed with them, that bound every rank of the corpus.

    shard      s s s s s s s s s      of n sorted scores those at the positions 0, …, n − 1 of `positions`
               │       │       │
    corpus     one sort of all fences: between which two scores the row of a rank must lie, and how many rows do

A histogram of the top 16 bits puts a million rows of a normal distribution, or a whole corpus of offset scores, into
one bin; fences follow the rows, so a single round over the scores finds any threshold.

Suffixes: N rows of a shard, F fences of a shard, E fences of all shards, G different ones.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    score_G: np.ndarray
    """Fences, ascending."""
    below_G: np.ndarray
    """Rows below each fence, at most."""
    upto_G: np.ndarray
    """Rows at or below it, at least."""

    @classmethod
    def of(cls, shards: Sequence[tuple[int, str]]) -> Bounds:
        """From (number of rows, `fences`) of every shard."""
        given = [(count, np.frombuffer(base64.b64decode(text), "<f8")) for count, text in shards if count]
        if not given:
            return cls(0, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
        place = [positions(count) for count, _ in given]
        # A score at or above the fence of place p has p + 1 rows of its shard at or below it; one at or below the next
        # fence, of place q, has at most q rows below it.
        least = np.concatenate([np.diff(place_F + 1, prepend=0) for place_F in place])
        most = np.concatenate([np.diff(place_F, append=count) for (count, _), place_F in zip(given, place)])
        score_E = np.concatenate([score_F for _, score_F in given])
        order_E = np.argsort(score_E)
        score_E, least_E, most_E = score_E[order_E], least[order_E], most[order_E]
        start_G = np.flatnonzero(np.concatenate([[True], score_E[1:] != score_E[:-1]]))  # equal fences are one
        upto_G, most_G = np.cumsum(np.add.reduceat(least_E, start_G)), np.add.reduceat(most_E, start_G)
        return cls(sum(count for count, _ in given), score_E[start_G], np.cumsum(most_G) - most_G, upto_G)

    def bracket(self, rank: int) -> Bracket:
        """Where the row of an ascending rank (0 is the smallest of `num_rows`) lies."""
        low = int(np.searchsorted(self.below_G, rank, side="right")) - 1
        high = int(np.searchsorted(self.upto_G, rank + 1, side="left"))
        most_inside = max(0, int(self.below_G[high] - self.upto_G[low]))
        return Bracket(float(self.score_G[low]), float(self.score_G[high]), most_inside)
