"""Duplicates and contradictions against a naive pass over all rows, for any sharding and number of partitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.select.duplicates import REASONS, PartitionRows, partition, resolve

Pair = tuple[int, int]


def words(ids: list[int]) -> np.ndarray:
    # The two halves of small numbers are both used: 1 -> (0, 1), 2 -> (1, 0), 3 -> (1, 1), ...
    return np.array([(n >> 1, n & 1) for n in ids], ">u8").reshape(-1, 2)


def dropped(shards: list[list[Pair]], num_partitions: int, contradictions: str, seed: int = 0) -> dict[Pair, str]:
    parts = [
        partition(words([p for p, _ in rows]), words([m for _, m in rows]), number, num_partitions)
        for number, rows in enumerate(shards)
    ]
    np.random.default_rng(seed).shuffle(parts)  # partitions may arrive in any order
    found = {}
    for place in range(num_partitions):
        drops = resolve(PartitionRows.merge(part[place] for part in parts), contradictions=contradictions)
        where = list(zip(drops.shard_M.tolist(), drops.row_M.tolist()))
        assert where == sorted(where)
        for key, reason in zip(where, drops.reason_M.tolist()):
            assert key not in found
            found[key] = REASONS[reason]
    return found


def naive(shards: list[list[Pair]], contradictions: str) -> dict[Pair, str]:
    everything = {pair for rows in shards for pair, _ in rows}
    found, seen = {}, set()
    for number, rows in enumerate(shards):
        for row, (pair, mirror) in enumerate(rows):
            if contradictions == "drop" and mirror in everything:
                found[number, row] = "contradiction"
            elif pair in seen:
                found[number, row] = "duplicate"
            seen.add(pair)
    return found


def test_by_hand() -> None:
    # 10 and 11 are mirrors; 20 has no mirror in the corpus (21); 30 stands three times; 40 is its own mirror.
    shards = [[(10, 11), (20, 21), (30, 31)], [(30, 31), (11, 10), (40, 40)], [(10, 11), (30, 31)]]
    both = "contradiction"
    assert dropped(shards, 3, "drop") == {
        (0, 0): both,
        (1, 1): both,
        (2, 0): both,  # a duplicate of a contradiction counts as a contradiction, once
        (1, 0): "duplicate",
        (2, 1): "duplicate",
        (1, 2): both,
    }
    assert dropped(shards, 3, "keep") == {(1, 0): "duplicate", (2, 0): "duplicate", (2, 1): "duplicate"}


pairs = st.integers(0, 11).flatmap(lambda n: st.just((n, n ^ 1 if n < 10 else n)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(pairs, max_size=8), min_size=1, max_size=6),
    st.sampled_from([1, 2, 7]),
    st.sampled_from(["drop", "keep"]),
    st.integers(0, 5),
)
def test_equals_the_naive_pass(shards: list[list[Pair]], num_partitions: int, contradictions: str, seed: int) -> None:
    assert dropped(shards, num_partitions, contradictions, seed) == naive(shards, contradictions)


def test_row_numbers_may_be_given() -> None:
    part = partition(words([4, 4]), words([5, 5]), 0, 1, np.array([10, 20]))[0]
    assert resolve(part).row_M.tolist() == [20]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="contradictions: got 'dorp'; valid: drop, keep"):
        resolve(partition(words([1]), words([0]), 0, 1)[0], contradictions="dorp")
