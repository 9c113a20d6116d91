"""Selection over one Arrow table, and the way from Arrow columns to the arrays the kernels work on.

N: rows of the table; W = 2 big-endian words of a pair_id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import NonFiniteError, UserError
from prefsel.pairs.arrow import as_table, plain_table
from prefsel.rules import Label, parse_rule
from prefsel.select import radix

if TYPE_CHECKING:
    from prefsel.select.compose import Plan
    from prefsel.select.rows import Rows

ID_BYTES = 16


def select_table(table: Any, rule: Mapping[str, Any], *, max_candidates: int = radix.MAX_CANDIDATES) -> np.ndarray:
    """The rows of a table that a rule keeps, exactly, in this process.

    A row whose score is null is not eligible: budgets, percentiles and quotas are those of the others. Rows with equal
    scores are ordered by their pair_id, so that the same rows are kept whatever order they stand in.

    Args:
        table: One row per pair, in anything that `prefsel.pairs.arrow.as_table` takes: pandas (whose NaN is null),
            Polars, `datasets.Dataset`, Arrow, or a dictionary of columns. It needs `pair_id`, unique (16 bytes,
            shorter bytes or text, 32 hex digits, or integers that are not negative), and the columns of numbers that
            the rule names. Strata by `source` and `aspect` need those columns, strata by `length_bin`
            `num_tokens_chosen` and `num_tokens_rejected`, a dedupe `prompt_id`, a dedupe by pair also `chosen` and
            `rejected` (text or identifiers).
        rule: A table of the kinds in `prefsel.rules`, for example `{"kind": "top", "score": "score_x", "ratio": 0.3}`.
        max_candidates: Most rows that are looked at one by one; it changes the way, not the result.

    Returns:
        Positions of the kept rows, int64, ascending: of a data frame of pandas they go into `.iloc`.

    Raises:
        UserError: A rule, a column or a pair_id is not valid, a column is missing, or a pair_id stands twice; names it.
        NonFiniteError: A score is NaN or infinite and not null; names the column and the first pair_ids.
    """
    # Later than the rest: these stand on prefsel.metrics, whose tables are read by the functions below.
    from prefsel.select.compose import compile_rule
    from prefsel.select.evaluate import keep_rows

    parsed = parse_rule(rule)
    plan = compile_rule(parsed)
    rows = table_rows(as_table(table), plan, "rule " + parsed.kind)
    (is_kept_N,), _ = keep_rows(plan, [rows], max_candidates=max_candidates)
    return np.flatnonzero(is_kept_N)


def table_rows(table: pa.Table, plan: Plan, purpose: str) -> Rows:
    """The columns of a table that a plan reads.

    Raises:
        UserError, NonFiniteError: A column is missing or unusable, or a pair_id stands twice, as `select_table` says.
    """
    from prefsel.select.rows import Rows

    by = {name for leaf in plan.leaves for name in leaf.by}
    texts = [name for name in ("source", "aspect") if name in by]
    lengths = [f"num_tokens_{side}" for side in ("chosen", "rejected") if "length_bin" in by]
    keyed = {"prompt": ["prompt_id"], "pair": ["prompt_id", "chosen", "rejected"]}
    keys = [name for key in plan.keys for name in keyed[key]]
    names = ["pair_id", *plan.inputs, *texts, *lengths, *keys]
    require_columns(table, names, purpose)
    table = plain_table(table, names, keep_dictionary=texts)
    ids_NW = table_ids(table["pair_id"])
    require_unique_ids(ids_NW, table["pair_id"])
    sides = [float_column(table, name) for name in lengths]
    return Rows(
        # Null is NaN here, and `float_column` refused all others.
        scores={name: float_column(table, name) for name in plan.inputs},
        ids_NW=ids_NW,
        texts={name: table[name] for name in texts},
        gap_N=np.abs(sides[0] - sides[1]) if sides else None,
        keys={key: table_keys(table, key) for key in plan.keys},
        full=frozenset(name for name in plan.inputs if table[name].null_count == 0),
    )


def table_keys(table: pa.Table, by: str) -> np.ndarray:
    """Numbers that are equal for rows of one prompt (uint64 [N, 1]), or of the same two completions of it ([N, 3]).

    Raises:
        UserError: an identifier is null, or of a type that cannot be compared.
    """
    prompt_N = _codes("prompt_id", table["prompt_id"])
    if by == "prompt":
        return prompt_N[:, None]
    if table["chosen"].type != table["rejected"].type:
        raise UserError(f"chosen, rejected: got {table['chosen'].type} and {table['rejected'].type}; valid: one type")
    both = [*table["chosen"].chunks, *table["rejected"].chunks]
    sides_2N = _codes("chosen and rejected", pa.chunked_array(both, table["chosen"].type)).reshape(2, -1)
    return np.stack([sides_2N.min(axis=0), sides_2N.max(axis=0), prompt_N], axis=1)


def _codes(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A number per distinct value, uint64 [N]."""
    if pa.types.is_nested(column.type):
        raise UserError(f"{name}: got a column of {column.type}; valid: text, ids or numbers")
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} of {len(column)} values are null; a dedupe needs every one")
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.uint64)


