"""`select_table` against golden examples, a full Python sort, NumPy and DuckDB."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any
from unittest import mock

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import NonFiniteError, UserError
from prefsel.numbers import ranges
from prefsel.select import select_table


def telling(num_values: int) -> Any:
    """Shards that tell so few values of a range: more rounds, the same rows."""
    return mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values)


def realistic(num_rows: int, offset: float = 0.0) -> pa.Table:
    """Scores with 40 % at one value, some nulls and both zeros; hashed-looking ids in a random order."""
    rng = np.random.default_rng(num_rows)
    score_N = np.round(rng.standard_normal(num_rows), 3)
    score_N[rng.random(num_rows) < 0.4] = 0.5
    score_N[rng.random(num_rows) < 0.05] = -0.0
    score_N = score_N + offset if offset else score_N
    ids = [rng.bytes(16) for _ in range(num_rows)]
    return pa.table(
        {
            "pair_id": pa.array(ids, pa.binary(16)),
            "s": pa.array(score_N, mask=rng.random(num_rows) < 0.1),
            "aspect": pa.array(
                rng.choice(["helpfulness", "honesty", "truthfulness"], num_rows), mask=rng.random(num_rows) < 0.1
            ),
            "source": pa.array(rng.choice(["uf", "hh"], num_rows, p=[0.8, 0.2])),
        }
    )


@pytest.mark.parametrize("name", ["top-ties-k2", "top-ties-k3"])
def test_golden_top(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    table = pa.table(example["inputs"])
    kept = select_table(table, {"kind": "top", "score": "score", "count": example["params"]["count"]})
    assert kept.tolist() == example["expected"]["keep"]


def test_golden_two_bands(golden: dict[str, dict]) -> None:
    example = golden["lossdiff-irm-bands"]
    table = pa.table({"pair_id": list(range(10)), **example["inputs"]})
    kept = [select_table(table, {"kind": "band", "score": name, **example["params"]}) for name in ("lossdiff", "irm")]
    assert np.intersect1d(*kept).tolist() == example["expected"]["keep"]


def test_golden_tif_band(golden: dict[str, dict]) -> None:
    example = golden["tif"]
    table = pa.table({"pair_id": list(range(5)), "influence": example["expected"]["influence"]})
    kept = select_table(table, {"kind": "band", "score": "influence", **example["params"]})
    assert kept.tolist() == np.flatnonzero(example["expected"]["keep"]).tolist()


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_values", [3, 2048])
def test_top_equals_duckdb(offset: float, reverse: bool, num_values: int) -> None:
    table = realistic(3000, offset)
    for ratio in ("0.05", "0.3", "0.77", "1"):
        rule = {"kind": "top", "score": "s", "ratio": ratio, "reverse": reverse}
        with telling(num_values):
            kept = select_table(table, rule)
        indexed = table.append_column("n", pa.array(range(table.num_rows)))  # noqa: F841 (read by DuckDB)
        direction = "asc" if reverse else "desc"
        eligible = table.num_rows - table["s"].null_count
        expected = duckdb.sql(
            f"select n from indexed where s is not null order by s {direction}, pair_id asc "
            f"limit {int(Fraction(ratio) * eligible)}"
        ).fetchnumpy()["n"]
        assert kept.tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("by", ["aspect", "source", ["source", "aspect"]])
def test_quota_equals_duckdb(by: str | list[str]) -> None:
    table = realistic(3000)
    with telling(3):
        kept = select_table(table, {"kind": "quota", "score": "s", "by": by, "ratio": 0.3})
    taken = table.take(pa.array(kept)).append_column("n", pa.array(kept))  # noqa: F841 (read by DuckDB)
    indexed = table.append_column("n", pa.array(range(table.num_rows)))  # noqa: F841
    names = ", ".join([by] if isinstance(by, str) else by)
    # Within each stratum the kept rows are its first ones ...
    place = f"row_number() over (partition by {names} order by s desc, pair_id) place"
    ranked = f"select *, {place} from indexed where s is not null"
    joined = duckdb.sql(
        f"select {names}, count(*) size, sum((n in (select n from taken))::int) kept, "
        f"max(place) filter (n in (select n from taken)) last from ({ranked}) group by {names}"
    ).fetchall()
    assert all(kept == last for *_, kept, last in joined)
    # ... and every stratum is within one row of its share of the exact total.
    eligible = table.num_rows - table["s"].null_count
    assert len(kept) == eligible * 3 // 10
    assert len(joined) == {"aspect": 4, "source": 2}.get(by if isinstance(by, str) else "both", 8)
    for *_, size, count, _ in joined:
        assert abs(count - len(kept) * size / eligible) < 1


ROWS = st.lists(
    st.one_of(st.none(), st.sampled_from([0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6]), st.floats(-10, 10)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.data(), st.booleans(), st.sampled_from([2, 3, 1000]))
def test_top_equals_a_sort_with_nulls(
    values: list[float | None], data: st.DataObject, reverse: bool, num_values: int
) -> None:
    ids = data.draw(st.permutations(range(len(values))))
    eligible = [row for row, value in enumerate(values) if value is not None]
    table = pa.table({"pair_id": list(ids), "s": pa.array(values, pa.float64())})
    if not eligible:
        assert select_table(table, {"kind": "top", "score": "s", "ratio": 0.5}).tolist() == []
        return
    count = data.draw(st.integers(1, len(eligible)))
    with telling(num_values):
        kept = select_table(table, {"kind": "top", "score": "s", "count": count, "reverse": reverse})
    order = sorted(eligible, key=lambda row: (values[row] if reverse else -values[row], ids[row]))
    assert kept.tolist() == sorted(order[:count])


def test_selection_does_not_depend_on_row_order_or_chunks() -> None:
    table = realistic(500)
    shuffled_N = np.random.default_rng(3).permutation(500)
    shuffled = table.take(pa.array(shuffled_N))
    chunked = pa.concat_tables([shuffled[:1], shuffled[1:100], shuffled[100:100], shuffled[100:]])
    for rule in (
        {"kind": "top", "score": "s", "ratio": 0.3},
        {"kind": "band", "score": "s", "low": 12.5, "high": 90},
        {"kind": "quota", "score": "s", "by": ["aspect"], "count": 33},
    ):
        kept = select_table(table, rule)
        assert len(kept) > 30
        assert kept.tolist() == sorted(shuffled_N[select_table(chunked, rule)].tolist())


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([f"{n:032x}" for n in (6, 5, 4, 3)]),
        pa.array([f"{n:032X}" for n in (6, 5, 4, 3)]),
        pa.array(["pair-6", "pair-5", "pair-4", "pair-3"]),
        pa.array([b"6", b"55", b"4", b"3"]),
        pa.array([b"6f", b"5f", b"4f", b"3f"], pa.binary(2)),
        pa.array([6, 5, 4, 3], pa.uint64()),
        pa.array([bytes(15) + bytes([n]) for n in (6, 5, 4, 3)], pa.binary(16)),
    ],
)
def test_any_reasonable_pair_id_breaks_ties_in_its_order(ids: pa.Array) -> None:
    table = pa.table({"pair_id": ids, "s": [1.0, 1.0, 1.0, 1.0]})
    assert select_table(table, {"kind": "top", "score": "s", "count": 2}).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1, None, 3, 4]), "1 of 4 values are null"),
        (pa.array([1, -2, 3, 4]), "got -2"),
        (pa.array(["x" * 17, "b", "c", "d"]), "valid: 16 bytes, 32 hex digits"),
        (pa.array(["z" * 32] * 4), "must be hex digits"),
        (pa.array(["0" * 32, "00 " * 10 + "01", "1" * 32, "2" * 32]), "text such as '00 00 .* 01'; 32 characters must"),
        (pa.array([" " * 32, "0" * 32, "1" * 32, "2" * 32]), "must be hex digits"),
        (pa.array([0.5, 1.5, 2.5, 3.5]), "got a column of double"),
        (pa.array([7, 7, 7, 7]), "1 identifiers stand more than once, in 4 of 4 rows"),
    ],
)
def test_unusable_pair_ids_are_refused(ids: pa.Array, message: str) -> None:
    table = pa.table({"pair_id": ids, "s": [1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(UserError, match=message):
        select_table(table, {"kind": "top", "score": "s", "count": 2})


@pytest.mark.parametrize("how", ["pyarrow", "polars", "datasets"])
def test_a_dedupe_by_pair_takes_messages(how: str) -> None:
    """As `prefsel.open` and conversational data sets have them."""

    def said(text: str | None, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text, "rest": None, **more}]

    rows = [
        {"pair_id": "a", "prompt_id": "p", "chosen": said("x"), "rejected": said("y"), "s": 1.0},
        {"pair_id": "b", "prompt_id": "p", "chosen": said("y"), "rejected": said("x"), "s": 2.0},  # as a, turned
        {"pair_id": "c", "prompt_id": "q", "chosen": said("x"), "rejected": said("y"), "s": 0.0},  # another prompt
        {
            "pair_id": "d",
            "prompt_id": "p",
            "chosen": said("x"),
            "rejected": said("y", rest='{"name": "Ann"}'),
            "s": 0.5,
        },
        {"pair_id": "e", "prompt_id": "p", "chosen": said(None), "rejected": said("x") + said("y"), "s": 0.5},
    ]
    table: Any = pa.Table.from_pylist(rows)
    if how != "pyarrow":
        library = pytest.importorskip(how)
        table = library.from_arrow(table) if how == "polars" else library.Dataset(table)
    rule = {"kind": "dedupe", "by": "pair", "rule": {"kind": "top", "score": "s", "ratio": 1.0}}
    assert select_table(table, rule).tolist() == [1, 2, 3, 4]


def test_non_finite_scores_name_column_and_pair_ids() -> None:
    ids = pa.array([bytes(15) + bytes([n]) for n in range(4)], pa.binary(16))
    table = pa.table({"pair_id": ids, "s": [1.0, float("nan"), None, float("inf")]})
    with pytest.raises(NonFiniteError, match=f"s: 2 values are NaN or infinite, first pair_ids {1:032x}, {3:032x}"):
        select_table(table, {"kind": "top", "score": "s", "count": 1})


def test_decimals_are_compared_as_they_are_or_refused() -> None:
    top = {"kind": "top", "score": "s", "count": 1}
    ids = ["a", "b", "c"]
    for values, kept in ((["0.1", "0.30", None], 1), (["-1.5", None, "9007199254740993"], 2), (["2", "2", "1"], 0)):
        decimals = pa.array([value and Decimal(value) for value in values], pa.decimal128(30, 2))
        assert select_table(pa.table({"pair_id": ids, "s": decimals}), top).tolist() == [kept]
    # As float64 the first two are equal, and the smaller pair_id would win over the larger score.
    close = pa.array([Decimal(2**53), Decimal(2**53 + 1), None], pa.decimal128(38, 0))
    with pytest.raises(UserError, match=r"s: got decimal128\(38, 0\) of which float64 makes 1 different values equal"):
        select_table(pa.table({"pair_id": ids, "s": close}), top)


def test_missing_and_unusable_columns_are_named() -> None:
    table = pa.table({"pair_id": [1], "s": ["high"]})
    with pytest.raises(UserError, match="rule quota: needs score_x, aspect; the table has pair_id, s"):
        select_table(table, {"kind": "quota", "score": "score_x", "by": "aspect", "count": 1})
    with pytest.raises(UserError, match="s: got a column of string; valid: numbers"):
        select_table(table, {"kind": "top", "score": "s", "count": 1})
    with pytest.raises(UserError, match="count: got 2; valid: at most the 1 eligible pairs"):
        select_table(pa.table({"pair_id": [1, 2], "s": [1.0, None]}), {"kind": "top", "score": "s", "count": 2})


@pytest.mark.parametrize(
    ("name", "column"),
    [("source", [["uf"], ["hh"]]), ("source", [{"a": 1}, {"a": 2}]), ("aspect", [("help", "truth"), ()])],
)
def test_strata_of_nested_values_are_refused(name: str, column: list) -> None:
    table = pa.table({"pair_id": [1, 2], "s": [1.0, 2.0], name: column})
    with pytest.raises(UserError, match=rf"^{name}: got a column of (list|struct)<.*>; valid: text or numbers"):
        select_table(table, {"kind": "quota", "score": "s", "by": name, "ratio": 1})


def test_strata_of_numbers_have_names() -> None:
    table = pa.table({"pair_id": [1, 2, 3], "s": [1.0, 2.0, 3.0], "source": [7, 7, 8]})
    assert select_table(table, {"kind": "quota", "score": "s", "by": "source", "ratio": 0.7}).tolist() == [1, 2]


def test_lengths_that_overflow_name_their_columns_and_values() -> None:
    lengths = {"num_tokens_chosen": [1.0, 1e308, 3.0], "num_tokens_rejected": [1.0, -1e308, 3.0]}
    table = pa.table({"pair_id": [1, 2, 3], "s": [1.0, 2.0, 3.0], **lengths})
    match = r"length_bin: .* in 1 rows, first in row 1: num_tokens_chosen 1e\+308, num_tokens_rejected -1e\+308"
    with pytest.raises(UserError, match=match):
        select_table(table, {"kind": "quota", "score": "s", "by": "length_bin", "ratio": 1})


def test_integer_scores_are_numbers() -> None:
    table = pa.table({"pair_id": [1, 2, 3], "s": [3, 1, 2]})
    assert select_table(table, {"kind": "top", "score": "s", "count": 2}).tolist() == [0, 2]
