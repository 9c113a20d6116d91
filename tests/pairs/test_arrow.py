"""What people hold goes into the notebook calls: every library's table gives what the same rows give as Arrow."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics import score_table
from prefsel.pairs.arrow import as_rows, as_table, plain
from prefsel.select import select_table

# The largest scores stand at rows 4, 1 and 5; row 3 has none.
COLUMNS: dict[str, list[Any]] = {
    "pair_id": [f"pair-{n}" for n in range(6)],
    "source": ["a", "a", "b", "b", "b", "a"],
    "score_x": [1.0, 5.0, 2.0, None, 6.0, 4.0],
    "rm_gold_chosen": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "rm_gold_rejected": [0.0, 5.0, 1.0, 1.0, 9.0, 0.5],
}
TABLE = pa.table(COLUMNS)
HELD_ROWS = TABLE
"""As DuckDB finds it, to whom `table` is a word of its own."""
TOP = {"kind": "top", "score": "score_x", "count": 3}
QUOTA = {"kind": "quota", "score": "score_x", "by": "source", "ratio": 0.5}


def shuffled_dataset() -> datasets.Dataset:
    """The rows of COLUMNS through an indices mapping: stored in reverse, between others, and selected back."""
    others = {name: [None, *values[::-1], None] for name, values in COLUMNS.items()}
    stored = datasets.Dataset.from_dict(others)
    return stored.select([6, 5, 4, 3, 2, 1])


HELD: dict[str, Callable[[], Any]] = {
    "pyarrow.Table": lambda: TABLE,
    "pyarrow.RecordBatch": lambda: TABLE.combine_chunks().to_batches()[0],
    "pyarrow.RecordBatchReader": lambda: TABLE.to_reader(max_chunksize=2),
    "chunked and sliced": lambda: pa.concat_tables([TABLE, TABLE.slice(0, 2), TABLE.slice(2)]).slice(6),
    "pandas": lambda: pd.DataFrame(COLUMNS),
    "pandas, filtered": lambda: pd.DataFrame({k: [v[0], *v] for k, v in COLUMNS.items()}).iloc[1:],
    "pandas, pair_id as its index": lambda: pd.DataFrame(COLUMNS).set_index("pair_id"),
    "pandas, Arrow's types": lambda: pd.DataFrame(COLUMNS).convert_dtypes(dtype_backend="pyarrow"),
    "polars": lambda: pl.DataFrame(COLUMNS),
    "polars, categories": lambda: pl.DataFrame(COLUMNS).with_columns(pl.col("source").cast(pl.Categorical)),
    "duckdb": lambda: duckdb.sql("select * from HELD_ROWS"),
    "datasets": lambda: datasets.Dataset.from_dict(COLUMNS),
    "datasets, with other indices": shuffled_dataset,
    "datasets, formatted": lambda: datasets.Dataset.from_dict(COLUMNS).with_format("numpy", columns=["source"]),
    "a dictionary of lists": lambda: COLUMNS,
    "a dictionary of arrays": lambda: {name: pa.array(values) for name, values in COLUMNS.items()},
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_every_library_gives_the_same_rows_and_scores(held: Callable[[], Any]) -> None:
    assert select_table(held(), TOP).tolist() == [1, 4, 5]
    assert select_table(held(), QUOTA).tolist() == [1, 4]  # half of three and of two eligible rows, five in all
    margins = score_table(held(), "explicit_margin", rm="gold")
    assert margins.tolist() == [1.0, -3.0, 2.0, 3.0, -4.0, 5.5]
    assert as_table(held()).select(TABLE.column_names).to_pylist() == TABLE.to_pylist()


def test_missing_values_of_pandas_are_null_and_nan_elsewhere_is_a_fault() -> None:
    scores = [0.5, float("nan"), 2.0]
    ids = ["a", "b", "c"]
    assert select_table(pd.DataFrame({"pair_id": ids, "s": scores}), {"kind": "top", "score": "s", "ratio": 1}).tolist()
    for held in (pl.DataFrame({"pair_id": ids, "s": scores}), {"pair_id": ids, "s": np.array(scores)}):
        with pytest.raises(NonFiniteError, match="s: 1 values are NaN or infinite, first pair_ids b"):
            select_table(held, {"kind": "top", "score": "s", "ratio": 1})


GAPS = {"pair_id": ["a", "b", "c", "d"], "rm_g_chosen": [1.0, None, 3.0, 0.0], "rm_g_rejected": [0.0, 0.0, 1.0, 2.0]}
CHAINED: dict[str, Callable[[], Any]] = {
    "pandas": lambda: (df := pd.DataFrame(GAPS)).assign(score_m=margins_of(df)),
    "Polars": lambda: (df := pl.DataFrame(GAPS)).with_columns(pl.Series("score_m", pa.array(margins_of(df)))),
    "Polars, NaN filled": lambda: (df := pl.DataFrame(GAPS)).with_columns(
        score_m=pl.Series(margins_of(df)).fill_nan(None)
    ),
    "pyarrow, an array": lambda: (table := pa.table(GAPS)).append_column("score_m", pa.array(margins_of(table))),
    "pyarrow, chunks": lambda: (table := pa.table(GAPS)).append_column("score_m", [margins_of(table)]),
    "datasets": lambda: (rows := datasets.Dataset.from_dict(GAPS)).add_column("score_m", pa.array(margins_of(rows))),
    "a dictionary of lists": lambda: {**GAPS, "score_m": margins_of(GAPS)},
    "a dictionary of arrays": lambda: {
        **(held := {name: pa.array(one) for name, one in GAPS.items()}),
        "score_m": margins_of(held),
    },
}


def margins_of(held: Any) -> np.ndarray:
    return score_table(held, "explicit_margin", rm="g")


@pytest.mark.parametrize("held", CHAINED.values(), ids=CHAINED)
def test_scores_go_into_a_selection_and_missing_ones_are_null(held: Callable[[], Any]) -> None:
    """The margins are 1, none, 2 and -2: half of three eligible pairs is one."""
    assert select_table(held(), {"kind": "top", "score": "score_m", "ratio": 0.5}).tolist() == [2]
    assert select_table(held(), {"kind": "top", "score": "score_m", "ratio": 1}).tolist() == [0, 2, 3]


def test_scores_are_an_array_like_any_other() -> None:
    margins = margins_of(GAPS)
    assert margins.dtype == np.float64
    np.testing.assert_array_equal(margins + 1, [2.0, np.nan, 3.0, -1.0])
    assert pa.array(margins[:2]).to_pylist() == [1.0, None]
    assert pa.array(margins, pa.float32()).to_pylist() == [1.0, None, 2.0, -2.0]


def test_nan_of_polars_says_what_to_do() -> None:
    held = pl.DataFrame(GAPS)
    with pytest.raises(NonFiniteError, match=r"score_m: 1 values are NaN .*null, not NaN \(Polars: fill_nan\(None\)\)"):
        select_table(held.with_columns(score_m=margins_of(held)), {"kind": "top", "score": "score_m", "ratio": 1})


IDS: dict[str, Callable[[], pa.Array]] = {
    "string": lambda: pa.array(COLUMNS["pair_id"]),
    "large_string": lambda: pa.array(COLUMNS["pair_id"], pa.large_string()),
    "string_view": lambda: pa.array(COLUMNS["pair_id"], pa.string_view()),
    "binary_view": lambda: pa.array([one.encode() for one in COLUMNS["pair_id"]], pa.binary_view()),
    "dictionary": lambda: pa.array(COLUMNS["pair_id"]).dictionary_encode(),
    "dictionary of views": lambda: pa.DictionaryArray.from_arrays(
        pa.array(range(6), pa.uint32()), pa.array(COLUMNS["pair_id"], pa.string_view())
    ),
    "dictionary of integers": lambda: pa.array(range(6)).dictionary_encode(),
    "uuid": lambda: pa.array([uuid.UUID(int=n).bytes for n in range(6)], pa.uuid()),
    "runs": lambda: pc.run_end_encode(pa.array(range(6))),
}
NUMBERS: dict[str, Callable[[list[Any]], pa.Array]] = {
    "decimal": lambda values: pa.array([None if v is None else Decimal(str(v)) for v in values]),
    "decimal256": lambda values: pa.array(
        [None if v is None else Decimal(str(v)) for v in values], pa.decimal256(50, 2)
    ),
    "half": lambda values: pa.array(values, pa.float32()).cast(pa.float16()),
    "float": lambda values: pa.array(values, pa.float32()),
    "int8": lambda values: pa.array(values, pa.int8()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
    "runs": lambda values: pc.run_end_encode(pa.array(values)),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_every_type_of_ids_and_numbers(
    ids: Callable[[], pa.Array], numbers: Callable[[list[Any]], pa.Array], is_chunked: bool
) -> None:
    table = pa.table({"pair_id": ids(), "score_x": numbers(COLUMNS["score_x"])})
    if is_chunked:  # with other dictionaries per chunk, and slices of buffers
        table = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    assert select_table(table, TOP).tolist() == [1, 4, 5]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_dedupe_and_text_columns_of_every_type(kind: pa.DataType) -> None:
    columns = {"prompt_id": ["p", "q", "p"], "chosen": ["u", "v", "w"], "rejected": ["w", "x", "u"]}
    table = pa.table({"pair_id": [1, 2, 3], "s": [1.0, 2.0, 3.0]} | {k: pa.array(v, kind) for k, v in columns.items()})
    for by in ("prompt", "pair"):
        rule = {"kind": "dedupe", "by": by, "rule": {"kind": "top", "score": "s", "ratio": 1}}
        assert select_table(table, rule).tolist() == [1, 2]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_a_metric_reads_text_of_every_type(kind: pa.DataType) -> None:
    rng = np.random.default_rng(0)
    numbers = {f"rm_{aspect}_{side}": rng.normal(size=8) for aspect in "xy" for side in ("chosen", "rejected")}
    as_text = pa.table({"aspect": ["x", "y"] * 4, **numbers})
    expected = score_table(as_text, "preference_divergence", aspects=["x", "y"])
    assert np.isfinite(expected).all()
    table = as_text.set_column(0, "aspect", pa.array(["x", "y"] * 4, kind))
    assert score_table(table, "preference_divergence", aspects=["x", "y"]).tolist() == expected.tolist()


def test_integers_that_float64_cannot_hold_are_refused() -> None:
    table = {"pair_id": [1, 2], "s": [2**60 + 1, 1]}
    with pytest.raises(UserError, match=r"s: got int64 that float64 cannot hold exactly: Integer value 11529"):
        select_table(table, {"kind": "top", "score": "s", "count": 1})


# ------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([7, 8, 7, 9, 8, 7], "2 identifiers stand more than once, in 5 of 6 rows, first 7, 8;"),
        (["a", "b", "c", "d", "e", "a"], "1 identifiers stand more than once, in 2 of 6 rows, first a;"),
        ([bytes([n]) * 16 for n in (9, 1, 1, 2, 3, 4)], "in 2 of 6 rows, first " + "01" * 16),
        (["AB" * 16, "ab" * 16, *(f"{n:032x}" for n in range(4))], "in 2 of 6 rows, first " + "AB" * 16),
    ],
)
def test_a_pair_id_that_stands_twice_is_refused(ids: list[Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        select_table({"pair_id": ids, "s": [float(n) for n in range(6)]}, {"kind": "top", "score": "s", "count": 1})


def test_duplicates_are_found_exactly_and_collisions_are_none() -> None:
    """Against a naive count; the second and third id are different, and alike in what the search sorts by."""
    mixer = 0x9E3779B97F4A7C15
    # In the order of bytes that the search reads: little-endian words.
    first = (5).to_bytes(8, "little") + (11).to_bytes(8, "little")
    second = (6).to_bytes(8, "little") + ((11 - mixer) % 2**64).to_bytes(8, "little")
    rng = np.random.default_rng(0)
    others = [int(n).to_bytes(16, "big") for n in rng.integers(0, 10**9, 5000)]
    unique = list(dict.fromkeys(others))
    assert len(unique) < 5000 + 1
    table = {"pair_id": pa.array([first, second, *unique], pa.binary(16)), "s": np.arange(2.0 + len(unique))}
    assert len(select_table(table, {"kind": "top", "score": "s", "ratio": 0.5})) == (2 + len(unique)) // 2
    again = [*unique, *unique[10:20], unique[10]]
    with pytest.raises(
        UserError, match=rf"10 identifiers stand more than once, in 21 of .* first {unique[10].hex()}, "
    ):
        select_table(
            {"pair_id": pa.array(again, pa.binary(16)), "s": np.arange(float(len(again)))}, TOP | {"score": "s"}
        )


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([{"pair_id": 1}], r"table: got list; valid: a table of pandas, Polars"),
        ("scores.parquet", "table: got str; valid"),
        (None, "table: got NoneType"),
        (pl.DataFrame(COLUMNS).lazy(), "table: got polars.LazyFrame, which must be collected first"),
        ({"a": [1], "b": [1, 2]}, "got dict with a, b: .*expected length 1 but got length 2"),
        ({"a": [1, "x"]}, "table: got dict with a: Could not convert 'x'"),
        (datasets.DatasetDict({"train": shuffled_dataset()}), "got datasets.DatasetDict with train; valid"),
        (datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(), "got datasets.IterableDataset; valid"),
        (pa.table([[1], [2], [3]], names=["a", "a", "b"]), "table: columns a stand twice"),
    ],
)
def test_what_is_no_table_is_named(data: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        as_table(data)
    if not isinstance(data, list):
        with pytest.raises(UserError, match=told.replace("table: ", "rows: ").replace("; valid", "")):
            as_rows(data, ["a"], name="rows")


def test_rows_come_as_dictionaries_or_as_any_table() -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"], "more": 1}, {"prompt": "q", "completions": ["c"], "more": 2}]
    needs = ["prompt", "completions"]
    assert as_rows(iter(rows), needs, name="groups") == rows
    lean = [{name: row[name] for name in needs} for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    dataset = datasets.Dataset.from_list(rows[::-1]).select([1, 0])
    for held in (pa.Table.from_pylist(rows), pd.DataFrame(rows), pl.DataFrame(rows), columns, dataset):
        assert as_rows(held, needs, name="groups") == lean
    for wrong, told in (
        ([*rows, {"prompt": "r"}], r"groups\[2\]: needs completions; it has prompt"),
        ([*rows, "r"], r"groups\[2\]: got str; valid: dictionaries with prompt and completions"),
        (pl.DataFrame({"prompt": ["p"]}), "groups: needs completions; the table has prompt"),
        (rows[0], "groups: got dict with prompt, completions, more"),
        ("prompt", "groups: got str"),
        (7, "groups: got int"),
    ):
        with pytest.raises(UserError, match=told):
            as_rows(wrong, needs, name="groups")


def test_plain_leaves_what_needs_nothing() -> None:
    for kind in (pa.string(), pa.large_string(), pa.float64(), pa.binary(16), pa.list_(pa.string())):
        column = pa.chunked_array([[]], kind)
        assert plain(column) is column
    encoded = pa.chunked_array([pa.array(["a"]).dictionary_encode()])
    assert plain(encoded, keep_dictionary=True) is encoded
