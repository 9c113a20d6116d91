"""The search for an upper bound against the authors' loop: one integer at a time over all values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.numbers.tail import UpperTail


def stepped(values: list[float], divisor: float, min_above: int) -> tuple[int, int]:
    """int(max / divisor), then one more until few enough lie above, or the integer part of max is reached."""
    upper, largest = int(max(values) / divisor), max(values)
    while True:
        above = sum(upper < value <= largest for value in values)
        if above < min_above or above < largest - upper or upper >= int(largest):
            return upper, above
        upper += 1


def merged(values: list[float], divisor: float, num_shards: int) -> UpperTail:
    place_N = np.random.default_rng(0).integers(0, num_shards, len(values))
    return UpperTail.merge([UpperTail.of(np.array(values)[place_N == shard], divisor) for shard in range(num_shards)])


margin = (
    st.floats(-300, 300)
    | st.floats(-0.9, 0.9)
    | st.integers(-20, 20).map(float)
    | st.sampled_from([7.0, 7.5, 8.0 + 1e-12])
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(margin, min_size=1, max_size=80),
    st.sampled_from([1.5, 2.0]),
    st.sampled_from([1, 3, 30]),
    st.sampled_from([1, 4, 100]),
)
def test_equals_the_stepping_loop_for_any_sharding(
    values: list[float], divisor: float, min_above: int, num_shards: int
) -> None:
    assert merged(values, divisor, num_shards).upper_bound(min_above) == stepped(values, divisor, min_above)


def test_equals_the_stepping_loop_on_a_corpus() -> None:
    value_N = np.random.default_rng(0).standard_t(3, 20_000) * 15
    for divisor in (1.5, 2.0):
        tail = merged(value_N.tolist(), divisor, 9)
        assert tail.upper_bound(30) == stepped(value_N.tolist(), divisor, 30)
        assert tail.count == 20_000


def test_only_the_tail_is_kept() -> None:
    # 0.5, 1.0, …, 500.0: the bins 251 to 500, whatever lies below.
    tail = UpperTail.of(np.arange(1, 1001) / 2 - 0.0, 2.0)
    assert tail.bins_B.tolist() == list(range(251, 501))
    assert set(tail.counts_B.tolist()) == {2}


def test_margins_below_one_end_at_zero() -> None:
    # 40 rewards between 0 and 0.02: none of the conditions holds at 0, and 1 would lie above all of them.
    value_N = np.linspace(-0.02, 0.02, 81)
    assert merged(value_N.tolist(), 1.5, 3).upper_bound(30) == (0.0, 40)


@pytest.mark.parametrize("largest", [1e-300, 0.0, -0.0, -0.4, -7.3, 1e18])
def test_unusual_largest_values(largest: float) -> None:
    values = [largest - 3, largest, largest]
    assert merged(values, 2.0, 2).upper_bound(30) == stepped(values, 2.0, 30)


def test_a_shard_without_rows_changes_nothing() -> None:
    some, none = UpperTail.of(np.array([3.0, 9.5]), 2.0), UpperTail.of(np.empty(0), 2.0)
    both = UpperTail.merge([none, some, none])
    assert (both.count, both.high, both.bins_B.tolist(), both.counts_B.tolist()) == (2, 9.5, [10.0], [1])
    assert none.high == -math.inf
