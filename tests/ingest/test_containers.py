"""Files of the shapes that people have: arrays, tables of text, compressions, names that lie, folders of splits."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.ingest.json_array import ValueSplitter
from prefsel.ingest.jsonl import read_jsonl
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.rows import BadRow, RawRow

ROWS = [
    {"prompt": "Why?", "chosen": 'Because it "is",\nso', "rejected": "No, ü."},
    {"prompt": "How?", "chosen": "So.", "rejected": "No idea."},
]
LIMIT = 1 << 20


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def read(folder: Path, name: str, data: bytes) -> list[RawRow | BadRow]:
    (folder / name).write_bytes(data)
    return list(read_rows(str(folder / name), max_row_bytes=LIMIT))


SHAPES: dict[str, bytes] = {
    "lines.jsonl": lines(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "pretty-rows.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "array-after-a-mark.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(),
    "table.csv": table(ROWS, ","),
    "table.tsv": table(ROWS, "\t"),
    "semicolons.csv": table(ROWS, ";"),
    "tabs.csv": table(ROWS, "\t"),
    "marked.csv": b"\xef\xbb\xbf" + table(ROWS, ","),
    # Names that lie, or say nothing.
    "parquet.jsonl": parquet(ROWS),
    "gzip.jsonl": gzip.compress(lines(ROWS)),
    "lines.parquet.txt": lines(ROWS),
    "lines-of-json.csv": lines(ROWS),
    "no-ending": json.dumps(ROWS).encode(),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    found = read(tmp_path, name, SHAPES[name])
    assert [one.value for one in found if isinstance(one, RawRow)] == ROWS
    assert [one.row for one in found] == [0, 1]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "table.csv"])
def test_every_compression_of_every_shape(name: str, ending: str, tmp_path: Path) -> None:
    found = read(tmp_path, name + ending, PACKERS[ending](SHAPES[name]))
    assert [one.value for one in found if isinstance(one, RawRow)] == ROWS


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_data_that_breaks_off_is_one_row_of_its_own(ending: str, tmp_path: Path) -> None:
    many = lines([{"text": f"{number} {'x' * (number % 97)}"} for number in range(20_000)])
    data = PACKERS[ending](many)
    *rows, last = read(tmp_path, f"cut.jsonl{ending}", data[: len(data) // 2])
    assert isinstance(last, BadRow)
    assert last.reason == ("truncated_gzip" if ending == ".gz" else "truncated_stream")
    assert all(isinstance(one, RawRow) for one in rows)


def test_an_array_that_breaks_off_and_elements_that_are_no_rows(tmp_path: Path) -> None:
    good, bad, last = read(tmp_path, "a.json", b'[{"a": 1}, 2, {"b": ')
    assert isinstance(good, RawRow)
    assert isinstance(bad, BadRow)
    assert isinstance(last, BadRow)
    assert (bad.reason, last.reason, last.row) == ("wrong_type", "not_json", 2)


def test_rows_of_a_table_that_do_not_fit_its_header(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, "a.csv", b"a,b\n1,\n1,2,3\n\xff,2\n")
    assert isinstance(first, RawRow)
    assert first.value == {"a": "1", "b": None}
    assert [one.reason for one in (second, third) if isinstance(one, BadRow)] == ["not_delimited", "undecodable"]


def test_an_array_is_read_in_flat_memory(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "big.json").open("w") as out:
        out.write("[" + ",\n".join(json.dumps({"text": "x" * 1000, "n": n}) for n in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_rows(str(tmp_path / "big.json"), max_row_bytes=LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8 << 20


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a ZIP archive; unpack it"):
        read(tmp_path, "a.jsonl", b"PK\x03\x04 and so on")


def folder(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(lines(ROWS))
    return str(root)


@pytest.mark.parametrize(
    ("names", "choices"),
    [
        (
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ),
        (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), ("/train", "/test")),
        (("train-0.jsonl", "train-1.jsonl", "validation.jsonl"), ("/train*", "/validation.jsonl")),
        (("Train.csv", "Dev.csv"), ("Train.csv", "Dev.csv")),
    ],
)
def test_a_folder_of_several_splits_names_them(
    names: tuple[str, ...], choices: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds 2 splits") as caught:
        list_files(folder(tmp_path, *names))
    assert all(choice in str(caught.value) for choice in choices)


def test_one_split_is_no_choice_and_caches_are_no_data(tmp_path: Path) -> None:
    root = folder(tmp_path, "data/train-0.jsonl", "data/train-1.jsonl", "data/cache-1b2c.arrow", "data/tmpabc.arrow")
    assert [Path(name).name for name in list_files(root)] == ["train-0.jsonl", "train-1.jsonl"]


@pytest.mark.parametrize("element", ['{"a": NaN}', '{"id": 18446744073709551616}', '{"a": 1e999}', '{"a": "x\\\\"}'])
def test_an_element_of_an_array_is_read_as_its_line_is(tmp_path: Path, element: str) -> None:
    (line,) = read(tmp_path, "a.jsonl", element.encode())
    first, found, last = read(tmp_path, "a.json", f'[{{"b": "]}},["}} ,\n {element} , {{"c": [{{}}, [1]]}}]\n'.encode())
    assert (first.row, found.row, last.row) == (0, 1, 2)
    assert repr(getattr(found, "value", found)) == repr(getattr(line, "value", line))
    assert isinstance(first, RawRow)
    assert first.value == {"b": "]},["}
    assert isinstance(last, RawRow)


def test_a_bad_element_costs_itself(tmp_path: Path) -> None:
    half = '{"a": "\\ud83d"}'
    found = read(tmp_path, "a.json", f'[{half}, {{"a": 1}}, {{"a": oops}}, 7, "a, b", [1, 2], {{"a": 2}}]'.encode())
    reasons = [one.reason if isinstance(one, BadRow) else one.value["a"] for one in found]
    assert reasons == ["undecodable", 1, "not_json", "wrong_type", "wrong_type", "wrong_type", 2]
    assert read(tmp_path, "empty.json", b" [ ] \n") == []
    pretty = "\n".join(json.dumps({"t": f'\\"{{[{n}', "u": [{}]}, indent=2) for n in range(3))
    assert [one.value["t"] for one in read(tmp_path, "p.json", pretty.encode()) if isinstance(one, RawRow)] == [
        f'\\"{{[{n}' for n in range(3)
    ]


def test_an_oversize_element_is_never_held(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("w") as out:
        out.write('[{"a": 1}, {"a": "' + 'x\\"' * (LIMIT) + '"}, {"a": 2}]')
    first, large, last = read_rows(str(tmp_path / "a.json"), max_row_bytes=LIMIT)
    assert isinstance(first, RawRow)
    assert isinstance(large, BadRow)
    assert (large.reason, large.row) == ("row_too_large", 1)
    assert isinstance(last, RawRow)
    assert last.value == {"a": 2}


@given(
    st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.none()))),
    st.integers(1, 9),
)
def test_any_array_in_any_chunks(rows: list[dict[str, Any]], size: int) -> None:
    data = json.dumps(rows).encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    splitter = ValueSplitter(1 << 20, is_array=True)
    found = read_jsonl(iter(pieces), max_row_bytes=1 << 20, broken="cut", splitter=splitter)
    assert [one.value if isinstance(one, RawRow) else one for one in found] == rows


def test_tables_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two columns of the table are called 'chosen'"):
        read(tmp_path, "a.csv", b"prompt,chosen,rejected,chosen\np,c,r,c\n")
    with pytest.raises(UserError, match="called ' chosen', with a space around it"):
        read(tmp_path, "c.csv", b'prompt, chosen, rejected\n"p", "c, and more", "r"\n')
    with pytest.raises(UserError, match="is UTF-16; convert it to UTF-8"):
        read(tmp_path, "b.csv", "prompt,chosen\na,b\n".encode("utf-16"))
