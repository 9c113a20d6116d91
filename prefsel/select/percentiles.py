"""Percentiles as people are shown them: read off a histogram, and never at odds with the rule that cut it.

A histogram's bin is a sixteenth of a power of two wide, and all scores in it share its middle: 68.76 for a pair that a
top 30 % keeps, when the cut falls inside the bin. But the rank at a cut is known exactly, so a bin is split there. Each
piece has its own middle, and a pair on the kept side of a cut is never shown on the other side of it.

    bin      |---------------- 66.9 to 70.6, middle 68.76 ----------------|
    cut                                       70.01
    pieces   |------ dropped: 68.46 ----------||----- kept: 70.31 --------|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefsel.numbers.histogram import DIGIT_BITS, NUM_BINS, Histogram, order_keys
from prefsel.numbers.ranges import WORD_BITS
from prefsel.reasons import NOT_SELECTED
from prefsel.rules import Band, Top, parse_rule, rule_budget
from prefsel.select.compose import CompiledRule, compile_rule
from prefsel.workspace.manifest import StageReport


@dataclass(frozen=True)
class Pin:
    """Where a rule cuts: a score, and the percentile that parts what is kept from what is not."""

    score: float
    percentile: float


@dataclass(frozen=True)
class Percentiles:
    """The percentiles of one score, 0 to 100: the share of the counted pairs with a smaller score.

    A pair at a cut is shown the cut: of a reversed top that is the share kept, itself included, and of a band its edge,
    which numpy's definition counts in gaps between pairs. Both are off the share by less than one pair.
    """

    histogram: Histogram
    pins: tuple[Pin, ...] = ()

    @classmethod
    def of_rule(cls, histogram: Histogram, plan: CompiledRule, marks: Sequence[float], num_pairs: int) -> Percentiles:
        """Those of a rule's own score.

        Args:
            histogram: Of the score, over all pairs that have it.
            plan: Of the rule.
            marks: Where the rule cuts its own score (`derived.marks`).
            num_pairs: Pairs the rule chose from. Where it chose from fewer than have the score, because it reads others
                too, its ranks are among those, and nothing is pinned.
        """
        return cls(histogram, pins(plan, marks, num_pairs) if num_pairs == histogram.total else ())

    def of(self, score_N: np.ndarray) -> np.ndarray:
        """The percentile of each score, float64 [N]: the middle of its piece of a bin, exact at a pin."""
        whole_low_N, whole_high_N = self._bins(score_N)
        low_N, high_N = self._split(score_N, whole_low_N, whole_high_N)
        share_N = self.histogram.percentile(score_N)
        # A bin in one piece keeps its middle to the last bit: nothing moves but what a cut splits.
        row_M = np.flatnonzero((low_N != whole_low_N) | (high_N != whole_high_N))
        share_N[row_M] = (low_N[row_M] + high_N[row_M]) / 2
        return share_N

    def ranges(self, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two ends of the piece that each score lies in, [N] each."""
        return self._split(score_N, *self._bins(score_N))

    def _split(self, score_N: np.ndarray, low_N: np.ndarray, high_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for pin in self.pins:
            low_N = np.where(score_N >= pin.score, np.maximum(low_N, pin.percentile), low_N)
            high_N = np.where(score_N <= pin.score, np.minimum(high_N, pin.percentile), high_N)
        return low_N, np.maximum(low_N, high_N)

    def _bins(self, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two ends of the whole bin that each score lies in."""
        bin_N = (order_keys(score_N) >> np.uint64(WORD_BITS - DIGIT_BITS)).astype(np.intp)
        return self._ends[bin_N], self._ends[bin_N + 1]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Percentile at which every bin begins, and the last ends, float64 [65 537]."""
        dense = np.zeros(NUM_BINS + 1)
        dense[self.histogram.bins.astype(np.intp) + 1] = self.histogram.counts
        return 100.0 * np.cumsum(dense) / max(self.histogram.total, 1)


def pins(plan: CompiledRule, marks: Sequence[float], num_pairs: int) -> tuple[Pin, ...]:
    """The percentiles that a rule fixes where it cuts its own score.

    Args:
        plan: Of the rule.
        marks: Where it is cut, in the order of the plan's leaves.
        num_pairs: Pairs that the rule chose from.

    Returns:
        Of a top the share of the pairs that come after what it keeps, of a band its two edges. None of a quota, which
        has a cut per stratum, or of a number given as threshold, whose rank nobody counted.
    """
    found, left = [], list(marks)
    for leaf in plan.leaves:
        if leaf.column != plan.score or leaf.by or not left:
            continue
        here, left = (left[:2], left[2:]) if isinstance(leaf.rule, Band) else (left[:1], left[1:])
        if isinstance(leaf.rule, Band):
            found += [Pin(score, share) for score, share in zip(here, (leaf.rule.low, leaf.rule.high))]
        elif isinstance(leaf.rule, Top):
            kept = rule_budget(leaf.rule, num_pairs)
            below = kept if leaf.rule.reverse else num_pairs - kept
            found += [Pin(score, 100.0 * below / num_pairs) for score in here]
    return tuple(found)


def selection_percentiles(selection: StageReport) -> Percentiles:
    """The percentiles of the score that a selection was made by, from the report it left."""
    plan = compile_rule(parse_rule(selection.details["rule"]))
    lacking = sum(count for reason, count in selection.dropped.items() if reason != NOT_SELECTED)
    histogram = Histogram.from_json(selection.details["all_histogram"])
    return Percentiles.of_rule(histogram, plan, selection.details.get("marks", ()), selection.rows_in - lacking)
