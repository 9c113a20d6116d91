"""Statistics of the whole corpus that a metric needs, from shards that only send counts and sums.

    fit (driver)   -- Request(round, fitted so far, queries) -->   reply (each shard)
                   <-- partials by name: moments, Summaries, tails, …; then counts of ranges, for quantiles --

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

from prefsel.config import Options
from prefsel.errors import NonFiniteError, UserError
from prefsel.numbers.label_share import Slope, fit_label_shares, slopes_by_group
from prefsel.numbers.moments import Covariation, Moments, merge_covariations, merge_moments
from prefsel.numbers.quantiles import quantiles
from prefsel.numbers.ranges import Queries, Replies, Summary, count_range, summarise
from prefsel.numbers.tail import UpperTail

Columns = Mapping[str, np.ndarray]
"""Flat column name -> float64 [N]; a column of text is the position of its value in a list the metric gives, or, of
one that may hold any, the text itself; `pair_id` is `>u8` [N, 2]."""
Fitted = dict[str, dict[str, float]]
"""Statistic name -> its numbers; plain JSON."""


@dataclass(frozen=True)
class Statistic:
    """What is computed over all rows of the corpus."""

    kind: Literal["moments", "slope", "quantile", "share", "upper_bound", "label_share"]
    """What `fitted` then holds under its name: `moments` give `count`, `mean`, `mean_rest` (what rounding took from the
    mean) and `std`; a `slope`, of a regression on `Need.x_N`, `slope`; a `quantile`, the exact order statistic,
    `quantile`; a `share`, how many of the values, which are bool, are true, `share`; an `upper_bound`, see
    `UpperTail.upper_bound`, `upper`. A `label_share`, see `numbers.label_share`, is one number for each of
    `Need.group_N`: η of every group under its name, 1 − η under `<name>_wrong`, rows under `<name>_pairs`, and the
    number of passes it took under `<name>_search`."""
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
    group_N: np.ndarray | None = None
    """Of label shares: the group of each value, text."""


@dataclass(frozen=True)
class Metric:
    """A metric: which columns it reads, what it must know about the corpus, and the score of each pair.

    Its functions are pure and see one shard at a time: N pairs that have every needed column. The first four parts and
    `paper` are enough for most metrics.
    """

    name: str
    """What `score_table` and configurations call it."""
    params: type[Options]
    """Its parameters; every one that names a model or an aspect is a column prefix, never a path."""
    columns: Callable[[Any], tuple[str, ...]]
    """(params) -> flat column names."""
    score: Callable[[Columns, Any, Fitted], np.ndarray]
    """(columns, params, fitted) -> float64 [N]; larger is selected first."""
    paper: str
    """Where it comes from: paper, section, equation."""
    rounds: Callable[[Any], tuple[Callable[[Columns, Any, Fitted], dict[str, Need]], ...]] = lambda params: ()
    """(params) -> one function (columns, params, fitted) -> needs by name, for each round of statistics."""
    labels: Callable[[Any], Mapping[str, tuple[str, ...] | None]] = lambda params: {}
    """(params) -> values a text column may have; None: any, and it is given as text."""
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


Partial = Moments | Covariation | Summary | Share | UpperTail | Mapping[str, Slope]


@dataclass(frozen=True)
class Request:
    """What the driver asks every shard."""

    round: int
    fitted: Fitted
    queries: Queries = field(default_factory=dict)
    """By name of a quantile and rank; empty: the partial of every statistic of the round is wanted."""
    logits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name of a label share, the logits of the shares that some groups are asked about."""


