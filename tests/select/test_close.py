"""Pairs beside a threshold, by hand and against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prefsel.rules import parse_rule
from prefsel.select.close import SHOWN, TOLERANCE, ClosePairs, close_pairs, rests_on_moments
from prefsel.select.compose import compile_rule
from prefsel.select.evaluate import answer, decide_leaf
from prefsel.select.table import table_rows

TINY = 2e-13
"""Below the tolerance."""


def close_to(rule: dict[str, Any], scores: list[float], num_shards: int, **columns: list) -> ClosePairs:
    table = pa.table({"pair_id": list(range(len(scores))), "s": scores, **columns})
    plan = compile_rule(parse_rule(rule))
    shards = [table_rows(table.take(list(range(n, len(scores), num_shards))), plan, "rule") for n in range(num_shards)]
    (leaf,) = plan.leaves
    found = decide_leaf(leaf, lambda asked: [answer(asked, rows) for rows in shards]).thresholds
    return ClosePairs.merge(close_pairs(leaf, found, rows) for rows in shards)


def listed(found: ClosePairs) -> set[int]:
    return {int(one.pair_id, 16) for one in found.nearest}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_pairs_on_both_sides_are_listed_and_ties_are_not(num_shards: int) -> None:
    # The last one kept of three is pair 2; 1 and 3 lie beside it, 4 ties with it, 5 is far.
    scores = [3.0, 1.0 + TINY, 1.0, 1.0 - TINY, 1.0, 0.5]
    found = close_to({"kind": "top", "score": "s", "count": 3}, scores, num_shards)
    assert (found.count, listed(found)) == (2, {1, 3})
    assert {one.threshold for one in found.nearest} == {1.0}
    assert found.to_json()["pairs"][0]["pair_id"] == f"{3:032x}"  # 1 - 2e-13 is rounded to the nearer side


def test_the_tolerance_is_relative_above_one() -> None:
    for scale, count in ((1.0, 0), (1e6, 1), (1e-6, 0)):
        scores = [2.0 * scale, scale, scale - 3e-12 * max(1.0, scale / 10)]
        found = close_to({"kind": "top", "score": "s", "count": 2}, scores, 1)
        assert found.count == count


def test_both_edges_of_a_band_and_the_number_of_above() -> None:
    scores = [0.0, 1.0, 1.0 + TINY, 2.0, 3.0 - TINY, 3.0, 4.0]
    band = {"kind": "band", "score": "s", "low": 20, "high": 80}  # places 1.2 and 4.8 of 6: rows 1 and 5 decide
    assert listed(close_to(band, scores, 2)) == {2, 4}
    above = {"kind": "above", "score": "s", "threshold": 1.0}
    assert listed(close_to(above, scores, 2)) == {1, 2}  # a pair on the number is in doubt


def test_each_stratum_has_its_own_threshold() -> None:
    scores = [2.0, 2.0 - TINY, 9.0, 8.0, 8.0 + TINY, 2.0]
    by = {"source": ["uf", "uf", "hh", "hh", "hh", "hh"]}
    quota = {"kind": "quota", "score": "s", "by": "source", "count": 3}  # one of uf, two of hh
    found = close_to(quota, scores, 2, **by)
    assert listed(found) == {1, 3}
    assert {one.threshold for one in found.nearest} == {2.0, 8.0 + TINY}


def test_many_are_counted_and_the_nearest_listed() -> None:
    rng = np.random.default_rng(0)
    near = (1.0 + rng.permutation(np.arange(-40, 40)) * 2.0**-52).tolist()
    scores = [*near, *(10.0 + np.arange(30.0)).tolist()]
    found = close_to({"kind": "top", "score": "s", "count": 70}, scores, 4)
    (threshold,) = {one.threshold for one in found.nearest}
    expected = [s for s in scores if 0 < abs(s - threshold) <= TOLERANCE]
    assert found.count == len(expected) > len(found.nearest) == SHOWN
    assert [one.distance for one in found.nearest] == sorted(abs(s - threshold) for s in expected)[:SHOWN]


def test_what_rests_on_moments() -> None:
    assert rests_on_moments({"explicit": {"count": 3, "mean": 0.0, "std": 1.0}})
    assert rests_on_moments({"rho_a": {"count": 3, "slope": 0.1}})
    assert not rests_on_moments({"scale_a": {"count": 3, "quantile": 0.1}, "@fuse": None})
    assert not rests_on_moments({})
