"""DualMargin against a pair-by-pair re-implementation: every kind of bound, any sharding, saturation and errors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import METRICS, score_table
from prefsel.metrics.dual_margin import agreement

SIDES = ("chosen", "rejected")
NAMES = [f"{prefix}_{side}" for prefix in ("rm_a", "rm_b", "logps_p", "logps_q", "logps_r") for side in SIDES]
IMPLICIT = [{"policy": "p", "reference": "r"}, {"policy": "q", "reference": "r"}]
SOURCES = {
    "one explicit": {"explicit": ["a"]},
    "one each": {"explicit": ["a"], "implicit": IMPLICIT[:1]},
    "all": {"explicit": ["a", "b"], "implicit": IMPLICIT},
}
pytestmark = pytest.mark.filterwarnings("ignore:dual_margin")


def naive_margins(columns: dict[str, list], explicit: list[str], implicit: list[dict]) -> list[list[float] | None]:
    """The margins of each pair, explicit first; None where a number is missing."""
    rows = []
    for n in range(len(columns["rm_a_chosen"])):
        margins = []
        for rm in explicit:
            margins.append([columns[f"rm_{rm}_{side}"][n] for side in SIDES])
        for one in implicit:
            for side in SIDES:
                both = [columns[f"logps_{one[model]}_{side}"][n] for model in ("policy", "reference")]
                margins.append([None, None] if None in both else [both[0] - both[1], 0.0])
        # An implicit source stands as two rows here, chosen and rejected.
        values = [None if None in pair else pair[0] - pair[1] for pair in margins]
        if None in values:
            rows.append(None)
            continue
        first, rest = values[: len(explicit)], values[len(explicit) :]
        rows.append(first + [rest[k] - rest[k + 1] for k in range(0, len(rest), 2)])
    return rows


def naive_bounds(rows: list[list[float]], num_explicit: int, upper: object) -> list[tuple[float, float]]:
    """(L, U) of each source; the search steps by one as the authors' code does."""
    found = []
    for place in range(len(rows[0])):
        values = [row[place] for row in rows]
        if upper == "quantile":
            found.append((np.quantile(values, 0.05), np.quantile(values, 0.95)))
        elif upper == "search":
            bound = int(max(values) / (1.5 if place < num_explicit else 2))
            while True:
                above = sum(bound < value <= max(values) for value in values)
                if above < 30 or above < max(values) - bound or bound >= int(max(values)):
                    break
                bound += 1
            found.append((-2.0, bound))
        else:
            found.append((-2.0, upper[place]))
    return found


