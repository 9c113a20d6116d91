"""Strata from columns of any Arrow kind against the values row by row."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.numbers.columns import strata

ENTRIES = (["a", "b", "c"], ["c", "a", "b"], ["a", "a", "c"], ["a", None, "c"])
"""Of a dictionary: in any order, twice the same, or null itself."""


def stored(places: list[int | None], entries: list[str | None]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(entries, pa.string()))


@settings(deadline=None)
@given(st.data(), st.integers(0, 20), st.integers(1, 3))
def test_every_row_points_at_its_values(data, num_rows, num_columns) -> None:
    columns = []
    for _ in range(num_columns):
        entries = data.draw(st.sampled_from(ENTRIES))
        place = st.one_of(st.none(), st.integers(0, 2))
        array = stored(data.draw(st.lists(place, min_size=num_rows, max_size=num_rows)), entries)
        columns.append(pa.chunked_array([array.cast(pa.string()) if data.draw(st.booleans()) else array]))
    code_N, labels = strata(columns)
    assert [labels[code] for code in code_N.tolist()] == list(zip(*(column.to_pylist() for column in columns)))
    assert sorted(set(code_N.tolist())) == list(range(len(labels)))  # only labels that occur
    assert len(set(labels)) == len(labels)


def test_chunks_may_have_dictionaries_of_their_own() -> None:
    column = pa.chunked_array([stored([0, 1], ["a", "b"]), stored([0, None], ["b", "a"])])
    code_N, labels = strata([column])
    assert [labels[code] for code in code_N.tolist()] == [("a",), ("b",), ("b",), (None,)]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_no_rows_have_no_strata(kind: pa.DataType) -> None:
    for column in (pa.chunked_array([], kind), pa.chunked_array([pa.array([], kind)])):
        code_N, labels = strata([column, column])
        assert (code_N.tolist(), labels) == ([], [])
