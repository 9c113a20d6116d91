"""Mergeable moments: the same mean, variance and slope for any sharding, to about 1e-15.

A mean is kept as a sum of two floats, so that a corpus of scores around 1e9 loses nothing when shards are merged.
N: rows of a shard.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np


def two_sum(a: float, b: float) -> tuple[float, float]:
    """`a + b` rounded, and what the rounding lost (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of one column."""

    count: int = 0
    mean: float = 0.0
    mean_rest: float = 0.0
    """What `mean` lacks to the mean."""
    m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, value_N: np.ndarray) -> Moments:
        """The moments of finite float64 values."""
        if not len(value_N):
            return cls()
        with np.errstate(over="ignore", invalid="ignore"):  # see `fault`
            mean = float(value_N.mean())
            deviation_N = value_N - mean
            rest = float(deviation_N.mean())
            m2 = float(np.square(deviation_N - rest).sum())
        return cls(len(value_N), *two_sum(mean, rest), m2, float(value_N.min()), float(value_N.max()))

    @property
    def is_constant(self) -> bool:
        """Whether all values are equal. Decided by the extremes: rounding may leave a tiny `m2`."""
        return self.low >= self.high

    def fault(self) -> str:
        """Why these are not the moments of the values, in words; empty when they are.

        A sum of squares overflows when values lie more than about 1e154 apart, and loses its digits below 1e-154: the
        deviation would be infinite, and every z-score 0, or the other way round.
        """
        beyond = "overflow" if not (math.isfinite(self.mean) and math.isfinite(self.m2)) else ""
        if not self.is_constant and self.m2 < sys.float_info.min:
            beyond = "underflow"
        told = f"{self.count:,} values from {self.low:g} to {self.high:g}"
        return f"{told}: their mean or squared deviations {beyond} float64; scale them" if beyond else ""

    @property
    def std(self) -> float:
        """Population standard deviation (ddof = 0)."""
        return math.sqrt(self.m2 / self.count)

    def gap(self, other: Moments) -> float:
        """Mean of `other` minus the mean of this."""
        return (other.mean - self.mean) + (other.mean_rest - self.mean_rest)

    def to_json(self) -> dict[str, float]:
        """What `standardise` needs, and the count."""
        return {"count": self.count, "mean": self.mean, "mean_rest": self.mean_rest, "std": self.std}


def _merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of rows (Chan, Golub, LeVeque 1983)."""
    if not a.count or not b.count:
        return a if a.count else b
    count, gap = a.count + b.count, a.gap(b)
    mean, lost = two_sum(a.mean, gap * b.count / count)
    mean, rest = two_sum(mean, a.mean_rest + lost)
    m2 = a.m2 + b.m2 + gap * gap * (a.count * b.count / count)
    return Moments(count, mean, rest, m2, min(a.low, b.low), max(a.high, b.high))


def merge_moments(many: Iterable[Moments]) -> Moments:
    """The moments of all rows of several shards, merged in the order given."""
    return reduce(_merge_moments, many, Moments())


@dataclass(frozen=True)
class Covariation:
    """Moments of two aligned columns and the sum of the products of their deviations."""

    x: Moments = Moments()
    y: Moments = Moments()
    product: float = 0.0

    @classmethod
    def of(cls, x_N: np.ndarray, y_N: np.ndarray) -> Covariation:
        """The covariation of finite float64 values."""
        x, y = Moments.of(x_N), Moments.of(y_N)
        with np.errstate(over="ignore", invalid="ignore"):  # see `fault`
            product = float(((x_N - x.mean - x.mean_rest) * (y_N - y.mean - y.mean_rest)).sum())
        return cls(x, y, product)

    def fault(self) -> str:
        """Why these are not the moments of the two columns, in words; empty when they are."""
        beyond = "the sum of their products overflows float64; scale them" if not math.isfinite(self.product) else ""
        return self.x.fault() or self.y.fault() or beyond

    @property
    def correlation(self) -> float | None:
        """Pearson's, −1 to 1; None when a column is constant or a sum overflows."""
        if self.x.m2 <= 0 or self.y.m2 <= 0 or self.fault():
            return None
        scale = self.x.m2 * self.y.m2
        if math.isfinite(scale) and scale >= sys.float_info.min:
            return self.product / math.sqrt(scale)
        return self.product / math.sqrt(self.x.m2) / math.sqrt(self.y.m2)

    @property
    def slope(self) -> float:
        """cov(x, y) / var(x), the least-squares slope of y on x."""
        return self.product / self.x.m2


def _merge_covariations(a: Covariation, b: Covariation) -> Covariation:
    if not a.x.count or not b.x.count:
        return a if a.x.count else b
    weight = a.x.count * b.x.count / (a.x.count + b.x.count)
    product = a.product + b.product + a.x.gap(b.x) * a.y.gap(b.y) * weight
    return Covariation(_merge_moments(a.x, b.x), _merge_moments(a.y, b.y), product)


def merge_covariations(many: Iterable[Covariation]) -> Covariation:
    """The covariation of all rows of several shards, merged in the order given."""
    return reduce(_merge_covariations, many, Covariation())


def standardise(value_N: np.ndarray, moments: dict[str, float]) -> np.ndarray:
    r"""$z = (v - \mathrm{mean}) / \mathrm{std}$ with the moments of the whole corpus (`Moments.to_json`)."""
    return ((value_N - moments["mean"]) - moments["mean_rest"]) / moments["std"]
