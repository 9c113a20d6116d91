"""Shares of right labels: the largest likelihood, and sums that no dealing of rows changes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from prefsel.numbers.label_share import Slope, fit_label_shares, slopes_by_group


def test_slopes_by_hand() -> None:
    """At η = 1/2, d = 2 (2p − 1): of p = 3/4 it is 1, of 1/4 it is −1, of 1/2 it is 0."""
    margin_N = np.array([math.log(3), -math.log(3), 0.0, math.log(3)])
    found = Slope.of(margin_N, 0.0)
    assert found.count == 4
    assert found.total == pytest.approx(1.0, abs=1e-15)
    assert found.squares == pytest.approx(3.0, rel=1e-14)
    assert all(
        math.isfinite(one.total) for m in (800.0, -800.0) for t in (60.0, -60.0) for one in [Slope.of(np.array([m]), t)]
    )


def test_merged_sums_are_those_of_all_rows_to_the_last_bit() -> None:
    """Of numbers that nearly cancel, against exact fractions."""
    rng = np.random.default_rng(0)
    margin_N = rng.normal(0, 1e-6, 3000)
    values = [Slope.of(margin_N[[row]], 0.3).total for row in range(3000)]
    exact = sum(map(Fraction, values))
    for num_shards in (1, 2, 13, 100):
        parts = [Slope.of(part, 0.3) for part in np.array_split(rng.permutation(margin_N), num_shards)]
        assert Slope.merge(parts).total == float(exact)


def test_groups_are_told_apart_and_only_those_asked_about_answer() -> None:
    margin_N, group_N = np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "a"], object)
    found = slopes_by_group(margin_N, group_N)
    assert {name: one.count for name, one in found.items()} == {"a": 2, "b": 1}
    assert slopes_by_group(margin_N, group_N, {"b": 0.0, "gone": 0.0}) == {"b": Slope.of(margin_N[[1]], 0.0)}


def test_every_group_reaches_the_largest_likelihood() -> None:
    """Where EM is too slow to compare with: no share nearby is more likely than the one found."""
    rng = np.random.default_rng(1)
    passes = []
    for _ in range(200):
        scale = 10 ** rng.uniform(-3, 2)
        margin_N = rng.normal(rng.normal() * scale, scale, 50)
        group_N = np.array(["g"] * 50, object)
        shares, taken = fit_label_shares(
            [slopes_by_group(margin_N, group_N)], lambda logits, m=margin_N, g=group_N: [slopes_by_group(m, g, logits)]
        )
        passes.append(taken)
        one = shares["g"]
        assert one.right + one.wrong == pytest.approx(1.0, abs=1e-15)
        logit = math.log(one.right) - math.log(one.wrong) if 0 < one.right < 1 else math.copysign(59.0, one.right - 0.5)
        if one.right < 1:
            assert Slope.of(margin_N, logit + 1e-6).total < 0
        if one.right > 0:
            assert Slope.of(margin_N, logit - 1e-6).total > 0
    assert max(passes) <= 40


@pytest.mark.parametrize(("margin", "eta"), [(1e-200, 1.0), (-1e-200, 0.0)])
def test_margins_whose_squares_vanish_still_have_an_end(margin: float, eta: float) -> None:
    margin_N, group_N = np.array([margin, margin]), np.array(["a", "a"], object)

    def ask(logits):
        return [slopes_by_group(margin_N, group_N, logits)]

    found, _ = fit_label_shares([slopes_by_group(margin_N, group_N)], ask)
    assert found["a"].right == eta
