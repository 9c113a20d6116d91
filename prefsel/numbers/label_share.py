r"""How often the labels of a group are right: the maximum-likelihood share η of a mixture, exactly over shards.

    margins of a group ─▶ sums at one η (each shard) ─▶ the next η of every group (driver) ─▶ … ─▶ the fixed point

A label whose pair has margin m is right with probability p = σ(m), as far as the pair tells, and with η, as far as its
group tells; both together say w = pη / (pη + (1 − p)(1 − η)). EM's step η ← mean of w climbs the log-likelihood
Σ log(pη + (1 − p)(1 − η)), which is concave in η, so from every start inside (0, 1) it ends at the same place: the
largest likelihood, which may be η = 0 or η = 1. It may be long on its way: of 400 groups of 200 random margins half
took more than 391 steps to stand still, one in seven more than 20 000. Newton's method on the same likelihood, kept
inside what is known to hold the place, took 4 on average and at most 13. Each is a pass over the corpus, which ends
with its slowest group: 500 random groups of 2 000 margins took 13.

N: margins of a shard; M: those of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefsel.errors import PrefselError
from prefsel.numbers.columns import strata

START = 0.9
"""η before anything is known. Of a group whose margins are all 0 nothing is ever known, and it stays."""
LIMIT = 60.0
"""A logit of η beyond it is taken as η = 1 (or 0), which is 1e-26 away."""
SMALL_STEP = 1e-9
"""A step in the logit below it is the last: the next one would be about its square."""
MAX_PASSES = 100
"""Never reached: halving what is known from 120 to 1e-9 takes 37."""


@dataclass(frozen=True)
class Slope:
    """Sums over the margins of a group at one share; the derivative of its log-likelihood, and how it bends."""

    count: int
    total: float
    """Σ d, d = (2p − 1) / (pη + (1 − p)(1 − η)), rounded once."""
    rest: float
    """What `total` lacks of the sum, so that sums of shards add up to the same number however rows are dealt."""
    squares: float
    """Σ d²."""

    @classmethod
    def of(cls, margin_M: np.ndarray, logit: float) -> Slope:
        """The sums at the share of this logit; margins are finite."""
        values = _slopes(margin_M, logit)
        listed = values.tolist()
        total = math.fsum(listed)
        return cls(len(listed), total, math.fsum([*listed, -total]), math.fsum(np.square(values).tolist()))

    @classmethod
    def merge(cls, many: Iterable[Slope]) -> Slope:
        """The sums over several shards."""
        parts = list(many)
        total = math.fsum(one for part in parts for one in (part.total, part.rest))
        return cls(sum(part.count for part in parts), total, 0.0, math.fsum(part.squares for part in parts))


def _slopes(margin_M: np.ndarray, logit: float) -> np.ndarray:
    """d of every margin, float64 [M]; finite for any margin and any logit up to `LIMIT`."""
    right, wrong = _share(logit), _share(-logit)
    small_M = np.exp(-np.abs(margin_M))
    is_right_M = margin_M >= 0
    divisor_M = np.where(is_right_M, right + wrong * small_M, right * small_M + wrong)
    return np.where(is_right_M, 1.0, -1.0) * -np.expm1(-np.abs(margin_M)) / divisor_M


def _share(logit: float) -> float:
    """σ(logit)."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


def slopes_by_group(
    margin_N: np.ndarray, group_N: np.ndarray, logits: Mapping[str, float] | None = None
) -> dict[str, Slope]:
    """What a shard says of its groups.

    Args:
        margin_N: Finite.
        group_N: The name of each margin's group, text.
        logits: Of the share of each group that is asked about; None: of every group, at the start.
    """
    code_N, labels = strata([pa.chunked_array([pa.array(group_N, pa.string())])])
    start = math.log(START / (1 - START))
    ends = np.cumsum(np.bincount(code_N, minlength=len(labels)))[:-1]
    found = {}
    for (name,), row_M in zip(labels, np.split(np.argsort(code_N, kind="stable"), ends)):
        assert name is not None, "rows without a group are left out before"
        if logits is None or name in logits:
            found[name] = Slope.of(margin_N[row_M], start if logits is None else logits[name])
    return found


@dataclass(frozen=True)
class LabelShare:
    """How often the labels of a group are right."""

    right: float
    """η."""
    wrong: float
    """1 − η, with all its digits."""
    count: int


@dataclass
class _Search:
    """What is known of one group: its logit lies between `low` and `high`."""

    logit: float
    low: float = -LIMIT
    high: float = LIMIT
    is_done: bool = False

    def advance(self, slope: Slope) -> None:
        """Take one step, told the sums at `logit`."""
        mean, bend = slope.total / slope.count, slope.squares / slope.count
        if mean == 0:
            self.is_done = True
            return
        if abs(self.logit) == LIMIT and (mean > 0) == (self.logit > 0):
            self.logit, self.is_done = math.copysign(math.inf, self.logit), True
            return
        self.low, self.high = (self.logit, self.high) if mean > 0 else (self.low, self.logit)
        curvature = bend * _share(self.logit) * _share(-self.logit)
        # Squares of margins below 1e-154 are 0: nothing bends, and the logit goes to its end.
        step = mean / curvature if curvature else math.copysign(math.inf, mean)
        wanted = self.logit + step
        if abs(step) <= SMALL_STEP or self.high - self.low <= SMALL_STEP:
            self.logit, self.is_done = min(max(wanted, self.low), self.high), True
        elif self.low < wanted < self.high:
            self.logit = wanted
        elif LIMIT in (self.high, -self.low) and abs(wanted) >= LIMIT:  # is it at the end?
            self.logit = math.copysign(LIMIT, wanted)
        else:
            self.logit = (self.low + self.high) / 2


def fit_label_shares(
    first: Sequence[Mapping[str, Slope]],
    ask: Callable[[Mapping[str, float]], Sequence[Mapping[str, Slope]]],
) -> tuple[dict[str, LabelShare], int]:
    """The share of every group, and the passes over the corpus that it took.

    Args:
        first: `slopes_by_group` of every shard, at the start.
        ask: Sends the logits of some groups to every shard and returns their `slopes_by_group`, in the same order.
    """
    start = math.log(START / (1 - START))
    groups = sorted({name for part in first for name in part})
    searches = {name: _Search(start) for name in groups}
    counts: dict[str, int] = {}
    parts, passes = first, 1
    while True:
        pending = [name for name in groups if not searches[name].is_done]
        for name in pending:
            slope = Slope.merge(part[name] for part in parts if name in part)
            counts[name] = slope.count
            searches[name].advance(slope)
        logits = {name: searches[name].logit for name in pending if not searches[name].is_done}
        if not logits:
            break
        if passes == MAX_PASSES:
            raise PrefselError(f"label shares of {', '.join(logits)}: not found in {passes} passes")
        parts, passes = ask(logits), passes + 1
    found = {name: LabelShare(_share(one.logit), _share(-one.logit), counts[name]) for name, one in searches.items()}
    return found, passes
