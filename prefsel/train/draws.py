"""Which pairs make up optimizer step t on every worker.

What an epoch draws depends on (seed, epoch) and the pairs alone and a global batch is a slice of it, so the number of
pairs consumed says everything about where a run stands: no worker count, micro-batch size or token budget enters.

Shapes: N pairs; M of them are drawn from; B draws of a global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.train.data import Indices, Numbers
from prefsel.train.reward_losses import length_balanced_frequency

HELPFUL_TAU = 0.5
"""Below about this, balanced sampling is further from one half than the data."""
LONGER, SHORTER, MIXING = range(3)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Draws:
    """What every epoch visits, in order."""

    num_pairs: int
    """Draws of an epoch."""
    of_epoch: Callable[[int], Indices]
    """Epoch → the pairs it draws, [`num_pairs`]; a pair may be among them more than once."""


def next_batch(draws: Draws, consumed_pairs: int, global_batch_pairs: int) -> Indices:
    """The pairs of the global batch that follows `consumed_pairs`, [B]; a batch never spans two epochs."""
    epoch, start = divmod(consumed_pairs, draws.num_pairs)
    return draws.of_epoch(epoch)[start : start + global_batch_pairs]


def num_steps(num_pairs: int, *, global_batch_pairs: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the whole run: `max_steps`, or all epochs, an epoch's incomplete last batch being a step."""
    return num_epochs * -(-num_pairs // global_batch_pairs) if max_steps is None else max_steps


def every_pair_once(members: Indices, *, seed: int, is_shuffled: bool) -> Draws:
    """Every member once an epoch: in a permutation keyed by (seed, epoch), or as they stand.

    Args:
        members: The pairs that are trained on, [M], in the order that an unshuffled epoch visits them.
        seed: Of the permutations.
        is_shuffled: Whether there are any.
    """

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Indices:
        if not is_shuffled:
            return members
        return members[np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(members))]

    return Draws(len(members), of_epoch)


def balanced_by_length(
    members: Indices, length_difference_N: Numbers, *, tau: float | None, seed: int, is_shuffled: bool
) -> tuple[Draws, dict[str, Any]]:
    """As many draws as there are members, exactly round(f̂⁺ · M) of them from D⁺, whose chosen completion is as long.

    Either side is drawn from one endless sequence of its permutations, which the next epoch continues, so that however
    many epochs there are, no pair of a side is drawn more than once more often than another of it.

    Args:
        members: The pairs that are trained on, [M].
        length_difference_N: |y_w| − |y_l| of all pairs.
        tau: Temperature of the balance; None, or where a side is empty: every member is drawn once an epoch.
        seed: Of the permutations.
        is_shuffled: Where there is no balance, whether members are drawn in a new order every epoch.

    Returns:
        The draws, and what the run says about them: `longer_chosen_share` f⁺, `longer_chosen_frequency` of the draws,
        `warnings`.
    """
    is_longer = length_difference_N[members] >= 0
    longer, shorter = members[is_longer], members[~is_longer]
    share, num_longer = len(longer) / len(members), len(longer)
    draws, warnings = every_pair_once(members, seed=seed, is_shuffled=is_shuffled), []
    if tau is not None and not (len(longer) and len(shorter)):
        side = "shorter" if len(longer) else "at least as long"
        warnings.append(f"length_balance_tau: no chosen completion is {side}, so pairs are drawn as they come")
    elif tau is not None:
        frequency = length_balanced_frequency(share, tau)
        num_longer = round(frequency * len(members))
        draws = _of_both_sides(longer, shorter, num_longer, seed)
        if tau < HELPFUL_TAU:
            warnings.append(
                f"length_balance_tau: {tau:g} is below {HELPFUL_TAU:g}, where balancing makes it worse: the chosen "
                f"completion is the longer one in {share:.3f} of the pairs and in {frequency:.3f} of the draws"
            )
    facts = {"longer_chosen_share": share, "longer_chosen_frequency": num_longer / len(members), "warnings": warnings}
    return draws, facts


def _of_both_sides(longer: Indices, shorter: Indices, num_longer: int, seed: int) -> Draws:
    num_pairs = len(longer) + len(shorter)
    num_shorter = num_pairs - num_longer

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Indices:
        drawn = np.concatenate(
            [
                _continued(longer, epoch * num_longer, num_longer, (seed, LONGER)),
                _continued(shorter, epoch * num_shorter, num_shorter, (seed, SHORTER)),
            ]
        )
        return np.random.default_rng([seed, MIXING, epoch]).permutation(drawn)

    return Draws(num_pairs, of_epoch)


def _continued(side: Indices, start: int, count: int, key: tuple[int, int]) -> Indices:
    """Draws start … start + count of the permutations of a side, one after the other."""
    rounds = range(start // len(side), -(-(start + count) // len(side)))
    shuffled = [np.random.default_rng([*key, number]).permutation(side) for number in rounds]
    return np.concatenate([side[:0], *shuffled])[start - rounds.start * len(side) :][:count]


def rank_share(batch_B: Indices, num_tokens_B: Indices, *, rank: int, world_size: int) -> Indices:
    """The pairs of a global batch that one worker takes, longest first; the shares partition the batch.

    Dealing the length-sorted pairs back and forth (0 1 2 2 1 0 …) evens out the tokens per worker: every step waits
    for the slowest, and the loss is weighted per pair, so which worker computes a pair cannot change the sum.
    """
    by_length = batch_B[np.argsort(-num_tokens_B, kind="stable")]
    position = np.arange(len(by_length)) % (2 * world_size)
    owner = np.where(position < world_size, position, 2 * world_size - 1 - position)
    return by_length[owner == rank]


def micro_batches(share: Indices, num_tokens: Indices, *, micro_batch_pairs: int, token_budget: int) -> list[Indices]:
    """Consecutive runs of a worker's share with at most so many pairs and, beyond the first pair, so many tokens."""
    runs: list[list[int]] = []
    tokens = 0
    for index, length in zip(share.tolist(), num_tokens.tolist()):
        if not runs or len(runs[-1]) == micro_batch_pairs or tokens + length > token_budget:
            runs.append([])
            tokens = 0
        runs[-1].append(index)
        tokens += length
    return [np.array(run, dtype=np.int64) for run in runs]
