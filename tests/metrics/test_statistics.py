"""Fitting over shards: the protocol, whatever the metric."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.config import Options
from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics.statistics import Columns, Fitted, Metric, Need, Request, Statistic, fit, reply
from prefsel.metrics.table import score_pairs
from prefsel.numbers import ranges


class NoParams(Options):
    """None."""


def first(columns: Columns, params: NoParams, fitted: Fitted) -> dict[str, Need]:
    x_N, y_N = columns["x"], columns["y"]
    return {
        "moments": Need(Statistic("moments", "toy: x"), x_N),
        "slope": Need(Statistic("slope", "toy: slope"), y_N, x_N),
    }


def second(columns: Columns, params: NoParams, fitted: Fitted) -> dict[str, Need]:
    residual_N = columns["y"] - fitted["slope"]["slope"] * columns["x"]
    return {f"q{q}": Need(Statistic("quantile", f"toy: {q}", q), residual_N) for q in (0.07, 0.9, 1.0)}


TOY = Metric("toy", NoParams, lambda p: ("x", "y"), lambda c, p, f: c["x"], "none", rounds=lambda p: (first, second))


def fit_over(columns: Columns, num_shards: int, num_values: int = 1000) -> tuple[Fitted, list[Request]]:
    place_N = np.random.default_rng(0).integers(0, num_shards, len(columns["x"]))
    shards = [{k: v[place_N == shard] for k, v in columns.items()} for shard in range(num_shards)]
    requests = []

    def ask(request: Request) -> list[dict]:
        requests.append(request)
        return [reply(TOY, NoParams(), shard, request) for shard in shards]

    with mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values):
        return fit(TOY, NoParams(), ask), requests


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.sampled_from([1, 5, 50]), st.sampled_from([2, 3, 1000]), st.sampled_from([0.0, 1e9]))
def test_sharded_statistics_are_those_of_numpy(num_rows: int, num_shards: int, num_values: int, shift: float) -> None:
    rng = np.random.default_rng(num_rows)
    x_N = np.round(rng.standard_normal(num_rows), 1) * 10 + np.arange(num_rows) + shift
    y_N = 0.3 * (x_N - shift) + rng.standard_normal(num_rows)
    fitted, _ = fit_over({"x": x_N, "y": y_N}, num_shards, num_values)
    assert fitted["moments"]["mean"] == pytest.approx(x_N.mean(), rel=1e-12)
    assert fitted["moments"]["std"] == pytest.approx((x_N - shift).std(), rel=1e-12)
    slope = np.cov(x_N - shift, y_N)[0, 1] / (x_N - shift).var(ddof=1)
    assert fitted["slope"]["slope"] == pytest.approx(slope, rel=1e-11)
    # The second round used the slope of the first one, and its quantiles are exact.
    residual_N = y_N - fitted["slope"]["slope"] * x_N
    for q in (0.07, 0.9, 1.0):
        assert fitted[f"q{q}"] == {"count": num_rows, "quantile": np.quantile(residual_N, q)}


def test_fitted_numbers_are_plain_json_and_rounds_are_few() -> None:
    x_N = np.arange(100.0)
    fitted, requests = fit_over({"x": x_N, "y": np.sin(x_N)}, 3)
    assert json.loads(json.dumps(fitted)) == fitted
    # One request for the sums, one for the Summaries, one for the ranks around all quantiles together.
    assert [(request.round, len(request.queries)) for request in requests] == [(0, 0), (1, 0), (1, 5)]
    assert requests[0].fitted == {}
    assert set(requests[1].fitted) == {"moments", "slope"}


def test_statistics_that_cannot_divide_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"toy: x has zero variance \(3 pairs\)"):
        fit_over({"x": np.ones(3), "y": np.arange(3.0)}, 2)
    with pytest.raises(UserError, match="toy: x: no pairs to compute it from"):
        fit_over({"x": np.empty(0), "y": np.empty(0)}, 2)
    with pytest.raises(UserError, match=r"toy: 0.07 has quantile 0 at 0.07, and would divide by it \(4 pairs\)"):
        fit_over({"x": np.arange(4.0), "y": np.zeros(4)}, 2)


def over_shards(needs: list[dict[str, Need]], *, text: str = "") -> Fitted:
    """One round of ready-made needs, one dict per shard."""
    toy = Metric(
        "toy", NoParams, lambda p: ("x",), lambda c, p, f: c["x"], "none",
        rounds=lambda p: (lambda c, p, f: needs[int(c["x"][0])],),
        warnings=lambda p, f: [text] if text else [],
    )  # fmt: skip
    shards = [{"x": np.array([float(place)])} for place in range(len(needs))]
    return fit(toy, NoParams(), lambda request: [reply(toy, NoParams(), shard, request) for shard in shards])


def test_what_does_not_divide_may_be_zero() -> None:
    flat = np.zeros(4)
    needs = {
        "moments": Need(Statistic("moments", "toy", may_be_zero=True), flat),
        "quantile": Need(Statistic("quantile", "toy", 0.5, may_be_zero=True), flat),
    }
    fitted = over_shards([needs, needs])
    assert fitted["moments"] == {"count": 8, "mean": 0.0, "mean_rest": 0.0, "std": 0.0}
    assert fitted["quantile"] == {"count": 8, "quantile": 0.0}


def test_a_share_counts_rows() -> None:
    parts = [[True, False], [], [True]]
    fitted = over_shards([{"s": Need(Statistic("share", "toy"), np.array(part, bool))} for part in parts])
    assert fitted["s"] == {"count": 3, "share": 2 / 3}
    with pytest.raises(UserError, match="toy: no pairs to compute it from"):
        over_shards([{"s": Need(Statistic("share", "toy"), np.empty(0, bool))}])


def test_an_upper_bound_needs_rows() -> None:
    statistic = Statistic("upper_bound", "toy", divisor=2.0, min_above=30)
    with pytest.raises(UserError, match="toy: no pairs to compute it from"):
        over_shards([{"u": Need(statistic, np.empty(0))}] * 2)
    fitted = over_shards([{"u": Need(statistic, np.array([8.0]))}, {"u": Need(statistic, np.empty(0))}])
    assert fitted["u"] == {"count": 1, "maximum": 8.0, "upper": 4.0, "above": 1}


def test_a_metric_may_warn_about_its_numbers() -> None:
    needs = {"s": Need(Statistic("share", "toy"), np.array([True]))}
    with pytest.warns(UserWarning, match="toy: looks odd"):
        over_shards([needs], text="toy: looks odd")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([0.0, np.nan, 1.0], r"1 scores are NaN, first at rows \[2\]"),
        ([np.inf, 0.0, -np.inf], r"2 scores overflow, first at rows \[0, 3\]"),
        ([np.inf, np.nan, 1.0], r"1 scores are NaN, first at rows \[2\]; 1 scores overflow, first at rows \[0\]"),
    ],
)
def test_a_score_that_is_nan_does_not_overflow(found: list[float], told: str) -> None:
    toy = Metric("toy", NoParams, lambda p: ("x",), lambda c, p, f: np.array(found), "none")
    with pytest.raises(NonFiniteError, match=f"score_toy: {told}, of columns x$"):
        score_pairs(toy, NoParams(), {"x": np.array([1.0, np.nan, 2.0, 3.0])}, {})


@pytest.mark.parametrize("wrong", [np.float64(1.0), np.ones(2), np.ones((3, 1))])
def test_a_metric_gives_one_score_per_pair(wrong: np.ndarray) -> None:
    toy = Metric("toy", NoParams, lambda p: ("x",), lambda c, p, f: wrong, "none")
    with pytest.raises(UserError, match=r"metric 'toy': score gave shape .*; valid: \(3,\), one per pair"):
        score_pairs(toy, NoParams(), {"x": np.array([1.0, np.nan, 2.0, 3.0])}, {})
