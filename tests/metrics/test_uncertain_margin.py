"""Uncertain margin by hand and against the standard library."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import score_table

TABLE = sided(
    rm_a=[(1.0, 0.0), (2.0, 0.0), (0.3, 0.0), (1.0, None)],
    rm_b=[(3.0, 0.0), (2.0, 0.0), (0.1, 0.0), (1.0, 0.0)],
    rm_c=[(5.0, 0.0), (2.0, 0.0), (0.2, 0.0), (1.0, 0.0)],
)
"""Margins (1, 3, 5): mean 3, deviation √(8/3); (2, 2, 2): 2 and 0."""


def test_mean_less_deviation() -> None:
    found = score_table(TABLE, "uncertain_margin", rms=["a", "b", "c"])
    assert found[0] == pytest.approx(3 - (8 / 3) ** 0.5, rel=1e-15)
    assert found[1] == 2.0
    assert np.isnan(found[3])
    assert score_table(TABLE, "uncertain_margin", rms=["a", "b", "c"], beta=0.0)[0] == 3.0
    assert score_table(TABLE, "uncertain_margin", rms=["a", "b"], beta=2.0)[0] == 2 - 2 * 1


def test_equal_margins_tie_exactly() -> None:
    """0.1 three times has a rounded mean that is not 0.1: its deviation must still be 0."""
    table = sided(rm_a=[(0.1, 0.0)] * 2, rm_b=[(0.1, 0.0)] * 2, rm_c=[(0.1, 0.0)] * 2)
    low, high = (score_table(table, "uncertain_margin", rms=["a", "b", "c"], beta=beta) for beta in (0.0, 1e9))
    assert low.tolist() == high.tolist()


@pytest.mark.parametrize("num_shards", [1, 7])
def test_against_the_standard_library(num_shards: int) -> None:
    names = [f"rm_{rm}_{side}" for rm in "abc" for side in ("chosen", "rejected")]
    columns = random_columns(names, 200)
    found, _ = score_shards(float_table(columns), "uncertain_margin", num_shards, rms=["a", "b", "c"], beta=0.7)
    for row, score in zip(rows_of(columns), found):
        if None in row.values():
            assert np.isnan(score)
            continue
        margins = [row[f"rm_{rm}_chosen"] - row[f"rm_{rm}_rejected"] for rm in "abc"]
        assert score == pytest.approx(
            statistics.fmean(margins) - 0.7 * statistics.pstdev(margins), rel=1e-12, abs=1e-12
        )


@pytest.mark.parametrize("rms", [["a"], ["a", "a"], []])
def test_one_judge_has_no_deviation(rms: list[str]) -> None:
    with pytest.raises(UserError, match="needs at least two different ones"):
        score_table(TABLE, "uncertain_margin", rms=rms)
