from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_runs import bradley_terry

from prefsel.train.draws import (
    Draws,
    balanced_by_length,
    every_pair_once,
    micro_batches,
    next_batch,
    num_steps,
    rank_share,
)

# --------------------------------------------------------------------------------------------- every pair once


def test_every_epoch_visits_every_pair_once_and_batches_never_span_two() -> None:
    # 10 pairs in batches of 4: 4 + 4 + 2 per epoch
    draws = every_pair_once(np.arange(10), seed=3, is_shuffled=True)
    consumed, sizes, seen = 0, [], []
    for _ in range(6):
        batch = next_batch(draws, consumed, 4)
        consumed += len(batch)
        sizes.append(len(batch))
        seen.append(batch)
    assert sizes == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    given = every_pair_once(np.array([7, 5, 6, 1]), seed=3, is_shuffled=False)
    assert [next_batch(given, consumed, 3).tolist() for consumed in (0, 3, 4)] == [[7, 5, 6], [1], [7, 5, 6]]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(every_pair_once(np.arange(50), seed=seed, is_shuffled=True).of_epoch(epoch))

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert order(1, 1) == orders[1, 1]
    # As it was first published: a Philox permutation, so that a training continues under a new version.
    expected = np.random.Generator(np.random.Philox(key=[1, 1])).permutation(50)
    assert orders[1, 1] == tuple(expected)


def test_number_of_steps() -> None:
    assert num_steps(10, global_batch_pairs=4, num_epochs=2, max_steps=None) == 6
    assert num_steps(10, global_batch_pairs=4, num_epochs=2, max_steps=11) == 11


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_pairs", [1, 2, 7, 16])
def test_shares_partition_the_batch_and_level_the_tokens(world_size: int, num_pairs: int) -> None:
    rng = np.random.default_rng(num_pairs)
    batch = rng.permutation(100)[:num_pairs]
    lengths = rng.integers(5, 50, size=num_pairs)
    length_of = dict(zip(batch.tolist(), lengths.tolist()))
    shares = [rank_share(batch, lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
    tokens = [sum(length_of[pair] for pair in share.tolist()) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_micro_batches_keep_both_limits_and_every_pair() -> None:
    share, lengths = np.arange(7), np.array([90, 40, 40, 30, 10, 10, 10])
    by_tokens = micro_batches(share, lengths, micro_batch_pairs=10, token_budget=80)
    assert [run.tolist() for run in by_tokens] == [[0], [1, 2], [3, 4, 5, 6]]  # pair 0 is over the budget and alone
    by_pairs = micro_batches(share, lengths, micro_batch_pairs=3, token_budget=10_000)
    assert [run.tolist() for run in by_pairs] == [[0, 1, 2], [3, 4, 5], [6]]
    assert micro_batches(share[:0], lengths[:0], micro_batch_pairs=3, token_budget=10) == []


# ------------------------------------------------------------------------------------------ balanced by length


# 40 pairs, 10 held out; of the other 30 the chosen completion is at least as long in 24 (three of them ties).
MEMBERS = np.arange(10, 40)
DIFFERENCE = np.array([5.0] * 10 + [2.0] * 21 + [0.0] * 3 + [-1.0] * 6)


def balanced(tau: float | None, difference: np.ndarray = DIFFERENCE, seed: int = 0) -> tuple[Draws, dict[str, Any]]:
    return balanced_by_length(MEMBERS, difference, tau=tau, seed=seed, is_shuffled=True)


def epochs(tau: float | None, number: int, seed: int = 0) -> list[list[int]]:
    draws, _ = balanced(tau, seed=seed)
    return [draws.of_epoch(epoch).tolist() for epoch in range(number)]


@pytest.mark.parametrize(
    ("tau", "num_longer"),
    [
        (1e9, 15),  # one half
        (1.0, 19),  # 1 / (1 + e^-0.6) = 0.6457, of 30: 19.37
        (0.5, 23),  # 1 / (1 + e^-1.2) = 0.7685, of 30: 23.06
        (0.1, 30),  # 1 / (1 + e^-6) = 0.9975, of 30: 29.93
        (None, 24),
    ],
)
def test_draws_have_exactly_the_balanced_frequency(tau: float | None, num_longer: int) -> None:
    for draws in epochs(tau, 3):
        assert len(draws) == 30
        assert set(draws) <= set(MEMBERS.tolist())
        assert sum(DIFFERENCE[draws] >= 0) == num_longer


@pytest.mark.parametrize("tau", [1e9, 1.0, None])
def test_no_pair_of_a_side_is_drawn_more_than_once_more_often_than_another(tau: float | None) -> None:
    seen: Counter[int] = Counter()
    for draws in epochs(tau, 7):
        seen.update(draws)
        for side in (DIFFERENCE[MEMBERS] >= 0, DIFFERENCE[MEMBERS] < 0):
            counts = [seen[index] for index in MEMBERS[side].tolist()]
            assert max(counts) - min(counts) <= 1


def test_draws_depend_on_seed_and_epoch_alone_and_are_mixed() -> None:
    orders = [tuple(draws) for seed in (0, 1) for draws in epochs(1.0, 2, seed)]
    assert len(set(orders)) == 4
    assert tuple(epochs(1.0, 2, 1)[1]) == orders[3]
    # Both sides in both halves of an epoch: 11 of 30 draws are of the shorter side.
    is_shorter = DIFFERENCE[list(orders[0])] < 0
    assert 1 <= is_shorter[:15].sum() <= 10


def test_batches_are_slices_of_the_epochs() -> None:
    draws, _ = balanced(1.0)
    consumed, batches = 0, []
    for _ in range(8):  # 8 + 8 + 8 + 6 per epoch
        batches.append(next_batch(draws, consumed, 8).tolist())
        consumed += len(batches[-1])
    assert [len(batch) for batch in batches] == [8, 8, 8, 6] * 2
    assert [list(chain(*batches[:4])), list(chain(*batches[4:]))] == epochs(1.0, 2)


def test_warnings() -> None:
    assert balanced(0.5)[1]["warnings"] == []
    low = balanced(0.4)[1]
    assert low["longer_chosen_share"] == 0.8
    assert low["longer_chosen_frequency"] == pytest.approx(25 / 30)  # 1 / (1 + e^-1.5) = 0.8176, of 30: 24.5
    assert "0.4 is below 0.5" in low["warnings"][0]
    assert "0.800 of the pairs and in 0.818 of the draws" in low["warnings"][0]
    for difference, side in ((np.abs(DIFFERENCE), "shorter"), (-1 - np.abs(DIFFERENCE), "at least as long")):
        one_sided, facts = balanced(1.0, difference)
        assert facts["warnings"] == [
            f"length_balance_tau: no chosen completion is {side}, so pairs are drawn as they come"
        ]
        assert sorted(one_sided.of_epoch(0)) == MEMBERS.tolist()


def test_the_given_order_is_kept_and_cannot_be_balanced() -> None:
    draws, _ = balanced_by_length(MEMBERS, DIFFERENCE, tau=None, seed=0, is_shuffled=False)
    assert draws.of_epoch(3).tolist() == MEMBERS.tolist()
    assert bradley_terry(order="given", length_balance_tau=None).config.order == "given"
    with pytest.raises(ValidationError, match="set length_balance_tau: null"):
        bradley_terry(order="given")
