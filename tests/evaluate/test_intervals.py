from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.evaluate.intervals import Values, estimate, paired_difference

VALUES = st.lists(st.tuples(st.sampled_from([0.0, 50.0, 100.0]), st.integers(0, 6)), min_size=1, max_size=50)


def values(pairs: dict[str, float], prompts: dict[str, str] | None = None) -> Values:
    names = list(pairs)
    return Values(names, [(prompts or {}).get(name, name) for name in names], np.array(list(pairs.values())))


def test_one_item_per_prompt_is_the_textbook_interval() -> None:
    value_N = np.random.default_rng(0).normal(3, 2, 40)
    found = estimate(value_N, [str(number) for number in range(40)])
    assert found is not None
    error = np.std(value_N, ddof=1) / math.sqrt(40)
    assert found.mean == pytest.approx(np.mean(value_N))
    assert (found.low, found.high) == (
        pytest.approx(np.mean(value_N) - 1.959964 * error), pytest.approx(np.mean(value_N) + 1.959964 * error)
    )  # fmt: skip
    assert (found.num_items, found.num_prompts) == (40, 40)


@given(VALUES)
def test_items_of_a_prompt_count_together(pairs: list[tuple[float, int]]) -> None:
    """The variance of a mean over clusters, by loops."""
    found = estimate(np.array([value for value, _ in pairs]), [str(prompt) for _, prompt in pairs])
    assert found is not None
    mean = sum(value for value, _ in pairs) / len(pairs)
    sums: dict[int, float] = {}
    for value, prompt in pairs:
        sums[prompt] = sums.get(prompt, 0.0) + value - mean
    assert found.mean == pytest.approx(mean)
    assert found.num_prompts == len(sums)
    if len(sums) < 2:
        assert found.low is None
        assert found.high is None
        return
    variance = len(sums) / (len(sums) - 1) * sum(one**2 for one in sums.values()) / len(pairs) ** 2
    assert found.low == pytest.approx(mean - 1.959964 * math.sqrt(variance), abs=1e-6)
    assert found.high == pytest.approx(mean + 1.959964 * math.sqrt(variance), abs=1e-6)


def test_copies_of_a_pair_are_no_new_evidence() -> None:
    value_N = np.random.default_rng(1).normal(size=25)
    prompts = [str(number) for number in range(25)]
    once, thrice = estimate(value_N, prompts), estimate(np.tile(value_N, 3), prompts * 3)
    assert once is not None
    assert thrice is not None
    assert (thrice.mean, thrice.low, thrice.high) == pytest.approx((once.mean, once.low, once.high))
    assert thrice.num_items == 75


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 7, 150)
    group_N = np.repeat(np.arange(150), sizes)
    value_N = rng.normal(size=150)[group_N] + 0.5 * rng.normal(size=len(group_N))
    found = estimate(value_N, [str(group) for group in group_N])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    sums, drawn = np.bincount(group_N, weights=value_N), rng.integers(0, 150, (4_000, 150))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.high - found.low == pytest.approx(high - low, rel=0.06)
    assert found.low == pytest.approx(low, abs=0.03)


def test_differences_are_paired_by_item_whatever_their_order() -> None:
    ours = values({"a": 100, "b": 0, "c": 50, "only ours": 0})
    theirs = values({"c": 100, "only theirs": 100, "a": 0, "b": 0})
    found = paired_difference(ours, theirs)
    assert found is not None
    difference_N = np.array([100 - 0, 0 - 0, 50 - 100])
    assert found.mean == pytest.approx(difference_N.mean())
    error = difference_N.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx(
        (difference_N.mean() - 1.959964 * error, difference_N.mean() + 1.959964 * error)
    )
    assert (found.num_items, found.num_prompts) == (3, 3)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """Two models that differ by little on items that differ by much: unpaired, the difference would drown."""
    rng = np.random.default_rng(3)
    base_N = rng.normal(0, 10, 100)
    ours, theirs = (
        {str(n): v for n, v in enumerate(base_N + shift)} for shift in (0.2 + 0.1 * rng.normal(size=100), 0)
    )
    found = paired_difference(values(ours), values(theirs))
    assert found is not None
    assert found.low is not None
    assert 0.15 < found.low < found.mean < 0.25


def test_nothing_in_common_is_nothing() -> None:
    assert paired_difference(values({"a": 1}), values({"b": 1})) is None
    assert estimate(np.array([]), []) is None
