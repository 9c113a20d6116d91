r"""The win rate at equal lengths: what is left of an advantage when the judge's liking for long answers is taken out.

    advantages ─▶ \(P(\text{ours wins}) = \sigma(\theta + \varphi\,\tanh(\Delta / s))\) ─▶ \(\sigma(\theta)\)

Δ is the difference of the lengths and s its standard deviation over this comparison.

Shapes: M rows of a comparison, G prompts, B draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prefsel.errors import PrefselError, invalid
from prefsel.evaluate.bootstrap import NUM_DRAWS, Counts, Floats, percentile_interval
from prefsel.evaluate.comparison import Comparison
from prefsel.evaluate.intervals import Estimate

PRIOR = 1.0
"""Weight, in prompts, of ties that stand beside the data: half at either extreme of the length term. Without them the
coefficients of a judge that always, or never, prefers the longer answer would be infinite."""
ALPACA_RIDGE = 0.02
"""The `ridge` that comes nearest to AlpacaEval 2's own length-controlled win rates: over the 56 models whose
annotations lie in its repository 1.2 points apart in the mean, Pearson 0.997 (0: 6.5 and 0.944; the raw rates: 4.9 and
0.981). Without the difficulty of the instructions, length is charged with what hard instructions do, which get long
answers. The ridge works against that, but leaves a part of what a judge of length alone sees: where its raw rate is
0.80, answers being longer in 84 % of the rows, 0.62 are left, and 0.48 at 0."""
TOLERANCE, MOST_STEPS = 1e-12, 200
FITTED_CELLS = 1 << 14
"""Numbers of draws × rows at a time, 128 KB each: 2 000 draws of 2 048 rows took 0.69 s, and 2.27 s by 1 << 20."""


@dataclass(frozen=True)
class LengthControl:
    """A length-controlled comparison."""

    advantage: Estimate
    r"""At equal lengths, \(\tanh(\theta/2) = 2\sigma(\theta) - 1\), with a percentile interval over prompts."""
    length_effect: float
    """φ."""
    is_extrapolated: bool
    """Whether one model's answers are the longer ones in every row, so that equal lengths lie outside the data."""


