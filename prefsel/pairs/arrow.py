"""Tables that people hold, as Arrow tables: through the Arrow C stream interface, with no code per library.

pandas, Polars and DuckDB hand over their columns through `__arrow_c_stream__`; a `datasets.Dataset` through its own
`arrow` format, which honours the order that a shuffle, a filter or a `select` gave it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import UserError

TABLES = (
    "a table of pandas, Polars, DuckDB, pyarrow or datasets, anything else with `__arrow_c_stream__`, or a dictionary "
    "of columns of equal length"
)
"""What a call that takes a table accepts, in words."""


def as_table(data: Any, *, name: str = "table") -> pa.Table:
    """Any table a person may hold as an Arrow table; columns are copied only where their library must.

    Args:
        data: A `pyarrow.Table`, `RecordBatch` or `RecordBatchReader`, a data frame of pandas (2.2 or newer), Polars
            or DuckDB, a `datasets.Dataset` (rows in its own order), any other object with `__arrow_c_stream__`, or a
            mapping of column names to lists or arrays of equal length. A missing value of pandas, which writes it as
            NaN, becomes null; NaN elsewhere stays NaN.
        name: What an error calls it.

    Returns:
        The table, rows in the order they were given in. A reader or stream is read to its end.

    Raises:
        UserError: It is no table, its columns are of unequal length or of a type that Arrow does not know, or two of
            them have the same name.
    """
    try:
        table = _table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{name}: got {_described(data)}: {error}; valid: {TABLES}") from error
    if table is None:
        raise UserError(f"{name}: got {_described(data)}; valid: {TABLES}")
    repeated = sorted({column for column in table.column_names if table.column_names.count(column) > 1})
    if repeated:
        raise UserError(f"{name}: columns {', '.join(repeated)} stand twice; names must differ")
    return table


def _table(data: Any) -> pa.Table | None:
    if isinstance(data, pa.Table):
        return data
    if _is_table(data) and not hasattr(data, "with_format"):
        return pa.table(dict(data) if isinstance(data, Mapping) else data)
    if hasattr(data, "with_format") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return data.with_format("arrow")[:]
    return None


def _is_table(data: Any) -> bool:
    """Whether something is a table rather than rows one after another."""
    return isinstance(data, Mapping) or any(hasattr(data, how) for how in ("__arrow_c_stream__", "with_format"))


def _described(data: Any) -> str:
    kind = type(data)
    keys = f" with {', '.join(map(str, list(data)[:5])) or 'nothing in it'}" if isinstance(data, Mapping) else ""
    lazy = ", which must be collected first" if hasattr(data, "collect") else ""
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}{keys}{lazy}".removeprefix("builtins.")


def as_rows(data: Any, needs: Sequence[str], *, uses: Sequence[str] = (), name: str) -> list[Mapping[str, Any]]:
    """Rows as dictionaries, from a table of any library or from dictionaries.

    Args:
        data: What `as_table` takes, or dictionaries one after another.
        needs: What every row must have.
        uses: What a row may have besides; other columns of a table are not read.
        name: What an error calls them.

    Returns:
        One dictionary per row, in the order given.

    Raises:
        UserError: It is neither, or a row lacks what it needs; names the first that does.
    """
    if _is_table(data):
        table = as_table(data, name=name)
        if missing := [column for column in needs if column not in table.column_names]:
            raise UserError(f"{name}: needs {', '.join(missing)}; the table has {', '.join(table.column_names)}")
        return table.select([one for one in table.column_names if one in (*needs, *uses)]).to_pylist()
    valid = f"dictionaries with {' and '.join(needs)}, or {TABLES}"
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise UserError(f"{name}: got {_described(data)}; valid: {valid}")
    rows = list(data)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}[{number}]: got {type(row).__name__}; valid: {valid}")
        if missing := [column for column in needs if column not in row]:
            raise UserError(f"{name}[{number}]: needs {', '.join(missing)}; it has {', '.join(map(str, row))}")
    return rows


def plain_table(table: pa.Table, names: Iterable[str], *, keep_dictionary: Collection[str] = ()) -> pa.Table:
    """Some columns of a table, each as `plain` gives it; codes stay codes in those of `keep_dictionary`."""
    columns = {name: plain(table[name], keep_dictionary=name in keep_dictionary) for name in names}
    return pa.table(columns)


def plain(column: pa.ChunkedArray, *, keep_dictionary: bool = False) -> pa.ChunkedArray:
    """The same values in a type that all of Arrow's functions take.

    Polars hands over text as views and categories as dictionaries of views, of which pyarrow can neither take rows nor
    decode them; pandas may hold runs, and identifiers come as UUIDs, an extension type.

    Args:
        column: Of any type.
        keep_dictionary: Leave a column that is stored as codes and a dictionary as it is, but for views in it.

    Returns:
        The column itself wherever its type needs nothing.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(column.cast(kind.storage_type), keep_dictionary=keep_dictionary)
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(column), keep_dictionary=keep_dictionary)
    if pa.types.is_dictionary(kind):
        if (values := _without_views(kind.value_type)) != kind.value_type:
            chunks = [
                pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(values)) for chunk in column.chunks
            ]
            column = pa.chunked_array(chunks, pa.dictionary(kind.index_type, values, kind.ordered))
        return column if keep_dictionary else column.cast(values)
    values = _without_views(kind)
    return column if values == kind else column.cast(values)


def _without_views(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind
