"""KL columns of answers, together: `prefsel.evaluate.kl` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefsel.evaluate.bootstrap import NUM_DRAWS, bootstrap_estimate
from prefsel.evaluate.intervals import Estimate, Values


@dataclass(frozen=True)
class Divergence:
    """KL(policy ‖ reference) of a model on its own answers, in nats."""

    per_response: Estimate
    """The exact sum over an answer's tokens; percentile interval over prompts."""
    per_token: float
    """All sums over all tokens."""
    monte_carlo: Estimate
    """The sum of log π − log q of the sampled tokens, in place of the exact one."""
    num_tokens: int
    """Response tokens, ends of turn included."""


def divergence(
    prompts: Sequence[str],
    kl_N: Sequence[float],
    log_ratio_N: Sequence[float],
    num_tokens_N: Sequence[float],
    *,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
) -> Divergence | None:
    """What `prefsel.evaluate.kl.policy_kl` gave for N answers, together.

    Args:
        prompts: The prompt of each answer.
        kl_N: Exact sums.
        log_ratio_N: Monte-Carlo sums.
        num_tokens_N: Their tokens.
        seed: Of the draws of the intervals.
        num_draws: Of each interval.

    Returns:
        None without an answer.
    """
    names = [f"{number:09d}" for number in range(len(prompts))]
    exact, sampled = (
        bootstrap_estimate([Values(names, prompts, np.asarray(one, np.float64))], seed=seed, num_draws=num_draws)
        for one in (kl_N, log_ratio_N)
    )
    if exact is None or sampled is None:
        return None
    return Divergence(exact, float(np.sum(kl_N) / np.sum(num_tokens_N)), sampled, int(np.sum(num_tokens_N)))
