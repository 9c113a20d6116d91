"""Statistics of the whole corpus that a metric needs, from shards that only send counts and sums.

    fit (driver)   -- Request(round, fitted so far, queries) -->   reply (each shard)
                   <-- partials by name: moments, histograms, tails, …; then answers to radix queries --

`fit` and `reply` are pure, so the same code serves one process and a cluster. A round is one set of statistics that
can be computed together; a later round may use what the earlier ones found.

N: rows of a shard whose needed columns are all there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from prefsel.config import Record
from prefsel.errors import UserError
from prefsel.numbers.moments import Covariation, Moments, merge_covariations, merge_moments
from prefsel.numbers.tail import UpperTail
from prefsel.rules import interpolate, quantile_position
from prefsel.select import radix

Columns = Mapping[str, np.ndarray]
"""Flat column name -> float64 [N]; a column of text is the position of its value in a list the metric gives;
`pair_id` is `>u8` [N, 2]."""
Fitted = dict[str, dict[str, float]]
"""Statistic name -> its numbers; plain JSON."""


@dataclass(frozen=True)
class Statistic:
    """What is computed over all rows of the corpus."""

    kind: Literal["moments", "slope", "quantile", "share", "upper_bound"]
    """What `fitted` then holds under its name: `moments` give `count`, `mean`, `mean_rest` (what rounding took from the
    mean) and `std`; a `slope`, of a regression on `Need.x_N`, `slope`; a `quantile`, the exact order statistic,
    `quantile`; a `share`, how many of the values, which are bool, are true, `share`; an `upper_bound`, see
    `UpperTail.upper_bound`, `upper`."""
    what: str
    """In words, for errors."""
    q: float = 0.0
    """Of a quantile, 0 to 1 (numpy's `linear`)."""
    may_be_zero: bool = False
    """A quantile, or a variance, that is not divided by may be zero; otherwise zero is an error."""
    divisor: float = 1.0
    """Of an upper bound: the search starts at the largest value divided by it."""
    min_above: int = 0
    """Of an upper bound: fewer values than this may lie above it."""


@dataclass(frozen=True)
class Need:
    """A statistic and the values of one shard that it is about."""

    statistic: Statistic
    """Which one."""
    value_N: np.ndarray
    """The values of the shard's pairs, float64 [N] (bool of a `share`)."""
    x_N: np.ndarray | None = None
    """Of a slope: what the values are regressed on."""


@dataclass(frozen=True)
class Metric:
    """A metric: which columns it reads, what it must know about the corpus, and the score of each pair.

    Its functions are pure and see one shard at a time: N pairs that have every needed column. The first four parts and
    `paper` are enough for most metrics.
    """

    name: str
    """What `score_table` and configurations call it."""
    params: type[Record]
    """Its parameters; every one that names a model or an aspect is a column prefix, never a path."""
    columns: Callable[[Any], tuple[str, ...]]
    """(params) -> flat column names."""
    score: Callable[[Columns, Any, Fitted], np.ndarray]
    """(columns, params, fitted) -> float64 [N]; larger is selected first."""
    paper: str
    """Where it comes from: paper, section, equation."""
    rounds: Callable[[Any], tuple[Callable[[Columns, Any, Fitted], dict[str, Need]], ...]] = lambda params: ()
    """(params) -> one function (columns, params, fitted) -> needs by name, for each round of statistics."""
    labels: Callable[[Any], Mapping[str, tuple[str, ...]]] = lambda params: {}
    """(params) -> values a text column may have."""
    unused: Callable[[Columns, Any], Mapping[str, np.ndarray]] = lambda columns, params: {}
    """(columns, params) -> rows, bool [N], where a column is not needed and may be null."""
    warnings: Callable[[Any, Fitted], Sequence[str]] = lambda params, fitted: ()
    """(params, fitted) -> what a person should know about the fitted numbers."""
    resolve: Callable[[Any, Iterable[str]], Any] = lambda params, available: params
    """(params, column names of a table) -> params with what only the table can tell."""


@dataclass(frozen=True)
class Share:
    """How many of the rows something is true of."""

    count: int
    num_true: int


Partial = tuple[Statistic, Moments | Covariation | radix.Histogram | Share | UpperTail]
QueryKey = tuple[str, int]
"""Name of a quantile, and a rank."""


@dataclass(frozen=True)
class Request:
    """What the driver asks every shard."""

    round: int
    fitted: Fitted
    queries: dict[QueryKey, radix.Query] = field(default_factory=dict)
    """Empty: the partial of every statistic of the round is wanted."""


def reply(metric: Metric, params: Record, columns: Columns, request: Request) -> dict[Any, Any]:
    """A shard's part: partials by statistic name, or answers by query key.

    Args:
        metric: the metric.
        params: its parameters.
        columns: the rows of the shard that have all columns (`metrics.table.complete`).
        request: what is asked.
    """
    needs = metric.rounds(params)[request.round](columns, params, request.fitted)
    if not request.queries:
        return {name: (need.statistic, _partial(need)) for name, need in needs.items()}
    return {(name, rank): radix.answer(query, needs[name].value_N) for (name, rank), query in request.queries.items()}


def _partial(need: Need) -> Moments | Covariation | radix.Histogram | Share | UpperTail:
    value_N = need.value_N
    match need.statistic.kind:
        case "moments":
            return Moments.of(value_N)
        case "quantile":
            return radix.histogram(value_N)
        case "share":
            return Share(len(value_N), int(np.count_nonzero(value_N)))
        case "upper_bound":
            return UpperTail.of(value_N, need.statistic.divisor)
    assert need.x_N is not None
    return Covariation.of(need.x_N, value_N)


def fit(
    metric: Metric,
    params: Record,
    ask: Callable[[Request], Sequence[Mapping[Any, Any]]],
    *,
    max_candidates: int = radix.MAX_CANDIDATES,
) -> Fitted:
    """Every statistic the metric needs, over the whole corpus. Its `warnings` are issued as Python warnings.

    Args:
        metric: the metric.
        params: its parameters.
        ask: sends a request to every shard and returns their `reply`, in shard order.
        max_candidates: see `radix`; it changes the way, not the result.

    Raises:
        UserError: a statistic has no rows, or is zero where it divides.
    """
    fitted: Fitted = {}
    for number in range(len(metric.rounds(params))):
        fitted = fitted | _fit_round(Request(number, fitted), ask, max_candidates)
    for text in metric.warnings(params, fitted):
        warnings.warn(text, stacklevel=3)  # the caller of `score_table`
    return fitted


def _fit_round(request: Request, ask: Callable[[Request], Sequence[Mapping[Any, Any]]], max_candidates: int) -> Fitted:
    replies = ask(request)
    found: Fitted = {}
    histograms: dict[str, tuple[Statistic, radix.Histogram]] = {}
    for name, (statistic, _) in replies[0].items():
        parts = [reply[name][1] for reply in replies]
        if statistic.kind == "quantile":
            histograms[name] = (statistic, radix.Histogram.merge(parts))
        else:
            found[name] = _finish_sums(statistic, parts)
    return found | _quantiles(histograms, lambda queries: ask(replace(request, queries=queries)), max_candidates)


def _finish_sums(statistic: Statistic, parts: list[Any]) -> dict[str, float]:
    match statistic.kind:
        case "moments":
            moments = merge_moments(parts)
            _require(statistic, moments.count, statistic.may_be_zero or not moments.is_constant, "has zero variance")
            return moments.to_json()
        case "share":
            count = sum(part.count for part in parts)
            _require(statistic, count)
            return {"count": count, "share": sum(part.num_true for part in parts) / count}
        case "upper_bound":
            tail = UpperTail.merge(parts)
            _require(statistic, tail.count)
            upper, above = tail.upper_bound(statistic.min_above)
            return {"count": tail.count, "maximum": tail.high, "upper": upper, "above": above}
    both = merge_covariations(parts)
    _require(statistic, both.x.count, not both.x.is_constant, "cannot be fitted: the lengths have zero variance")
    return {"count": both.x.count, "slope": both.slope}


def _quantiles(
    histograms: Mapping[str, tuple[Statistic, radix.Histogram]],
    ask: Callable[[dict[QueryKey, radix.Query]], Sequence[Mapping[QueryKey, radix.Answer]]],
    max_candidates: int,
) -> Fitted:
    searches, positions = {}, {}
    for name, (statistic, histogram) in histograms.items():
        _require(statistic, histogram.total)
        positions[name] = below, above, _ = quantile_position(histogram.total, statistic.q)
        for rank in (below, above):
            search = radix.order_statistic(rank, max_candidates=max_candidates)
            searches[name, rank] = radix.begin(search, histogram)
    solved = {key: radix.found_score(search) for key, search in radix.solve(searches, ask).items()}
    found: Fitted = {}
    for name, (below, above, fraction) in positions.items():
        statistic, histogram = histograms[name]
        value = interpolate(solved[name, below], solved[name, above], fraction)
        is_valid = statistic.may_be_zero or value != 0
        _require(statistic, histogram.total, is_valid, f"has quantile 0 at {statistic.q:g}, and would divide by it")
        found[name] = {"count": histogram.total, "quantile": value}
    return found


def _require(statistic: Statistic, count: int, is_valid: bool = True, problem: str = "") -> None:
    if not count:
        raise UserError(f"{statistic.what}: no pairs to compute it from")
    if not is_valid:
        raise UserError(f"{statistic.what} {problem} ({count} pairs)")
