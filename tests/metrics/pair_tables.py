"""Random flat pair tables, and scoring them in shards as a stage does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from prefsel.metrics.statistics import Fitted, fit, reply
from prefsel.metrics.table import complete, find_metric, read_columns, score_pairs
from prefsel.numbers import ranges


def sided(**columns: Sequence[Sequence[float]]) -> pa.Table:
    """`<name>_chosen|rejected` from (chosen, rejected) rows."""
    return pa.table(
        {
            f"{name}_{side}": pa.array([None if row[place] is None else float(row[place]) for row in rows])
            for name, rows in columns.items()
            for place, side in enumerate(("chosen", "rejected"))
        }
    )


def random_columns(names: Sequence[str], num_rows: int, *, scale: float = 5.0, nulls: float = 0.15) -> dict[str, list]:
    """Normal numbers with some nulls; `num_tokens_…` are whole and positive."""
    rng = np.random.default_rng([num_rows, len(names)])
    columns: dict[str, list] = {}
    for name in names:
        value_N = rng.integers(1, 30, num_rows) if name.startswith("num_tokens") else rng.normal(0, scale, num_rows)
        columns[name] = [
            None if is_null else value for value, is_null in zip(value_N.tolist(), rng.random(num_rows) < nulls)
        ]
    return columns


def float_table(columns: Mapping[str, list]) -> pa.Table:
    """Every column as nullable float64."""
    return pa.table({name: pa.array(values, pa.float64()) for name, values in columns.items()})


def rows_of(columns: Mapping[str, list]) -> list[dict[str, Any]]:
    """The same numbers row by row."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def score_shards(table: pa.Table, metric: str, num_shards: int, **params: Any) -> tuple[np.ndarray, Fitted]:
    """Scores in the table's order, and what was fitted, with the rows dealt to shards at random."""
    found, parsed = find_metric(metric, params)
    place_N = np.random.default_rng(0).integers(0, num_shards, table.num_rows)
    rows_S = [np.flatnonzero(place_N == shard) for shard in range(num_shards)]
    shards = [read_columns(table.take(pa.array(rows, pa.int64())), found, parsed) for rows in rows_S]
    present = [complete(found, parsed, shard) for shard in shards]
    with mock.patch.multiple(ranges, FEW=3, MAX_VALUES=3):  # shards that tell few values: more rounds
        fitted = fit(found, parsed, lambda request: [reply(found, parsed, p, request) for p in present])
    score_N = np.full(table.num_rows, np.nan)
    for rows, shard in zip(rows_S, shards):
        score_N[rows] = score_pairs(found, parsed, shard, fitted).score_N
    return score_N, fitted
