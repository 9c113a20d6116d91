"""Selection over one Arrow table, in one process.

N: rows of the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import UserError
from prefsel.numbers.columns import float_column, require_columns, require_text, require_unique_ids, table_ids
from prefsel.pairs.arrow import as_table, plain_table
from prefsel.pairs.rows import Rows
from prefsel.rules import parse_rule
from prefsel.select import fuse
from prefsel.select.compose import CompiledRule, Derived, compile_rule
from prefsel.select.dedupe import KeyedRows, duplicates_to_drop, keyed, scores_left
from prefsel.select.evaluate import ShardQuery, answer, decide_leaf, flipped, kept
from prefsel.select.ranks import Parts, PlacedRows, place_population, positions, positions_of_shard


def select_table(table: Any, rule: Mapping[str, Any]) -> np.ndarray:
    """The rows of a table that a rule keeps, exactly, in this process.

    A row whose score is null is not eligible: budgets, percentiles and quotas are those of the others. Rows with equal
    scores are ordered by their pair_id, so that the same rows are kept whatever order they stand in.

    Args:
        table: One row per pair, in anything that `prefsel.pairs.arrow.as_table` takes: pandas (whose NaN is null),
            Polars, `datasets.Dataset`, Arrow, or a dictionary of columns. It needs `pair_id`, unique (16 bytes,
            shorter bytes or text, 32 hex digits, or integers that are not negative), and the columns of numbers that
            the rule names. Strata may be any of its columns of text or numbers; by `length_bin` they need
            `num_tokens_chosen` and `num_tokens_rejected`, a dedupe `prompt_id`, a dedupe by pair also `chosen` and
            `rejected` (text, identifiers or messages).
        rule: A table of the kinds in `prefsel.rules`, for example `{"kind": "top", "score": "score_x", "ratio": 0.3}`.
            Which rows one with the action `flip` turns around, `flipped_rows` says.

    Returns:
        Positions of the kept rows, int64, ascending: of a data frame of pandas they go into `.iloc`.

    Raises:
        UserError: A rule, a column or a pair_id is not valid, a column is missing, or a pair_id stands twice; names it.
        NonFiniteError: A score is NaN or infinite and not null; names the column and the first pair_ids.
    """
    _, row_K, _ = _applied(table, rule)
    return row_K


def flipped_rows(table: Any, rule: Mapping[str, Any]) -> np.ndarray:
    """The rows of a table that a rule keeps with their label turned: chosen and rejected are to be exchanged in them.

    Args:
        table: As of `select_table`.
        rule: Likewise; the rows that it keeps and these are found by two calls.

    Returns:
        Positions, int64, ascending, all of them among those that `select_table` gives; none where no rule inside has
        the action `flip`.

    Raises:
        UserError: As of `select_table`.
        NonFiniteError: Likewise.
    """
    plan, row_K, rows = _applied(table, rule)
    is_flipped_K = flipped(plan, rows, row_K)
    return row_K[:0] if is_flipped_K is None else row_K[is_flipped_K]


def _applied(table: Any, rule: Mapping[str, Any]) -> tuple[CompiledRule, np.ndarray, Rows]:
    """A rule's plan, the rows that it keeps, and all rows with their derived scores."""
    parsed = parse_rule(rule)
    plan = compile_rule(parsed)
    rows = table_rows(as_table(table), plan, "rule " + parsed.kind)
    (is_kept_N,), (rows,) = keep_rows(plan, [rows])
    return plan, np.flatnonzero(is_kept_N), rows


def keep_rows(plan: CompiledRule, shards: Sequence[Rows]) -> tuple[list[np.ndarray], list[Rows]]:
    """Which rows of each shard a rule keeps, bool [N] each, and the shards with their derived scores.

    Args:
        plan: of the rule.
        shards: in corpus order, with the plan's inputs, pair_ids, keys and strata.

    Raises:
        UserError: a score without spread where its z-score is wanted; as of `thresholds.decide`.
        NonFiniteError: a derived score overflows.
    """
    for step in plan.derived:
        shards = [rows.with_score(step.column, score_N) for rows, score_N in zip(shards, derived(step, shards))]

    def ask(asked: ShardQuery) -> Sequence[Mapping[Any, Any]]:
        return [answer(asked, rows) for rows in shards]

    thresholds = [decide_leaf(leaf, ask).thresholds for leaf in plan.leaves]
    return [kept(plan.keep, thresholds, rows) for rows in shards], list(shards)


