"""Pair scores over one Arrow table, and the steps a stage repeats per shard: which columns, read, fit, score.

N: rows of the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from prefsel.config import Options
from prefsel.config.columns import maker_of
from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics.registry import METRICS
from prefsel.metrics.statistics import Columns, Fitted, Metric, fit, reply
from prefsel.numbers.columns import float_column, require_text, table_ids
from prefsel.pairs.arrow import as_table, plain_table
from prefsel.rules import readable


@dataclass(frozen=True)
class PairScores:
    """The scores of a table's rows."""

    score_N: np.ndarray
    """float64; NaN where a needed column is null."""
    missing_N: np.ndarray
    """int16: position in `names` of the first needed column that is null, -1 where there is a score."""
    names: tuple[str, ...]


class ScoreArray(np.ndarray):
    """Scores, float64 [N], NaN where a pair has none; as a column of an Arrow table that is null.

    An array like any other, so that NumPy computes with it; but NaN in a column is a fault, null a missing number.
    """

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        """What pyarrow makes of it, in tables and dictionaries of columns too."""
        return pa.array(np.asarray(self), type=type, from_pandas=True)


def score_table(table: Any, metric: str, **params: Any) -> np.ndarray:
    """The score of every pair of a table by one metric; larger is selected first.

    What a metric needs to know about the whole corpus (moments, quantiles, slopes) is computed over the rows of the
    table that have every needed column.

    Args:
        table: One row per pair, in anything that `prefsel.pairs.arrow.as_table` takes: pandas (whose NaN is null),
            Polars, `datasets.Dataset`, Arrow, or a dictionary of columns. It needs the flat columns that the metric
            reads, of numbers: `rm_<name>_chosen`, `logps_<model>_rejected` (nats, summed over the response), …;
            `random` reads `pair_id`.
        metric: A name in `METRICS`, that of a plugin included.
        **params: The metric's own parameters, keyword only; names are column prefixes, never paths.

    Returns:
        Scores, float64 [N], in the order of the rows; NaN where a needed column is null. As a column of pandas, of an
        Arrow table or of a dictionary these go straight into `select_table`, where the missing ones are null; of Polars
        with `pl.Series(name, pa.array(scores))`, which would take an array's NaN for a number.

    Raises:
        UserError: The metric or a parameter is unknown (the nearest valid one is named), a column is missing (and what
            makes it), a statistic cannot be computed, or a text column holds a value that the metric does not know.
        NonFiniteError: A column holds NaN or an infinity that is not null, or a score overflows.
    """
    found, parsed = find_metric(metric, params)
    table = as_table(table)
    parsed = found.resolve(parsed, table.column_names)
    sources = column_sources(found, parsed, table.column_names).values()
    # The ids are for errors: they say whose number is wrong.
    table = plain_table(table, [*sources, *(["pair_id"] if "pair_id" in table.column_names else [])])
    columns = read_columns(table, found, parsed)
    present = complete(found, parsed, columns)
    fitted = fit(found, parsed, lambda request: [reply(found, parsed, present, request)])
    return score_pairs(found, parsed, columns, fitted).score_N.view(ScoreArray)


def find_metric(name: str, params: Mapping[str, Any]) -> tuple[Metric, Options]:
    """A metric and its checked parameters.

    Raises:
        UserError: an unknown metric or parameter, or an invalid value; one line per problem.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(str(name), METRICS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"metric: got {name!r}; {hint}valid: {', '.join(METRICS)}")
    metric = METRICS[name]
    try:
        return metric, metric.params.model_validate(dict(params))
    except ValidationError as error:
        raise readable(f"metric {name}", error, metric.params.model_fields) from None


def column_sources(metric: Metric, params: Options, available: Iterable[str]) -> dict[str, str]:
    """Which available column holds each flat column the metric reads: itself, or one that stands in for it.

    Raises:
        UserError: names every column that is missing and what makes it.
    """
    there, wanted = set(available), metric.columns(params)
    sources, missing = {}, []
    for name in wanted:
        found = _source(name, wanted, there)
        if found is not None:
            sources[name] = found
        else:
            maker = maker_of(name)
            missing.append(name if maker is None else f"{name} (made by {maker})")
    if missing:
        raise UserError(f"metric {metric.name}: missing columns {', '.join(missing)}")
    return sources


def _source(name: str, wanted: Iterable[str], there: Set[str]) -> str | None:
    """The column that holds `name`, or stands in for it; None: there is none."""
    if name.startswith("num_tokens_"):
        return _length_source(name, wanted, there)
    # One number per prompt, which a column of completions repeats for each of them.
    names = [name, f"{name}_chosen"] if name.endswith("_generated") else [name]
    return next((one for one in names if one in there), None)


def _length_source(name: str, wanted: Iterable[str], there: Set[str]) -> str | None:
    """A column of lengths, of which all sides are counted by one tokenizer: the model's own, or one without a name."""
    stem, side = name.rsplit("_", 1)
    sides = {one.rsplit("_", 1)[1] for one in wanted if one.rsplit("_", 1)[0] == stem}
    own = [stem, stem.removesuffix("_uncond")]  # without its prompt a response has the same tokens
    for stems in (own, ["num_tokens"]):
        found = {each: next((f"{one}_{each}" for one in stems if f"{one}_{each}" in there), None) for each in sides}
        if None not in found.values():
            return found[side]
    return None