def reply(metric: Metric, params: Options, columns: Columns, request: Request) -> Mapping[Any, Any]:
    """A shard's part: statistic and partial by name, or answers by query key.

    Args:
        metric: the metric.
        params: its parameters.
        columns: the rows of the shard that have all columns (`metrics.table.complete`).
        request: what is asked.

    Raises:
        NonFiniteError: a value that a quantile is wanted of is NaN or infinite; names the statistic.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # an error of the statistic, with names
        needs = metric.rounds(params)[request.round](columns, params, request.fitted)
    if request.logits:
        return {name: _slopes(needs[name], asked) for name, asked in request.logits.items()}
    if not request.queries:
        return {name: (need.statistic, _partial(need)) for name, need in needs.items()}
    return {
        (name, rank): [count_range(needs[name].value_N, query.range) for query in asked]
        for (name, rank), asked in request.queries.items()
    }


def _partial(need: Need) -> Partial:
    """What a shard says of one statistic. What overflows in moments is told by the driver, with the range of all."""
    value_N = need.value_N
    if (
        need.statistic.kind in ("quantile", "upper_bound", "label_share")
        and not (is_finite_N := np.isfinite(value_N)).all()
    ):
        first = np.flatnonzero(~is_finite_N)[:5].tolist()
        raise NonFiniteError(f"{need.statistic.what}: {np.sum(~is_finite_N)} values overflow, first at rows {first}")
    match need.statistic.kind:
        case "moments":
            return Moments.of(value_N)
        case "quantile":
            return summarise(value_N)
        case "share":
            return Share(len(value_N), int(np.count_nonzero(value_N)))
        case "upper_bound":
            return UpperTail.of(value_N, need.statistic.divisor)
        case "label_share":
            return _slopes(need)
    assert need.x_N is not None
    return Covariation.of(need.x_N, value_N)


def _slopes(need: Need, logits: Mapping[str, float] | None = None) -> dict[str, Slope]:
    assert need.group_N is not None, "label shares are those of groups"
    return slopes_by_group(need.value_N, need.group_N, logits)


def fit(
    metric: Metric,
    params: Options,
    ask: Callable[[Request], Sequence[Mapping[Any, Any]]],
) -> Fitted:
    """Every statistic the metric needs, over the whole corpus. Its `warnings` are issued as Python warnings.

    Args:
        metric: the metric.
        params: its parameters.
        ask: sends a request to every shard and returns their `reply`, in shard order.

    Raises:
        UserError: a statistic has no rows, is zero where it divides, or overflows.
    """
    fitted: Fitted = {}
    reads = ", ".join(metric.columns(params))
    for number in range(len(metric.rounds(params))):
        fitted = fitted | _fit_round(Request(number, fitted), ask, reads)
    for text in metric.warnings(params, fitted):
        warnings.warn(text, stacklevel=3)  # the caller of `score_table`
    return fitted


def _fit_round(request: Request, ask: Callable[[Request], Sequence[Mapping[Any, Any]]], reads: str) -> Fitted:
    replies = ask(request)
    found: Fitted = {}
    summarised: dict[str, tuple[Statistic, list[Summary]]] = {}
    for name, (statistic, _) in replies[0].items():
        parts = [reply[name][1] for reply in replies]
        if statistic.kind == "quantile":
            summarised[name] = (statistic, parts)
        elif statistic.kind == "label_share":
            found |= _label_shares(name, statistic, parts, request, ask)
        else:
            found[name] = _finish_sums(statistic, parts, reads)
    return found | _quantiles(summarised, lambda queries: ask(replace(request, queries=queries)))


def _finish_sums(statistic: Statistic, parts: list[Any], reads: str) -> dict[str, float]:
    match statistic.kind:
        case "moments":
            moments = merge_moments(parts)
            _require(statistic, moments.count, statistic.may_be_zero or not moments.is_constant, "has zero variance")
            _refuse(statistic, moments.fault(), reads)
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
    _refuse(statistic, both.fault(), reads)
    return {"count": both.x.count, "slope": both.slope}


def _label_shares(
    name: str,
    statistic: Statistic,
    parts: Sequence[Mapping[str, Slope]],
    request: Request,
    ask: Callable[[Request], Sequence[Mapping[Any, Any]]],
) -> Fitted:
    def ask_about(logits: Mapping[str, float]) -> Sequence[Mapping[str, Slope]]:
        return [reply[name] for reply in ask(replace(request, logits={name: logits}))]

    found, passes = fit_label_shares(parts, ask_about)
    _require(statistic, len(found))
    return {
        name: {group: one.right for group, one in found.items()},
        f"{name}_wrong": {group: one.wrong for group, one in found.items()},
        f"{name}_pairs": {group: one.count for group, one in found.items()},
        f"{name}_search": {"passes": passes},
    }


def _quantiles(
    summarised: Mapping[str, tuple[Statistic, Sequence[Summary]]], ask: Callable[[Queries], Sequence[Replies]]
) -> Fitted:
    counts = {name: sum(one.count for one in parts) for name, (_, parts) in summarised.items()}
    for name, (statistic, _) in summarised.items():
        _require(statistic, counts[name])
    wanted = {name: (name, statistic.q) for name, (statistic, _) in summarised.items()}
    solved = quantiles(wanted, {name: parts for name, (_, parts) in summarised.items()}, ask)
    found: Fitted = {}
    for name, (statistic, _) in summarised.items():
        value = solved[name].value
        is_valid = statistic.may_be_zero or value != 0
        _require(statistic, counts[name], is_valid, f"has quantile 0 at {statistic.q:g}, and would divide by it")
        found[name] = {"count": counts[name], "quantile": value}
    return found


def _refuse(statistic: Statistic, fault: str, reads: str) -> None:
    if fault:
        raise UserError(f"{statistic.what}: {fault} (it is made from {reads})")


def _require(statistic: Statistic, count: int, is_valid: bool = True, problem: str = "") -> None:
    if not count:
        raise UserError(f"{statistic.what}: no pairs to compute it from")
    if not is_valid:
        raise UserError(f"{statistic.what} {problem} ({count} pairs)")
