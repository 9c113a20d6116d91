"""Arrow columns as the arrays that numbers are computed from: scores, identifiers, strata.

N: rows of the table; W = 2 words of an identifier (`>u8`: big-endian, so Arrow's bytes as they lie).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import NonFiniteError, UserError
from prefsel.rules import Label

ID_BYTES = 16
_HEX = re.compile(r"[0-9a-fA-F]{32}")  # `bytes.fromhex` skips blanks, and would give fewer bytes


def require_columns(table: pa.Table, names: Sequence[str], purpose: str) -> None:
    """Check that `table` has the columns `names`.

    Raises:
        UserError: names what is missing and what is there.
    """
    missing = [name for name in dict.fromkeys(names) if name not in table.column_names]
    if missing:
        raise UserError(f"{purpose}: needs {', '.join(missing)}; the table has {', '.join(table.column_names)}")


def require_text(name: str, kind: pa.DataType) -> None:
    """Refuse a column of strata or groups whose values have no names.

    Raises:
        UserError: names the column and its type.
    """
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        pa.array([], values).cast(pa.string())
    except pa.ArrowNotImplementedError:
        raise UserError(f"{name}: got a column of {kind}; valid: text or numbers, one value per row") from None


def float_column(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, without a copy where Arrow allows; null becomes NaN.

    Raises:
        UserError: the column is not numeric, or holds whole numbers or decimals that float64 cannot tell apart.
        NonFiniteError: a value that is not null is NaN or infinite.
    """
    column = table[name]
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        raise UserError(f"{name}: got a column of {column.type}; valid: numbers")
    given = column
    try:
        column = column.cast(pa.float64()).combine_chunks()
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: got {column.type} that float64 cannot hold exactly: {error}") from None
    value_N = column.to_numpy(zero_copy_only=False)
    if pa.types.is_decimal(given.type) and (
        lost := pc.count_distinct(given).as_py() - pc.count_distinct(column).as_py()
    ):
        raise UserError(
            f"{name}: got {given.type} of which float64 makes {lost:,} different values equal to others; "
            "subtract what they share, or scale and round them"
        )
    if not np.isfinite(value_N).all():
        bad_N = ~np.isfinite(value_N) & ~pc.is_null(column).to_numpy(zero_copy_only=False)
        if bad_N.any():
            raise _non_finite_column(table, name, np.flatnonzero(bad_N))
    return value_N


def _non_finite_column(table: pa.Table, name: str, rows: np.ndarray) -> NonFiniteError:
    """The error for NaN or infinite values of column `name` at `rows`: how many, and the first pair_ids."""
    where = f"first at rows {rows[:5].tolist()}"
    if "pair_id" in table.column_names:
        where = "first pair_ids " + _shown(table["pair_id"], rows)
    hint = "a missing number is null, not NaN (Polars: fill_nan(None))"
    return NonFiniteError(f"{name}: {len(rows)} values are NaN or infinite, {where}; {hint}")


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


def id_words(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of 16-byte identifiers without nulls as two words each (`>u8` [N, 2]), in place when it is one chunk."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # one chunk would be copied by `combine_chunks`, too
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_fixed_size_binary(array.type) or array.type.byte_width != 16 or array.null_count:
        raise UserError(f"pair_id: got {array.type} with {array.null_count} nulls; valid: 16 bytes, none null")
    if not len(array):
        return np.empty((0, 2), ">u8")
    return np.frombuffer(array.buffers()[1], ">u8", count=2 * len(array), offset=16 * array.offset).reshape(-1, 2)


def table_ids(column: pa.ChunkedArray) -> np.ndarray:
    """`id_words` for the identifiers a person may have at hand, in their order.

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
        return id_words(column)
    return id_words(pa.array(_sixteen_bytes(column), pa.binary(ID_BYTES)))


def _sixteen_bytes(column: pa.ChunkedArray) -> list[bytes]:
    values = column.to_pylist()
    if all(isinstance(value, str) for value in values):
        if values and all(len(value) == 2 * ID_BYTES for value in values):
            if wrong := next((value for value in values if not _HEX.fullmatch(value)), None):
                raise UserError(f"pair_id: got text such as {wrong!r}; 32 characters must be hex digits")
            return [bytes.fromhex(value) for value in values]
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
