r"""From a sample of a corpus to totals over all of it, with 95 % intervals.

    corpus = sources ─▶ windows of rows, n of them read ─▶ groups, all counted, m of M tokenised ─▶ a number y of each

What is not looked at still has a size: a group c characters, a window x bytes. Tokens go with c and attention with c²,
so y is fitted as B·(c, c²) and only its residuals e are at the mercy of the draw. A window holds the rows that begin in
a stretch of so many bytes, so every row is as likely to be met as any other, and windows are compared by their bytes.

    all read    T = B·Σ(c, c²) + M ē,                variance M² (1 − m/M) Σ(g e / (1 − h))² / m(m − 1)
    some read   ŷ_i = B·Σ(c, c²) + M_i ē_i of each,  T = X R, R = Σŷ_i / Σx_i, variance X² Σ(ŷ_i − R x_i)² / n(n − 1)x̄²

g and h weigh a residual by how far the sampled c are from all c, and by its own pull on B: without them, and with a
plain ratio to c, intervals of 150 of 6 000 groups with lognormal lengths held the truth 76 times of 100; with them 96.

Source: Särndal, Swensson and Wretman, Model Assisted Survey Sampling (1992), sections 6.6 (regression, g-weights) and
8.5 (ratio of clusters). Sources are strata: totals and variances add up, degrees of freedom after
Satterthwaite. What is read and tokenised in full has an interval of no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
Floats = npt.NDArray[np.float64]
Part = tuple[float, float, float]
"""A total, its variance, and the degrees of freedom of that."""


@dataclass(frozen=True)
class Estimate:
    """A number, and where it lies with 95 % confidence; both ends equal it where it is exact."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number that is known."""
        return cls(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether nothing of it is estimated."""
        return self.low == self.high

    def times(self, factor: float) -> Estimate:
        """The estimate of a multiple; `factor` is not negative."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def __add__(self, other: Estimate) -> Estimate:
        # Of the same sample, so their errors go together: ends add up, which is never too narrow.
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)


NOTHING = Estimate.exact(0.0)


def total(many: Iterable[Estimate]) -> Estimate:
    """The sum of estimates from one sample."""
    return sum(many, NOTHING)


@dataclass(frozen=True)
class WindowRead:
    """What was counted in one window, without a tokenizer."""

    size: float
    """x: bytes that it takes of its source."""
    num_groups: int
    """M_i."""
    characters: float
    """Σc over its groups, prompts and completions."""
    squares: float
    """Σc² over its groups."""
    num_completions: int
    num_pairs: int
    eligible_pairs: int
    """Of prompts that no split keeps out, in sources that are selected from."""
    stored_bytes: int
    """Of its groups and pairs as a workspace keeps them."""


@dataclass(frozen=True)
class Survey:
    """What was read of one source: windows, and which of their groups are looked at closely."""

    windows: Sequence[WindowRead]
    size: float
    """X: bytes of the whole source, in the unit of the windows."""
    is_read: bool
    """Whether the windows are all of it."""
    window_m: npt.NDArray[np.int64]
    """Of each sampled group, the window it stands in."""
    characters_m: Floats
    """c of each sampled group."""

    def counted(self, count: Callable[[WindowRead], float]) -> Part:
        """The total of what is known of every window that was read."""
        return self._over_windows(np.array([count(one) for one in self.windows], np.float64))

    def sampled(self, y_m: Floats) -> Part:
        """The total of a number of every sampled group."""
        m, num_groups = len(y_m), sum(one.num_groups for one in self.windows)
        if not m:
            return 0.0, 0.0, math.inf
        if m == num_groups:  # every group was looked at: windows are known, whatever the ratio
            return self._over_windows(np.bincount(self.window_m, y_m, len(self.windows)).astype(np.float64))
        X_m2 = np.stack([self.characters_m, self.characters_m**2], axis=1)
        weighted_2m = X_m2.T / self.characters_m
        inverse_22 = np.linalg.pinv(weighted_2m @ X_m2, hermitian=True)
        slope_2 = inverse_22 @ weighted_2m @ y_m
        e_m = y_m - X_m2 @ slope_2
        totals_n2 = np.array([[one.characters, one.squares] for one in self.windows])
        if self.is_read:
            far_2 = totals_n2.sum(axis=0) - num_groups * X_m2.mean(axis=0)
            g_m = 1 + far_2 @ (inverse_22 * m / num_groups) @ weighted_2m
            h_m = np.einsum("im,ij,mj->m", weighted_2m, inverse_22, X_m2)
            spread = float(((g_m * e_m / np.maximum(1 - h_m, 0.1)) ** 2).sum()) / (m * max(m - 1, 1))
            value = float(totals_n2.sum(axis=0) @ slope_2 + num_groups * e_m.mean())
            return value, num_groups**2 * (1 - m / num_groups) * spread, max(m - 1, 1)
        count_n = np.maximum(np.bincount(self.window_m, minlength=len(self.windows)), 1)
        mean_n = np.bincount(self.window_m, e_m, len(self.windows)) / count_n
        groups_n = np.array([one.num_groups for one in self.windows])
        return self._over_windows(totals_n2 @ slope_2 + groups_n * mean_n)

    def _over_windows(self, y_n: Floats) -> Part:
        n = len(y_n)
        if self.is_read or not n:
            return float(y_n.sum()), 0.0, math.inf
        x_n = np.array([one.size for one in self.windows])
        if not x_n.sum():
            return 0.0, 0.0, math.inf
        ratio = float(y_n.sum() / x_n.sum())
        value = self.size * ratio
        if n == 1:  # one window says nothing of how windows differ: a bare guess, a quarter of the total as its error
            return value, (value / 4) ** 2, math.inf
        residual_n = (y_n - ratio * x_n) / np.maximum(1 - x_n / x_n.sum(), 0.1)  # as a jackknife would have it
        spread = float((residual_n**2).sum()) / (n - 1)
        return value, self.size**2 * spread / n / float(x_n.mean()) ** 2, n - 1


def over_sources(parts: Sequence[Part]) -> Estimate:
    """The total over sources that were sampled apart."""
    value, variance = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if not variance:
        return Estimate.exact(value)
    df = variance**2 / sum(part[1] ** 2 / part[2] for part in parts if part[1])
    half = _t_95(df) * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), value + half)


def _t_95(df: float) -> float:
    """97.5 % of Student's t lie below it; an expansion in 1/df, for fewer than 3 degrees the exact values."""
    if df < 3:
        return 12.7062 if df < 2 else 4.3027
    z, d = Z_95, df
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / d + second / d**2 + third / d**3
