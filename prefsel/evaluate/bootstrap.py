"""Percentile intervals by drawing prompts, and runs, again: for what is no mean, and beside the normal interval.

    prompts, sorted by name ─▶ how often each is drawn [B, G] ─▶ the statistic of every draw [B] ─▶ its middle 95 %

A draw says how often each prompt counts, so a prompt's items stay together, two models that are compared see the same
draws, and neither the order of the prompts nor how they came in shards changes a number.

Shapes: B draws, G prompts, S runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prefsel.errors import UserError, invalid
from prefsel.evaluate.intervals import Estimate, Values

Floats: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

NUM_DRAWS = 2_000
"""An end of the interval is then off by 0.35 % of the draws (one standard error of a share of 2.5 %)."""
DRAWN_CELLS = 1 << 20
"""Numbers of draws × prompts at a time: 8 MB."""


def bootstrap_estimate(
    runs: Sequence[Values], *, seed: int = 0, num_draws: int = NUM_DRAWS, level: float = 0.95
) -> Estimate | None:
    """The mean over all items of all runs with a percentile interval, over prompts and, of several runs, over runs.

    Runs are trainings of several seeds that were evaluated on the same prompts. A draw takes as many runs as there are,
    with replacement, and as many prompts, the same ones for all of its runs: what makes a prompt easy is common to all
    runs, and drawing prompts anew within every run would average it away.

    Args:
        runs: What each run reached; one for the interval over prompts alone. Differences of two models are
            `difference(ours, theirs)` of each seed.
        seed: Of the draws.
        num_draws: B.
        level: Share of the draws inside the interval.

    Returns:
        None without a value; the ends are None of fewer than two prompts. Of few runs the interval is too narrow, as
        the variance of S runs is drawn as (S − 1)/S of itself: by 11 % at five where runs differ more than prompts.

    Raises:
        UserError: The runs do not have the same prompts.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval); Owen 2007 (arXiv 0711.4475, draws over both
    factors of crossed data).
    """
    runs = [one for one in runs if len(one.value_N)]
    if not runs:
        return None
    prompts, sum_SG, size_SG = _by_prompt(runs)
    mean, num_items = float(sum_SG.sum() / size_SG.sum()), int(size_SG.sum())
    if len(prompts) < 2:
        return Estimate(mean, None, None, num_items, len(prompts))
    rng = np.random.default_rng([seed, 1])

    def drawn_means(count_BG: Counts) -> Floats:
        count_BS = _counts(rng, len(count_BG), len(runs))
        sums_B, sizes_B = (((count_BS @ one_SG) * count_BG).sum(axis=1) for one_SG in (sum_SG, size_SG))
        return sums_B / sizes_B

    low, high = percentile_interval(drawn_means, len(prompts), seed=seed, num_draws=num_draws, level=level)
    return Estimate(mean, low, high, num_items, len(prompts))


def percentile_interval(
    statistic: Callable[[Counts], Floats],
    num_prompts: int,
    *,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval that holds a statistic in the middle share of the draws.

    Its ends are draws, not means of two of them, as many below the lower one as above the upper one: so a statistic
    that changes its sign when two models change places has an interval that does, exactly.

    Args:
        statistic: How often each prompt counts, [B, G], prompts in the order of their names → the statistic, [B]. It
            is called with a few draws at a time.
        num_prompts: G.
        seed: Of the draws.
        num_draws: B in all, at least 100.
        level: Share of the draws inside.

    Raises:
        UserError: A number is out of its range.
    """
    if num_draws < 100:
        raise invalid("num_draws", num_draws, "100 or more")
    if not 0 < level < 1:
        raise invalid("level", level, "between 0 and 1")
    drawn_B = np.sort(np.concatenate([statistic(count_BG) for count_BG in draws(num_prompts, num_draws, seed)]))
    outside = int(num_draws * (1 - level) / 2)
    return float(drawn_B[outside]), float(drawn_B[-1 - outside])


def draws(num_prompts: int, num_draws: int, seed: int) -> Iterator[Counts]:
    """How often each prompt is drawn, blocks of [B, G] whole numbers; every row sums to G."""
    rng = np.random.default_rng(seed)
    block = max(1, DRAWN_CELLS // num_prompts)
    for start in range(0, num_draws, block):
        yield _counts(rng, min(block, num_draws - start), num_prompts)


def _counts(rng: np.random.Generator, num_draws: int, number: int) -> Counts:
    drawn_BG = rng.integers(0, number, (num_draws, number)) + np.arange(num_draws)[:, None] * number
    return np.bincount(drawn_BG.ravel(), minlength=num_draws * number).reshape(num_draws, number)


def _by_prompt(runs: Sequence[Values]) -> tuple[list[str], Floats, Floats]:
    """The prompts, sorted, and of every run and prompt the sum and the number of its values, [S, G]."""
    prompts = sorted(set(runs[0].prompts))
    sums, sizes = [], []
    for number, run in enumerate(runs):
        if apart := sorted(set(prompts) ^ set(run.prompts)):
            raise UserError(
                f"runs: run {number} has other prompts than run 0, {len(apart)} of them, first: {apart[:3]}; valid: "
                "runs that were evaluated on the same prompts"
            )
        # By name of prompt and item, so that sums of the same values are the same numbers in any order.
        order = sorted(range(len(run.items)), key=lambda item: (run.prompts[item], run.items[item]))
        group_N = np.searchsorted(np.array(prompts), np.array([run.prompts[item] for item in order]))
        sums.append(np.bincount(group_N, weights=run.value_N[order], minlength=len(prompts)))
        sizes.append(np.bincount(group_N, minlength=len(prompts)).astype(np.float64))
    return prompts, np.array(sums), np.array(sizes)
