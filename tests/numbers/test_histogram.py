"""Histograms of the leading 16 bits against counting row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import NonFiniteError
from prefsel.numbers import histogram as histograms
from prefsel.numbers.histogram import Histogram, histogram, key_score, order_keys, stratum_histograms

EDGES = [0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1e9 + 1e-6, 1e9]
anything = st.floats(allow_nan=False, allow_infinity=False)
tied = st.sampled_from([0.5, 0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6])
scores = st.lists(st.one_of(tied, anything, st.sampled_from(EDGES)), min_size=1, max_size=60)


@settings(deadline=None)
@given(anything, anything)
def test_order_keys_order_as_floats(a: float, b: float) -> None:
    key_a, key_b = (int(key) for key in order_keys(np.array([a, b])))
    assert (key_a < key_b) == (a < b)
    assert (key_a == key_b) == (a == b)
    assert key_score(key_a) == a


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused_with_their_rows(bad: float) -> None:
    score_N = np.array([1.0, 2.0, bad, 3.0])
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        order_keys(score_N)
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        histogram(score_N)
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        stratum_histograms(score_N, np.array([0, 0, 1, 1]), 2)


@settings(deadline=None)
@given(scores)
def test_histogram_counts_the_top_sixteen_bits(values: list[float]) -> None:
    score_N = np.array(values)
    expected: dict[int, int] = {}
    for key in order_keys(score_N).tolist():
        expected[key >> 48] = expected.get(key >> 48, 0) + 1
    found = histogram(score_N)
    assert dict(zip(found.bins.tolist(), found.counts.tolist())) == expected
    assert found.bins.tolist() == sorted(expected)
    back = Histogram.from_json(found.to_json())
    assert back.bins.tolist() == found.bins.tolist()
    assert back.bins.dtype == np.uint16
    halves = [histogram(score_N[: len(values) // 2]), histogram(score_N[len(values) // 2 :])]
    assert Histogram.merge(halves).to_json() == found.to_json()


@settings(deadline=None)
@given(scores, st.integers(1, 130), st.integers(0, 9))
def test_stratum_histograms_are_those_of_the_stratum(values: list[float], num_strata: int, seed: int) -> None:
    score_N = np.array(values)
    code_N = np.random.default_rng(seed).integers(-1, num_strata, len(values))
    found = stratum_histograms(score_N, code_N, num_strata)
    assert len(found) == num_strata
    for code, one in enumerate(found):
        assert one.to_json() == histogram(score_N[code_N == code]).to_json()


def test_histograms_of_several_blocks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    score_N = np.random.default_rng(0).standard_normal(1000)
    code_N = np.arange(1000) % 3
    whole = histogram(score_N).to_json()
    strata = [histogram.to_json() for histogram in stratum_histograms(score_N, code_N, 3)]
    monkeypatch.setattr(histograms.blocks, "__defaults__", (7,))
    monkeypatch.setattr(histograms, "BLOCK", 7)
    assert histogram(score_N).to_json() == whole
    assert [histogram.to_json() for histogram in stratum_histograms(score_N, code_N, 3)] == strata


def test_percentile_is_the_middle_of_the_bin() -> None:
    # 1.0 and 1.01 share a bin (a sixteenth of a power of two), 2.0 and 4.0 have their own.
    found = histogram(np.array([1.0, 1.01, 2.0, 4.0]))
    assert found.percentile(np.array([1.0, 1.01, 2.0, 4.0, 0.5, 9.0])).tolist() == [25, 25, 62.5, 87.5, 0, 100]