def require_columns(table: pa.Table, names: Sequence[str], purpose: str) -> None:
    """Check that `table` has the columns `names`.

    Raises:
        UserError: names what is missing and what is there.
    """
    missing = [name for name in dict.fromkeys(names) if name not in table.column_names]
    if missing:
        raise UserError(f"{purpose}: needs {', '.join(missing)}; the table has {', '.join(table.column_names)}")


def float_column(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, without a copy where Arrow allows; null becomes NaN.

    Raises:
        UserError: the column is not numeric.
        NonFiniteError: a value that is not null is NaN or infinite.
    """
    column = table[name]
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        raise UserError(f"{name}: got a column of {column.type}; valid: numbers")
    try:
        column = column.cast(pa.float64()).combine_chunks()
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: got {column.type} that float64 cannot hold exactly: {error}") from None
    value_N = column.to_numpy(zero_copy_only=False)
    if not np.isfinite(value_N).all():
        bad_N = ~np.isfinite(value_N) & ~pc.is_null(column).to_numpy(zero_copy_only=False)
        if bad_N.any():
            raise non_finite_column(table, name, np.flatnonzero(bad_N))
    return value_N


def non_finite_column(table: pa.Table, name: str, rows: np.ndarray) -> NonFiniteError:
    """The error for NaN or infinite values of column `name` at `rows`: how many, and the first pair_ids."""
    where = f"first at rows {rows[:5].tolist()}"
    if "pair_id" in table.column_names:
        where = "first pair_ids " + _shown(table["pair_id"], rows)
    return NonFiniteError(f"{name}: {len(rows)} values are NaN or infinite, {where}")


def _shown(ids: pa.ChunkedArray, rows: np.ndarray) -> str:
    """The pair_ids of the first five of `rows`, as a person reads them."""
    first = ids.take(pa.array(rows[:5])).to_pylist()
    return ", ".join(one.hex() if isinstance(one, bytes) else str(one) for one in first)


def require_unique_ids(ids_NW: np.ndarray, column: pa.ChunkedArray) -> None:
    """Refuse a table in which a pair_id stands twice: which of its rows is kept would depend on their order.

    Both words of an id are mixed into one, and only rows that share a mixture are compared: equal ids always do, and
    sorting one word of 1e6 rows took 25 ms where sorting both took 625.

    Args:
        ids_NW: The ids as `table_ids` gives them, two words each.
        column: The same as they were given, for the message.

    Raises:
        UserError: How many ids stand more than once, in how many rows, and the first of them.
    """
    words_NW = ids_NW.view(np.uint64)  # of which order their bytes are does not matter here
    mixed_N = words_NW[:, 0] * np.uint64(0x9E3779B97F4A7C15) + words_NW[:, 1]
    sorted_N = np.sort(mixed_N)
    suspect = sorted_N[1:][sorted_N[1:] == sorted_N[:-1]]
    if not len(suspect):
        return
    row_M = np.flatnonzero(np.isin(mixed_N, suspect))
    _, first_D, count_D = np.unique(words_NW[row_M], axis=0, return_index=True, return_counts=True)
    if (count_D > 1).any():
        first = row_M[np.sort(first_D[count_D > 1])]
        num_rows = int(count_D[count_D > 1].sum())
        raise UserError(
            f"pair_id: {len(first):,} identifiers stand more than once, in {num_rows:,} of {len(column):,} rows, "
            f"first {_shown(column, first)}; keep one row of each"
        )


def table_ids(column: pa.ChunkedArray) -> np.ndarray:
    """`radix.id_words` for the identifiers a person may have at hand, in their order.

    Shorter bytes and text are filled with zero bytes on the right, 32 hex digits are read as 16 bytes, integers become
    the low word.

    Raises:
        UserError: null, negative or longer identifiers.
    """
    if column.null_count:
        raise UserError(f"pair_id: {column.null_count} of {len(column)} values are null; every row needs one")
    if pa.types.is_integer(column.type):
        if len(column) and pc.min(column).as_py() < 0:
            raise UserError(f"pair_id: got {pc.min(column).as_py()}; valid: integers that are not negative")
        words_NW = np.zeros((len(column), 2), ">u8")
        words_NW[:, 1] = column.to_numpy()
        return words_NW
    if pa.types.is_fixed_size_binary(column.type) and column.type.byte_width == ID_BYTES:
        return radix.id_words(column)
    return radix.id_words(pa.array(_sixteen_bytes(column), pa.binary(ID_BYTES)))


def _sixteen_bytes(column: pa.ChunkedArray) -> list[bytes]:
    values = column.to_pylist()
    if all(isinstance(value, str) for value in values):
        if values and all(len(value) == 2 * ID_BYTES for value in values):
            try:
                return [bytes.fromhex(value) for value in values]
            except ValueError:
                raise UserError(f"pair_id: got text such as {values[0]!r}; 32 characters must be hex digits") from None
        values = [value.encode() for value in values]
    valid = "16 bytes, 32 hex digits, up to 16 bytes of text, or integers that are not negative"
    if not all(isinstance(value, bytes) for value in values):
        raise UserError(f"pair_id: got a column of {column.type}; valid: {valid}")
    if longest := next((value for value in values if len(value) > ID_BYTES), None):
        raise UserError(f"pair_id: got {longest!r}; valid: {valid}")
    return [value.ljust(ID_BYTES, b"\0") for value in values]


def strata(columns: Sequence[pa.ChunkedArray]) -> tuple[np.ndarray, list[Label]]:
    """The stratum of every row as a code (int64 [N]) and the labels the codes point at.

    A null is a value of its own. Only labels that occur are listed.
    """
    code_N = np.zeros(0, np.int64)
    values: list[list[str | None]] = []
    for place, column in enumerate(columns):
        index_N, names = _dictionary(column)
        values.append(names)
        code_N = code_N * len(names) + index_N if place else index_N
    sizes = [len(names) for names in values]
    count_S = np.bincount(code_N, minlength=math.prod(sizes))
    present = np.flatnonzero(count_S)
    places = np.unravel_index(present, sizes) if len(present) else []
    labels: list[Label] = [tuple(names[place[i]] for names, place in zip(values, places)) for i in range(len(present))]
    if len(present) == len(count_S):
        return code_N, labels
    return (np.cumsum(count_S > 0) - 1)[code_N], labels


def _dictionary(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str | None]]:
    """The position of every row's value (int64 [N]) in a list of different values.

    The codes of a column that is stored as a dictionary are taken as they are: to write out and encode 1e6 texts again
    took 27.6 ms, this 1.4 ms.
    """
    array = column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        array = pa.array([], pa.string())
    if pa.types.is_dictionary(array.type):
        names = array.dictionary.cast(pa.string()).to_pylist()
        if None not in names and len(set(names)) == len(names):
            if not array.null_count:
                return array.indices.to_numpy().astype(np.int64), names
            index_N = array.indices.fill_null(0).to_numpy().astype(np.int64)
            index_N[array.is_null().to_numpy(zero_copy_only=False)] = len(names)
            return index_N, [*names, None]
    encoded = array.cast(pa.string()).dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