def read_columns(table: pa.Table, metric: Metric, params: Options) -> dict[str, np.ndarray]:
    """The columns a metric reads, from a flat pair table: float64 [N], NaN for null; text that may be any, None.

    Raises:
        UserError: a column is missing, is not numeric, or holds text the metric does not know.
        NonFiniteError: a value that is not null is NaN or infinite.
    """
    columns, labels = {}, metric.labels(params)
    for name, source in column_sources(metric, params, table.column_names).items():
        if name == "pair_id":
            columns[name] = table_ids(table[source])
        elif name in labels:
            values = labels[name]
            columns[name] = _texts(table, source) if values is None else _positions(table[source], name, values)
        else:
            columns[name] = float_column(table, source)
    return columns


def _positions(column: pa.ChunkedArray, name: str, values: tuple[str, ...]) -> np.ndarray:
    """Position of each text in `values` as float64, NaN for null."""
    text = column.cast(pa.string())
    place = pc.index_in(text, value_set=pa.array(values, pa.string()), skip_nulls=True)
    is_unknown = pc.and_(pc.is_null(place), pc.is_valid(text))
    if pc.any(is_unknown).as_py():
        unknown = pc.unique(text.filter(is_unknown)).to_pylist()
        raise UserError(f"{name}: got {', '.join(map(repr, unknown[:5]))}; valid: {', '.join(values)}")
    return place.cast(pa.float64()).to_numpy()


def _texts(table: pa.Table, name: str) -> np.ndarray:
    """A column of names as text, None for null; numbers are named by their digits.

    Raises:
        UserError: its values have no names.
    """
    require_text(name, table[name].type)
    return table[name].cast(pa.string()).combine_chunks().to_numpy(zero_copy_only=False)


def first_missing(metric: Metric, params: Options, columns: Columns) -> tuple[np.ndarray, tuple[str, ...]]:
    """For every row the position of the first needed column that is null (int16, -1: none), and the column names."""
    names = metric.columns(params)
    unused = metric.unused(columns, params)
    missing_N = np.full(len(columns[names[0]]), -1, np.int16)
    for place, name in enumerate(names):
        if name == "pair_id":
            continue
        column_N = columns[name]
        is_null_N = pa.array(column_N).is_null().to_numpy(False) if column_N.dtype == object else np.isnan(column_N)
        if name in unused:
            is_null_N &= ~unused[name]
        missing_N[is_null_N & (missing_N < 0)] = place
    return missing_N, names


def complete(metric: Metric, params: Options, columns: Columns) -> Columns:
    """The rows that have every needed column: what statistics are made of."""
    missing_N, _ = first_missing(metric, params, columns)
    return columns if (missing_N < 0).all() else {name: value[missing_N < 0] for name, value in columns.items()}


def score_pairs(metric: Metric, params: Options, columns: Columns, fitted: Fitted) -> PairScores:
    """Scores of all rows of a shard, given the statistics of the corpus.

    Raises:
        NonFiniteError: a score is NaN or infinite although its columns are finite.
        UserError: the metric gives another number of scores than there are pairs.
    """
    missing_N, names = first_missing(metric, params, columns)
    score_N = np.full(len(missing_N), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):  # an error just below, with names
        # Adding 0.0 makes -0.0 a 0.0: equal scores are stored as equal bytes.
        found_M = np.asarray(metric.score(complete(metric, params, columns), params, fitted) + 0.0)
    if found_M.shape != (num_M := (int((missing_N < 0).sum()),)):
        raise UserError(f"metric {metric.name!r}: score gave shape {found_M.shape}; valid: {num_M}, one per pair")
    if not np.isfinite(found_M).all():
        row_M = np.flatnonzero(missing_N < 0)
        told = [
            f"{is_bad_M.sum()} scores {what}, first at rows {row_M[is_bad_M][:5].tolist()}"
            for what, is_bad_M in (("are NaN", np.isnan(found_M)), ("overflow", np.isinf(found_M)))
            if is_bad_M.any()
        ]
        raise NonFiniteError(f"score_{metric.name}: {'; '.join(told)}, of columns {', '.join(names)}")
    score_N[missing_N < 0] = found_M
    return PairScores(score_N, missing_N, names)
