"""Win rates: how often a judge prefers the answers of one model, ours, to those of another, theirs; raw, and at equal
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefsel.errors import UserError
from prefsel.evaluate.bootstrap import NUM_DRAWS, bootstrap_estimate
from prefsel.evaluate.comparison import Comparison, by_prompt, mean_by_prompt
from prefsel.evaluate.intervals import Estimate
from prefsel.evaluate.length_control import length_control


@dataclass(frozen=True)
class WinRate:
    """What a comparison shows. Shares from 0 to 1; 0.5 where neither is better."""

    raw: Estimate
    """The share of wins, ties as halves: averaged within each prompt, then over prompts; percentile interval."""
    length_controlled: Estimate | None
    """What it would be at equal lengths, see `length_control`; None: all answers differ by the same length."""
    length_effect: float | None
    """The coefficient of the length term; positive: the judge prefers the longer answer."""
    length_ridge: float
    """How much the length effect was held back."""
    is_extrapolated: bool
    """Whether one model's answers are the longer ones in every row: nothing was seen near equal lengths."""
    num_wins: int
    num_ties: int
    num_losses: int
    """Of ours; they count rows. A preference above one half is a win."""
    length_difference: float
    """Its mean, averaged within each prompt first."""
    num_inconsistent: int | None = None
    """As `Comparison`."""
    first_place_share: float | None = None
    """The mean preference of a pairwise judge for the answer that it is shown first."""


def win_rate(
    comparison: Comparison, *, length_ridge: float = 0.0, seed: int = 0, num_draws: int = NUM_DRAWS
) -> WinRate:
    """Raw and length-controlled win rate of ours, each with a 95 % percentile interval over prompts.

    Args:
        comparison: Of all prompts.
        length_ridge: How much the length effect is held back, see `length_control`.
        seed: Of the draws.
        num_draws: Of either interval.

    Raises:
        UserError: There is no row.
    """
    found = bootstrap_estimate([by_prompt(comparison)], seed=seed, num_draws=num_draws)
    if found is None:
        raise UserError("win rate: no two answers to compare; valid: at least one prompt that both models answered")
    controlled = length_control(comparison, ridge=length_ridge, seed=seed, num_draws=num_draws)
    num_rows, advantage_M = len(comparison.prompts), comparison.advantage_M
    return WinRate(
        raw=as_shares(found, num_rows),
        length_controlled=None if controlled is None else as_shares(controlled.advantage, num_rows),
        length_effect=None if controlled is None else controlled.length_effect,
        length_ridge=length_ridge,
        is_extrapolated=controlled is None or controlled.is_extrapolated,
        num_wins=int((advantage_M > 0).sum()),
        num_ties=int((advantage_M == 0).sum()),
        num_losses=int((advantage_M < 0).sum()),
        length_difference=float(mean_by_prompt(comparison, comparison.length_difference_M).value_N.mean()),
        num_inconsistent=comparison.num_inconsistent,
        first_place_share=None if comparison.first_place is None else comparison.first_place / num_rows,
    )


def win_rate_of_runs(
    comparisons: Sequence[Comparison], *, seed: int = 0, num_draws: int = NUM_DRAWS
) -> Estimate | None:
    """The raw win rate of a training under several seeds, with an interval over seeds and prompts.

    Args:
        comparisons: One per seed, over the same prompts.
        seed: Of the draws.
        num_draws: Of the interval.

    Returns:
        None without a comparison; see `bootstrap_estimate`.

    Raises:
        UserError: They are not over the same prompts.
    """
    found = bootstrap_estimate([by_prompt(one) for one in comparisons], seed=seed, num_draws=num_draws)
    return None if found is None else as_shares(found, sum(len(one.prompts) for one in comparisons))


def as_shares(advantage: Estimate, num_items: int | None = None) -> Estimate:
    """An estimate of advantages, −1 to 1, as one of shares of wins, 0 to 1; `num_items` where rows were averaged."""
    low, high = (None if end is None else share(end) for end in (advantage.low, advantage.high))
    return Estimate(share(advantage.mean), low, high, num_items or advantage.num_items, advantage.num_prompts)


def share(advantage: float) -> float:
    """(1 + advantage) / 2, rounded to a multiple of 2⁻⁵³, so that 1 − share(a) is share(−a) without any rounding."""
    return 0.5 + float(np.rint(advantage * 2.0**52)) * 2.0**-53