def naive_score(row: list[float], bounds: list[tuple[float, float]], mode: str) -> float:
    """P as a ratio of products, or the sum."""
    if mode == "add":
        return sum(row)
    yes = no = 1.0
    for margin, (lower, upper) in zip(row, bounds):
        p = (min(max(margin, lower), upper) - lower) / (upper - lower)
        p = min(max(p, 1e-6), 1 - 1e-6)
        yes, no = yes * p, no * (1 - p)
    return yes / (yes + no)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(20, 150),
    st.sampled_from([1, 3, 60]),
    st.sampled_from(list(SOURCES)),
    st.sampled_from(["search", "quantile", "numbers", "add"]),
    st.sampled_from([1.0, 8.0, 40.0]),
)
def test_equals_the_definition_for_any_sharding(
    num_rows: int, num_shards: int, which: str, upper: str, scale: float
) -> None:
    columns = random_columns(NAMES, num_rows, scale=scale, nulls=0.05)
    sources = SOURCES[which]
    rows = naive_margins(columns, sources["explicit"], sources.get("implicit", []))
    there = [row for row in rows if row is not None]
    mode = "add" if upper == "add" else "mul"
    given_upper = [1.0, 2.5, 3.0, 0.5][: len(there[0])] if upper == "numbers" else upper
    bounds = [] if mode == "add" else naive_bounds(there, len(sources["explicit"]), given_upper)
    params = {**sources, "mode": mode} | ({} if mode == "add" else {"upper": given_upper})
    found, fitted = score_shards(float_table(columns), "dual_margin", num_shards, **params)
    expected = [math.nan if row is None else naive_score(row, bounds, mode) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    names = ["rm_a", "p/r", "q/r"] if which == "one each" else ["rm_a", "rm_b", "p/r", "q/r"]
    for place, (lower, upper_bound) in enumerate(bounds):
        values = np.array([row[place] for row in there])
        low, high = (fitted[f"saturated {end} {names[place]}"] for end in ("low", "high"))
        assert low == {"count": len(there), "share": np.mean(values <= lower)}
        assert high == {"count": len(there), "share": np.mean(values >= upper_bound)}
    np.testing.assert_array_equal(found, score_table(float_table(columns), "dual_margin", **params))


def test_quantiles_of_choice() -> None:
    table = sided(rm_a=[(float(n), 0.0) for n in range(101)])
    params = {"explicit": ["a"], "upper": "quantile", "lower_quantile": 0.1, "upper_quantile": 0.6}
    found, fitted = score_shards(table, "dual_margin", 4, **params)
    assert fitted["lower rm_a"] == {"count": 101, "quantile": 10.0}
    assert fitted["upper rm_a"] == {"count": 101, "quantile": 60.0}
    # 0 to 10 and 60 to 100: a margin on the bound is held fast by it.
    assert fitted["saturated low rm_a"]["share"] == 11 / 101
    assert fitted["saturated high rm_a"]["share"] == 41 / 101
    np.testing.assert_allclose(found, np.clip((np.arange(101) - 10) / 50, 1e-6, 1 - 1e-6), rtol=1e-9)


def test_a_quantile_of_zero_is_a_bound_like_any_other() -> None:
    table = sided(rm_a=[(margin, 0.0) for margin in (-4.0, -2.0, 0.0)])
    params = {"explicit": ["a"], "upper": "quantile", "lower_quantile": 0.0, "upper_quantile": 1.0}
    assert score_table(table, "dual_margin", **params)[1] == pytest.approx(0.5)


def test_one_number_serves_all_sources() -> None:
    table = float_table(random_columns(NAMES, 30, nulls=0.0))
    one, each = (score_table(table, "dual_margin", **SOURCES["all"], upper=upper) for upper in (3, [3] * 4))
    np.testing.assert_array_equal(one, each)


def test_margins_without_beta_and_without_clipping_when_added() -> None:
    table = sided(rm_a=[(50.0, 0.0)], logps_p=[(-10, -12)], logps_r=[(-11, -11.5)])
    assert score_table(table, "dual_margin", **SOURCES["one each"], mode="add").tolist() == [51.5]


def test_many_sources_do_not_underflow() -> None:
    # (1e-6)^60 is below the smallest float64, and 60 against 60 is a draw.
    low, high = np.full(1, 1e-6), np.full(1, 1 - 1e-6)
    assert agreement([low] * 60 + [high] * 60)[0] == pytest.approx(0.5, abs=1e-6)
    assert agreement([low] * 60)[0] >= 0.0
    assert agreement([high] * 60)[0] == 1.0


def test_saturation_is_told() -> None:
    # On the scale of ArmoRM's rewards: U = 0, and 70 % of the margins are not below it.
    table = sided(rm_a=[(0.01 if n < 70 else -0.01, 0.0) for n in range(100)])
    with pytest.warns(UserWarning, match="rm_a: 0% of the pairs are at or below .* and 70% at or above") as seen:
        _, fitted = score_shards(table, "dual_margin", 3, explicit=["a"])
    assert len(seen) == 1
    assert fitted["upper rm_a"]["upper"] == 0
    assert fitted["saturated high rm_a"] == {"count": 100, "share": 0.7}
    with pytest.warns(UserWarning, match="consider upper: quantile") as seen:
        score_table(table, "dual_margin", explicit=["a"])
    assert seen[0].filename == __file__


def test_half_saturated_is_not_told() -> None:
    table = sided(rm_a=[(0.01 if n < 50 else -0.01, 0.0) for n in range(100)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_table(table, "dual_margin", explicit=["a"])
        score_table(table, "dual_margin", explicit=["a"], mode="add")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "explicit, implicit: got none; needs one source or more, each once"),
        ({"explicit": ["a", "a"]}, "each once"),
        ({"explicit": ["a"], "upper": [1, 2]}, "upper: got 2 numbers for 1 sources: rm_a"),
        ({"explicit": ["a"], "upper": -2}, "upper: got -2; must be above lower, -2"),
        ({"explicit": ["a"], "upper": 1, "lower": 1.5}, "upper: got 1; must be above lower, 1.5"),
        ({"explicit": ["a"], "upper": float("nan")}, "finite number"),
        ({"explicit": ["a"], "upper": "quantile", "lower": -1}, "lower: not used with mode='mul', upper='quantile'"),
        ({"explicit": ["a"], "upper_quantile": 0.9}, "upper_quantile: not used with mode='mul', upper='search'"),
        ({"explicit": ["a"], "mode": "add", "lower": -1}, "lower: not used with mode='add'"),
        (
            {"explicit": ["a"], "upper": "quantile", "lower_quantile": 0.96},
            "lower_quantile 0.96 must be below upper_quantile",
        ),
        ({"explicit": ["a"], "epsilon": 0.5}, "epsilon: got 0.5"),
        ({"implicit": [{"policy": "p"}]}, "implicit.0.reference: required, but missing"),
        ({"explicit": ["a"], "mode": "product"}, "mode: got 'product'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(pa.table({"pair_id": [1]}), "dual_margin", **params)
    assert message in str(error.value)


def test_bounds_that_leave_no_room_are_refused() -> None:
    negative = sided(rm_a=[(-9.0, 0.0), (-8.0, 0.0)])
    with pytest.raises(UserError, match=r"rm_a: upper bound -5 is not above lower bound -2; use a smaller lower"):
        score_table(negative, "dual_margin", explicit=["a"])
    flat = sided(rm_a=[(1.0, 0.0)] * 5)
    with pytest.raises(
        UserError, match="rm_a: upper bound 1 is not above lower bound 1; use two quantiles that differ"
    ):
        score_table(flat, "dual_margin", explicit=["a"], upper="quantile")
    with pytest.raises(UserError, match="dual_margin: the margin of rm_a: no pairs"):
        score_table(float_table({"rm_a_chosen": [None], "rm_a_rejected": [1.0]}), "dual_margin", explicit=["a"])


def test_a_shared_reference_is_read_once() -> None:
    metric = METRICS["dual_margin"]
    names = metric.columns(metric.params.model_validate(SOURCES["all"]))
    assert len(names) == len(set(names)) == 10
