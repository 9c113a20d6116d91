"""Moments against NumPy and exact fractions, merged over any sharding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.numbers.moments import Covariation, Moments, merge_covariations, merge_moments, standardise, two_sum

finite = st.floats(-1e6, 1e6)


def exact(values: np.ndarray) -> tuple[Fraction, Fraction]:
    """Mean and population variance without rounding."""
    numbers = [Fraction(value) for value in values.tolist()]
    mean = sum(numbers) / len(numbers)
    return mean, sum((number - mean) ** 2 for number in numbers) / len(numbers)


def cut(values: np.ndarray, num_shards: int) -> list[np.ndarray]:
    place_N = np.random.default_rng(len(values)).integers(0, num_shards, len(values))
    return [values[place_N == shard] for shard in range(num_shards)]


@settings(deadline=None)
@given(finite, finite)
def test_two_sum_loses_nothing(a: float, b: float) -> None:
    total, rest = two_sum(a, b)
    assert Fraction(total) + Fraction(rest) == Fraction(a) + Fraction(b)
    assert total == a + b


@pytest.mark.parametrize("offset", [0.0, 1e9, -3e12])
@pytest.mark.parametrize("num_shards", [1, 7, 400])
def test_merged_moments_are_exact_to_1e12(offset: float, num_shards: int) -> None:
    value_N = np.random.default_rng(0).standard_normal(2000) + offset
    mean, variance = exact(value_N)
    merged = merge_moments(Moments.of(shard) for shard in cut(value_N, num_shards))
    assert merged.count == 2000
    # The error of the mean is held against the spread, not against the offset: that is what a z-score sees.
    error = Fraction(merged.mean) + Fraction(merged.mean_rest) - mean
    assert abs(error) <= 1e-12 * math.sqrt(variance)
    assert merged.std == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_standardised_values_do_not_depend_on_sharding(offset: float) -> None:
    value_N = np.random.default_rng(1).standard_normal(3000) + offset
    whole, *others = (
        standardise(value_N, merge_moments(Moments.of(shard) for shard in cut(value_N, num_shards)).to_json())
        for num_shards in (1, 3, 50)
    )
    mean, variance = exact(value_N)
    expected = [float(Fraction(value) - mean) / math.sqrt(variance) for value in value_N.tolist()]
    np.testing.assert_allclose(whole, expected, rtol=1e-12, atol=1e-12)
    for other in others:
        np.testing.assert_allclose(other, whole, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=40), st.integers(1, 8))
def test_slope_is_covariance_over_variance(pairs: list[tuple[float, float]], num_shards: int) -> None:
    both = np.array(pairs)
    whole = Covariation.of(both[:, 0], both[:, 1])
    place_N = np.random.default_rng(0).integers(0, num_shards, len(pairs))
    merged = merge_covariations(Covariation.of(*both[place_N == shard].T) for shard in range(num_shards))
    (x_mean, x_variance), (y_mean, y_variance) = exact(both[:, 0]), exact(both[:, 1])
    covariance = sum((Fraction(x) - x_mean) * (Fraction(y) - y_mean) for x, y in pairs)
    scale = len(pairs) * math.sqrt(x_variance) * math.sqrt(y_variance) + 1e-300
    for found in (whole, merged):
        assert abs(Fraction(found.product) - covariance) <= 1e-11 * scale + 1e-9
        assert found.x.is_constant == (x_variance == 0)
        if x_variance > 1:
            assert abs(found.slope - float(covariance / (x_variance * len(pairs)))) <= 1e-10 * (1 + scale)


def test_equal_values_are_constant_whatever_rounding_says() -> None:
    value_N = np.full(1001, 0.1)
    merged = merge_moments([Moments.of(value_N[:3]), Moments.of(value_N[3:])])
    assert merged.is_constant
    assert not merge_moments([merged, Moments.of(np.array([0.1 + 1e-16]))]).is_constant


def test_empty_shards_change_nothing() -> None:
    some = Moments.of(np.array([1.0, 2.0]))
    assert merge_moments([Moments.of(np.empty(0)), some, Moments.of(np.empty(0))]) == some
    assert merge_moments([]).count == 0


def test_sums_that_overflow_are_told_and_never_a_number() -> None:
    for values in ([1e154, -1e155], [1.7e308, 1.7e308, 0.0], [1e200, 3e200], [1e-200, 2e-200]):
        value_N = np.array(values)
        assert Moments.of(value_N).fault()
        assert merge_moments(Moments.of(value_N[n : n + 1]) for n in range(len(values))).fault()
        assert Covariation.of(value_N, np.arange(len(values), dtype=float)).correlation is None
    assert not Moments.of(np.array([1e153, -1e153])).fault()
    assert not Moments.of(np.full(3, 1e200)).fault()  # equal values have no deviation


@pytest.mark.parametrize("scale", [1.0, 1e120, 1e-120, 1e-150])
def test_a_correlation_does_not_overflow_where_its_sums_do_not(scale: float) -> None:
    """The product of two sums of squares did: a correlation of 1 read 0."""
    x_N = np.array([1.0, 2.0, 4.0, -3.0])
    y_N = np.array([1.0, 3.0, 3.0, -2.0])
    expected = np.corrcoef(x_N, y_N)[0, 1]
    assert Covariation.of(x_N * scale, y_N * scale).correlation == pytest.approx(expected, rel=1e-12)
    assert Covariation.of(x_N * scale, -x_N).correlation == pytest.approx(-1.0, rel=1e-12)
    assert Covariation.of(x_N, np.ones(4)).correlation is None