def derived(step: Derived, shards: Sequence[Rows]) -> list[np.ndarray]:
    """One derived score of every shard, float64 [N] each; NaN where a pair has none."""
    if step.how == "best":
        parts = [keyed(step, rows, number, 1)[0] for number, rows in enumerate(shards)]
        drops = duplicates_to_drop(KeyedRows.merge(parts))
        return [scores_left(step, rows, drops.row_M[drops.shard_M == number]) for number, rows in enumerate(shards)]
    if step.how == "zscore":
        fitted = fuse.fit(step, [fuse.statistics(step, rows) for rows in shards])
        return [fuse.derive(step, fitted, rows) for rows in shards]
    if not step.is_by_rank:
        return [fuse.derive(step, {}, rows) for rows in shards]
    placed = {column: _all_in_one_part(step, column, shards) for column in step.scores}
    whole = {column: Parts(len(rows.row_M), (), (0,)) for column, rows in placed.items()}
    found = {column: positions(rows, [whole[column]]) for column, rows in placed.items()}
    counts = {column: {"count": one.size} for column, one in whole.items()}
    return [
        fuse.derive(step, counts, rows, {column: positions_of_shard(one, 0, number) for column, one in found.items()})
        for number, rows in enumerate(shards)
    ]


def _all_in_one_part(step: Derived, column: str, shards: Sequence[Rows]) -> PlacedRows:
    one = Parts(0, (), (0,))
    return PlacedRows.merge(
        place_population(step, column, rows, one, column=0, shard=number) for number, rows in enumerate(shards)
    )


def table_rows(table: pa.Table, plan: CompiledRule, purpose: str) -> Rows:
    """The columns of a table that a plan reads.

    Raises:
        UserError, NonFiniteError: A column is missing or unusable, or a pair_id stands twice, as `select_table` says.
    """
    by = dict.fromkeys(name for leaf in plan.leaves for name in leaf.by)
    texts = [name for name in by if name != "length_bin"]
    lengths = [f"num_tokens_{side}" for side in ("chosen", "rejected") if "length_bin" in by]
    keyed = {"prompt": ["prompt_id"], "pair": ["prompt_id", "chosen", "rejected"]}
    keys = [name for key in plan.keys for name in keyed[key]]
    names = ["pair_id", *plan.inputs, *texts, *lengths, *keys]
    require_columns(table, names, purpose)
    table = plain_table(table, names, keep_dictionary=texts)
    for name in texts:
        require_text(name, table[name].type)
    ids_NW = table_ids(table["pair_id"])
    require_unique_ids(ids_NW, table["pair_id"])
    sides = [float_column(table, name) for name in lengths]
    return Rows(
        # Null is NaN here, and `float_column` refused all others.
        scores={name: float_column(table, name) for name in plan.inputs},
        ids_NW=ids_NW,
        texts={name: table[name] for name in texts},
        lengths=(sides[0], sides[1]) if sides else None,
        keys={key: _table_keys(table, key) for key in plan.keys},
        complete_columns=frozenset(name for name in plan.inputs if table[name].null_count == 0),
    )


def _table_keys(table: pa.Table, by: str) -> np.ndarray:
    """Numbers that are equal for rows of one prompt (uint64 [N, 1]), or of the same two completions of it ([N, 3]).

    Raises:
        UserError: an identifier is null, or of a type that cannot be compared.
    """
    prompt_N = _codes("prompt_id", table["prompt_id"])
    if by == "prompt":
        return prompt_N[:, None]
    chosen, rejected = (_comparable(table[name]) for name in ("chosen", "rejected"))
    if chosen.type != rejected.type:
        raise UserError(f"chosen, rejected: got {chosen.type} and {rejected.type}; valid: one type")
    both = pa.chunked_array([*chosen.chunks, *rejected.chunks], chosen.type)
    sides_2N = _codes("chosen and rejected", both).reshape(2, -1)
    return np.stack([sides_2N.min(axis=0), sides_2N.max(axis=0), prompt_N], axis=1)


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Messages, as `prefsel.open` and conversational data sets have them, as text; other columns as they are."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (is_list and pa.types.is_struct(column.type.value_type)):
        return column
    texts = [None if value is None else json.dumps(value, sort_keys=True, default=str) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _codes(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A number per distinct value, uint64 [N]."""
    if pa.types.is_nested(column.type):
        raise UserError(f"{name}: got a column of {column.type}; valid: text, ids or numbers")
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} of {len(column)} values are null; a dedupe needs every one")
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.uint64)
