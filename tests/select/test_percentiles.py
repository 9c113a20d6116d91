from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.numbers.histogram import histogram
from prefsel.plan.derived import marks
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule
from prefsel.select.evaluate import answer, decide_leaf
from prefsel.select.percentiles import Percentiles, Pin, pins
from prefsel.select.table import select_table, table_rows

# Ties, one bin that holds many different scores, both signs: what real scores are like.
SCORES = st.lists(
    st.sampled_from([0.0, 1.0, -3.5]) | st.floats(100.0, 101.0) | st.floats(-5.0, 5.0), min_size=1, max_size=60
)


def decided(scores: list[float], rule: dict[str, Any]) -> tuple[Percentiles, np.ndarray]:
    """The percentiles under a rule, and which rows it keeps."""
    table = pa.table({"pair_id": range(len(scores)), "s": pa.array(scores, pa.float64())})
    plan = compile_rule(parse_rule(rule))
    rows = table_rows(table, plan, "test")
    found = [decide_leaf(leaf, lambda asked: [answer(asked, rows)]).thresholds for leaf in plan.leaves]
    total = histogram(np.array(scores))
    is_kept_N = np.zeros(len(scores), bool)
    is_kept_N[select_table(table, rule)] = True
    return Percentiles.of_rule(total, plan, marks(plan, found), len(scores)), is_kept_N


def test_a_bin_is_split_where_the_rank_is_known() -> None:
    # 1.00 to 1.05 share a bin (a sixteenth of a power of two); the two largest of them are kept, and so is 2.0.
    scores = [0.5, 1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 2.0, 0.25, 0.125]
    binned = Percentiles(histogram(np.array(scores)))
    assert binned.of(np.array(scores)).tolist() == [25, 60, 60, 60, 60, 60, 60, 95, 15, 5]
    found, is_kept_N = decided(scores, {"kind": "top", "score": "s", "ratio": 0.3})
    assert np.flatnonzero(is_kept_N).tolist() == [5, 6, 7]
    assert found.pins == (Pin(1.04, 70.0),)
    # The bin runs from 30 to 90: below the cut its middle is 50, at the cut it is 70 exactly, above it is 80.
    assert found.of(np.array(scores)).tolist() == [25, 50, 50, 50, 50, 70, 80, 95, 15, 5]


def test_without_a_cut_it_is_the_middle_of_the_bin() -> None:
    score_N = np.array([1.0, 1.01, 2.0, 4.0])
    found = Percentiles(histogram(score_N))
    asked = np.array([1.0, 1.01, 2.0, 4.0, 0.5, 9.0])
    assert found.of(asked).tolist() == histogram(score_N).percentile(asked).tolist()
    assert [part.tolist() for part in found.ranges(asked[:3])] == [[0, 0, 50], [50, 50, 75]]


@given(SCORES)
def test_where_nothing_is_cut_no_bit_moves(scores: list[float]) -> None:
    score_N, total = np.array(scores), histogram(np.array(scores))
    assert Percentiles(total).of(score_N).tolist() == total.percentile(score_N).tolist()
    # Nor beside a cut: only the bin that it splits has two middles.
    found = Percentiles(total, (Pin(0.5, 100.0 * int((score_N < 0.5).sum()) / len(scores)),)).of(score_N)
    is_beside_N = (score_N < 0.5) | (score_N >= 0.53125)
    assert found[is_beside_N].tolist() == total.percentile(score_N)[is_beside_N].tolist()


@given(SCORES, st.integers(1, 100), st.booleans())
def test_a_top_never_shows_a_pair_on_the_other_side(scores: list[float], percent: int, is_reverse: bool) -> None:
    num_kept = percent * len(scores) // 100
    rule = {"kind": "top", "score": "s", "count": max(1, num_kept), "reverse": is_reverse}
    found, is_kept_N = decided(scores, rule)
    shown_N = found.of(np.array(scores))
    kept = int(is_kept_N.sum())
    edge = 100.0 * (kept if is_reverse else len(scores) - kept) / len(scores)
    high, low = (~is_kept_N, is_kept_N) if is_reverse else (is_kept_N, ~is_kept_N)
    assert (shown_N[high] >= edge).all()
    assert (shown_N[low] <= edge).all()
    require_plausible(found, scores)


@given(SCORES, st.integers(0, 99), st.integers(1, 100), st.booleans())
def test_a_band_never_shows_a_pair_on_the_other_side(
    scores: list[float], low: int, width: int, is_reverse: bool
) -> None:
    high = min(100, low + width)
    found, is_kept_N = decided(scores, {"kind": "band", "score": "s", "low": low, "high": high, "reverse": is_reverse})
    shown_N = found.of(np.array(scores))
    is_inside_N = ~is_kept_N if is_reverse else is_kept_N
    assert ((shown_N[is_inside_N] >= low) & (shown_N[is_inside_N] <= high)).all()
    assert ((shown_N[~is_inside_N] <= low) | (shown_N[~is_inside_N] >= high)).all()
    assert (np.diff(shown_N[np.argsort(scores, kind="stable")]) >= 0).all()


def require_plausible(found: Percentiles, scores: list[float]) -> None:
    """Percentiles rise with the score, and what is shown lies in the bin of the pair's true rank."""
    score_N = np.array(scores)
    shown_N = found.of(score_N)
    assert (np.diff(shown_N[np.argsort(score_N, kind="stable")]) >= 0).all()
    low_N, high_N = found.ranges(score_N)
    for score, low, high in zip(scores, low_N, high_N):
        below, up_to = sum(one < score for one in scores), sum(one <= score for one in scores)
        assert low <= 100 * up_to / len(scores)
        assert high >= 100 * below / len(scores)


@pytest.mark.parametrize(
    ("rule", "marks_", "expected"),
    [
        ({"kind": "top", "score": "s", "ratio": 0.3}, [2.0], [Pin(2.0, 75.0)]),  # floor(0.3 · 8) = 2 of 8
        ({"kind": "top", "score": "s", "count": 2, "reverse": True}, [2.0], [Pin(2.0, 25.0)]),
        ({"kind": "band", "score": "s", "low": 20, "high": 80}, [1.0, 2.0], [Pin(1.0, 20.0), Pin(2.0, 80.0)]),
        ({"kind": "above", "score": "s", "threshold": 0.0}, [0.0], []),
        ({"kind": "quota", "score": "s", "ratio": 0.5, "by": "source"}, [], []),
        ({"kind": "top", "score": "s", "ratio": 0.3}, [], []),  # written before marks were kept
        (
            {
                "kind": "intersect",
                "rules": [
                    {"kind": "above", "score": "s", "threshold": 0.0},
                    {"kind": "top", "score": "t", "ratio": 0.5},
                    {"kind": "band", "score": "s", "low": 10, "high": 90},
                ],
            },
            [0.0, 1.0, 2.0],
            [Pin(1.0, 10.0), Pin(2.0, 90.0)],
        ),
    ],
)
def test_what_every_kind_of_rule_fixes(rule: dict[str, Any], marks_: list[float], expected: list[Pin]) -> None:
    assert list(pins(compile_rule(parse_rule(rule)), marks_, 8)) == expected


def test_nothing_is_pinned_where_the_rule_chose_from_fewer_pairs() -> None:
    plan = compile_rule(parse_rule({"kind": "top", "score": "s", "ratio": 0.5}))
    total = histogram(np.arange(8.0))
    assert Percentiles.of_rule(total, plan, [4.0], 8).pins == (Pin(4.0, 50.0),)
    assert Percentiles.of_rule(total, plan, [4.0], 7).pins == ()
