"""One row per key over any sharding and number of partitions, against a sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.select.dedupe import KeyedRows, duplicates_to_drop, partition

Row = tuple[int, float, int]
"""Key, score, pair_id."""


def key_words(keys: list[int], num_words: int) -> np.ndarray:
    # Small numbers written over all words: two keys differ in any of them.
    return np.array([[(key // 3**word) % 3 for word in range(num_words)] for key in keys], np.uint64).reshape(
        -1, num_words
    )


def lost(shards: list[list[Row]], num_partitions: int, descending: bool, num_words: int) -> set[tuple[int, int]]:
    parts = []
    for number, rows in enumerate(shards):
        parts.append(
            partition(
                key_words([key for key, _, _ in rows], num_words),
                np.array([score for _, score, _ in rows]),
                np.array([divmod(pair_id * 2**62, 2**64) for _, _, pair_id in rows], ">u8").reshape(-1, 2),
                np.arange(len(rows)) + 10,  # row numbers are given, not counted
                descending=descending,
                shard_no=number,
                num_partitions=num_partitions,
            )
        )
    found: set[tuple[int, int]] = set()
    for place in range(num_partitions):
        drops = duplicates_to_drop(KeyedRows.merge(part[place] for part in parts))
        dropped = list(zip(drops.shard_M.tolist(), (drops.row_M - 10).tolist()))
        assert len(dropped) == len(set(dropped) - found)
        found |= set(dropped)
    return found


def naive(shards: list[list[Row]], descending: bool) -> set[tuple[int, int]]:
    everything = [(shard, row) for shard, rows in enumerate(shards) for row in range(len(rows))]

    def place(at: tuple[int, int]) -> tuple[float, int, tuple[int, int]]:
        _, score, pair_id = shards[at[0]][at[1]]
        return (-score if descending else score, pair_id, at)

    best: dict[int, tuple[int, int]] = {}
    for at in sorted(everything, key=place):
        best.setdefault(shards[at[0]][at[1]][0], at)
    return set(everything) - set(best.values())


rows = st.tuples(st.integers(0, 8), st.sampled_from([0.5, 0.5, -0.0, 0.0, -3.0, 1e300]), st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(rows, max_size=8), min_size=1, max_size=5),
    st.sampled_from([1, 2, 7]),
    st.booleans(),
    st.sampled_from([2, 3]),
)
def test_equals_a_sort(shards: list[list[Row]], num_partitions: int, descending: bool, num_words: int) -> None:
    assert lost(shards, num_partitions, descending, num_words) == naive(shards, descending)


def test_by_hand() -> None:
    shards = [[(1, 2.0, 3), (1, 2.0, 2), (2, 0.0, 1)], [(2, -0.0, 0), (1, 1.0, 0)]]
    # Key 1: 2.0 ties, the smaller pair_id stays. Key 2: both zeros are one number, the smaller pair_id stays.
    assert lost(shards, 3, True, 2) == {(0, 0), (0, 2), (1, 1)}
    assert lost(shards, 3, False, 2) == {(0, 0), (0, 1), (0, 2)}