def length_control(
    comparison: Comparison, *, ridge: float = 0.0, seed: int = 0, num_draws: int = NUM_DRAWS
) -> LengthControl | None:
    """The advantage of ours at equal lengths.

    Args:
        comparison: Of all prompts, at least one; every prompt has the same weight, however many rows it has.
        ridge: How much the length effect is held back, in prompts per prompt: half its square is added to the loss so
            many times the number of prompts. 0, what a judge of length alone needs; `ALPACA_RIDGE`, what comes nearest
            to AlpacaEval.
        seed: Of the draws of the interval; every draw is fitted anew.
        num_draws: B.

    Returns:
        None where every row has the same length difference, which is not 0: nothing tells length from quality.

    Raises:
        UserError: `ridge` is below 0.
        PrefselError: The fit did not converge.

    Source: Dubois et al. 2024 (arXiv 2404.04475), section 4, and AlpacaEval's code for tanh of the difference in units
    of its standard deviation. Deviations: no term for the difficulty of an instruction, which is fitted on other
    models' answers to AlpacaEval's own instructions; `PRIOR` and `ridge` in place of an L1 penalty chosen by
    cross-validation and of the answers of models told to be brief or verbose; lengths in the unit given, not always in
    characters.
    """
    if ridge < 0:
        raise invalid("ridge", ridge, "0 or more")
    prompts, group_M = np.unique(np.array(comparison.prompts, dtype=np.str_), return_inverse=True)
    difference_M = comparison.length_difference_M
    weight_M = 1.0 / np.bincount(group_M)[group_M]
    spread = _deviation(difference_M, weight_M)
    if spread == 0 and difference_M[0] != 0:
        return None
    term_M = np.tanh(difference_M / spread) if spread else np.zeros(len(difference_M))
    every_1M = weight_M[None, :]
    quality_1, length_1 = fit(comparison.advantage_M, term_M, every_1M, ridge=ridge)
    start = float(quality_1[0]), float(length_1[0])
    advantage, low, high = math.tanh(start[0] / 2), None, None

    def of_draws(count_BG: Counts) -> Floats:
        found = []
        block = max(1, FITTED_CELLS // len(term_M))
        for first in range(0, len(count_BG), block):
            weight_BM = count_BG[first : first + block, group_M] * weight_M
            found.append(np.tanh(fit(comparison.advantage_M, term_M, weight_BM, start, ridge)[0] / 2))
        return np.concatenate(found)

    if len(prompts) > 1:
        low, high = percentile_interval(of_draws, len(prompts), seed=seed, num_draws=num_draws)
    found = Estimate(advantage, low, high, len(term_M), len(prompts))
    return LengthControl(found, start[1], bool((difference_M > 0).all() or (difference_M < 0).all()))


def fit(
    advantage_M: Floats,
    term_M: Floats,
    weight_BM: Floats,
    start: tuple[float, float] = (0.0, 0.0),
    ridge: float = 0.0,
) -> tuple[Floats, Floats]:
    r"""θ and φ of a logistic regression, for several weightings of the rows at once.

    Minimises \(\sum_m w_m [\log(1 + e^{z_m}) - y_m z_m]\) with \(z = \theta + \varphi t\), \(y = (1 + a)/2\), over
    the rows and two ties of weight `PRIOR`/2 at t = ±1, plus \(\frac{\rho}{2} \varphi^2 \sum_m w_m\). Damped Newton
    steps, which converge from anywhere.

    Args:
        advantage_M: a, from −1 to 1.
        term_M: t, from −1 to 1.
        weight_BM: w ≥ 0.
        start: θ and φ to begin with.
        ridge: ρ ≥ 0.

    Returns:
        θ and φ, [B] each: of −a and −t they are −θ and φ.

    Raises:
        PrefselError: No convergence within `MOST_STEPS`.

    Source: Sun and Tran-Dinh 2019 (arXiv 1703.04599) for the damping, ln(1 + β)/β with β = √2 · |step|, √2 being the
    length of the longest row (1, t).
    """
    quality_B, length_B = (np.full(len(weight_BM), one) for one in start)
    signed_BM, ridge_B = weight_BM * term_M, ridge * weight_BM.sum(axis=1)
    for _ in range(MOST_STEPS):
        # tanh(z/2) = 2σ(z) − 1, an odd function in every bit.
        half_BM = np.tanh((quality_B[:, None] + length_B[:, None] * term_M) / 2)
        residual_BM, slope_BM = (half_BM - advantage_M) / 2, (1 - half_BM**2) / 4
        long_B, short_B = np.tanh((quality_B + length_B) / 2), np.tanh((quality_B - length_B) / 2)
        long_slope_B, short_slope_B = (PRIOR * (1 - one_B**2) / 8 for one_B in (long_B, short_B))
        by_quality_B = (weight_BM * residual_BM).sum(axis=1) + PRIOR * (long_B + short_B) / 4
        by_length_B = (signed_BM * residual_BM).sum(axis=1) + PRIOR * (long_B - short_B) / 4 + ridge_B * length_B
        qq_B = (weight_BM * slope_BM).sum(axis=1) + (long_slope_B + short_slope_B)
        ql_B = (signed_BM * slope_BM).sum(axis=1) + (long_slope_B - short_slope_B)
        ll_B = (signed_BM * (slope_BM * term_M)).sum(axis=1) + (long_slope_B + short_slope_B) + ridge_B
        determinant_B = qq_B * ll_B - ql_B**2
        quality_step_B = (ll_B * by_quality_B - ql_B * by_length_B) / determinant_B
        length_step_B = (qq_B * by_length_B - ql_B * by_quality_B) / determinant_B
        size_B = np.sqrt(2 * (quality_step_B**2 + length_step_B**2))
        damping_B = np.log1p(size_B) / np.where(size_B > 0, size_B, 1.0)
        damping_B = np.where(size_B > 0, damping_B, 1.0)
        quality_B, length_B = quality_B - damping_B * quality_step_B, length_B - damping_B * length_step_B
        if (size_B <= TOLERANCE * (1 + np.abs(quality_B) + np.abs(length_B))).all():
            return quality_B, length_B
    raise PrefselError(
        f"length control: {MOST_STEPS} steps did not fit the length term, the last one was {float(size_B.max()):.3g}"
    )


def _deviation(value_M: Floats, weight_M: Floats) -> float:
    """The weighted standard deviation; 0 where all values are equal, whatever rounding makes of their mean."""
    if np.ptp(value_M) == 0:
        return 0.0
    total = weight_M.sum()
    mean = (weight_M * value_M).sum() / total
    return float(np.sqrt((weight_M * (value_M - mean) ** 2).sum() / total))
