"""Arrow columns as arrays: identifiers in place, strata against the values row by row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.numbers.columns import id_words, strata

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


def test_id_words_read_bytes_in_place_and_in_order() -> None:
    raw = [bytes([n]) + bytes(14) + bytes([255 - n]) for n in (3, 1, 2)]
    array = pa.array([b"\xff" * 16, *raw], pa.binary(16))
    words_NW = id_words(array[1:])
    assert words_NW.tolist() == [[n << 56, 255 - n] for n in (3, 1, 2)]
    assert words_NW.base is not None
    assert np.shares_memory(words_NW, np.frombuffer(array.buffers()[1], np.uint8))
    chunked = pa.chunked_array([array[:2], array[2:]])
    assert id_words(chunked)[1:].tolist() == words_NW.tolist()
    assert id_words(pa.array([], pa.binary(16))).shape == (0, 2)
    for bad in (pa.array([None], pa.binary(16)), pa.array(["x"]), pa.array([b"x"], pa.binary(1))):
        with pytest.raises(UserError, match="valid: 16 bytes"):
            id_words(bad)
