"""JSON lines, plain and gzipped: what is read, what is not, and where it stood."""

import gzip
import io
import json
import os
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.ingest.compression import chunks
from prefsel.ingest.jsonl import read_jsonl
from prefsel.ingest.readers import OVERSIZE_KEPT_BYTES, BadRow, RawRow, read_rows
from prefsel.reasons import QUARANTINE

LIMIT = 1 << 20


def read(path, data: bytes, max_row_bytes: int = LIMIT):
    path.write_bytes(data)
    return list(read_rows(str(path), max_row_bytes=max_row_bytes))


def told(rows):
    """(row, reason) of bad rows and (row, value) of good ones."""
    return [(row.row, row.reason if isinstance(row, BadRow) else row.value) for row in rows]


def test_rows_carry_their_number_bytes_and_position(tmp_path):
    data = b'{"a": 1}\n\n  \r\n{"b": "\xc3\xa9"}\r\n{"c": 3}'
    rows = read(tmp_path / "a.jsonl", data)
    assert rows[0] == RawRow(0, 0, b'{"a": 1}', {"a": 1})
    assert rows[1] == RawRow(1, 14, b'{"b": "\xc3\xa9"}\r', {"b": "é"})
    assert rows[2] == RawRow(2, 27, b'{"c": 3}', {"c": 3})
    assert all(data[row.byte_position :].startswith(row.raw) for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.JSONL"])
def test_endings(tmp_path, name):
    assert told(read(tmp_path / name, b'{"a":1}\n')) == [(0, {"a": 1})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not_json"),
        (b"{'a': 1}", "not_json"),
        (b'{"a": 1} x', "not_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not_json"),
        (b"[1]", "wrong_type"),
        (b"null", "wrong_type"),
        (b'"text"', "wrong_type"),
        (b'{"a": "\xff"}', "undecodable"),
        (b"\xff\xfe{\x00}\x00", "undecodable"),
        (b'{"a": "\\ud800"}', "undecodable"),
        (b'{"a": ["\\uDfff tail"]}', "undecodable"),
        (b'{"\\ud800": 1}', "undecodable"),
    ],
)
def test_a_bad_row_keeps_its_place_and_bytes(tmp_path, line, reason):
    rows = read(tmp_path / "a.jsonl", b'{"a":1}\n' + line + b'\n{"b":2}\n')
    assert told(rows) == [(0, {"a": 1}), (1, reason), (2, {"b": 2})]
    assert (rows[1].raw, rows[1].byte_position) == (line, 8)
    assert reason in QUARANTINE


def test_a_surrogate_pair_and_an_escaped_backslash_are_fine(tmp_path):
    rows = read(tmp_path / "a.jsonl", b'{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud800"}\n')
    assert told(rows) == [(0, {"a": "\N{GRINNING FACE}"}), (1, {"a": "\\ud800"})]


def test_a_byte_order_mark_is_skipped_at_the_start_only(tmp_path):
    mark = b"\xef\xbb\xbf"
    rows = read(tmp_path / "a.jsonl", mark + b'{"a":1}\n' + mark + b'{"a":1}\n')
    assert told(rows) == [(0, {"a": 1}), (1, "not_json")]
    assert rows[0].raw.startswith(mark)


def test_nan_literals_are_left_for_the_adapter(tmp_path):
    (row,) = read(tmp_path / "a.jsonl", b'{"s": [NaN, Infinity, -Infinity, 1e999]}\n')
    assert [str(value) for value in row.value["s"]] == ["nan", "inf", "-inf", "inf"]


def test_the_row_limit_is_inclusive_and_keeps_the_beginning(tmp_path):
    fits = b'{"a":"' + b"x" * 92 + b'"}'
    over = b'{"a":"' + b"x" * 93 + b'"}'
    huge = b'{"a":"' + b"y" * 300_000 + b'"}'
    rows = read(tmp_path / "a.jsonl", b"\n".join([fits, over, huge, fits, huge]), max_row_bytes=100)
    assert [type(row).__name__ for row in rows] == ["RawRow", "BadRow", "BadRow", "RawRow", "BadRow"]
    assert {row.reason for row in rows if isinstance(row, BadRow)} == {"row_too_large"}
    assert rows[1].raw == over
    assert rows[2].raw == huge[:OVERSIZE_KEPT_BYTES]
    assert str(len(huge)) in rows[2].detail
    assert [row.byte_position for row in rows] == [0, 101, 203, 203 + len(huge) + 1, 203 + len(huge) + 102]


class Endless(io.RawIOBase):
    """`num_bytes` of one line that never was in memory."""

    def __init__(self, num_bytes):
        self.left = num_bytes

    def read(self, size=-1):
        given = min(size, self.left)
        self.left -= given
        return b"x" * given


def test_an_oversize_row_is_never_in_memory_whole():
    tracemalloc.start()
    (row,) = read_jsonl(chunks(Endless(200 << 20)), max_row_bytes=4 << 20, broken="")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.reason == "row_too_large"
    assert str(200 << 20) in row.detail
    assert peak < 20 << 20


def test_a_gzip_bomb_is_never_in_memory_whole(tmp_path):
    squeezed = zlib.compressobj(9, wbits=31)
    data = b"".join(squeezed.compress(b"0" * (1 << 20)) for _ in range(200)) + squeezed.flush()
    assert len(data) < 1 << 19
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    tracemalloc.start()
    (row,) = read_rows(str(tmp_path / "a.jsonl.gz"), max_row_bytes=4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.reason == "row_too_large"
    assert peak < 20 << 20


LINES = [json.dumps({"row": n, "text": os.urandom(60).hex()}).encode() for n in range(500)]
VALUES = [json.loads(line) for line in LINES]


def test_gzip_of_several_members_with_padding(tmp_path):
    parts = [gzip.compress(b"\n".join(LINES[:200]) + b"\n"), bytes(512), gzip.compress(b"\n".join(LINES[200:]))]
    rows = read(tmp_path / "a.jsonl.gz", b"".join(parts))
    assert [row.value for row in rows] == VALUES
    assert rows[300].byte_position == b"\n".join(LINES).index(LINES[300])


@pytest.mark.parametrize("cut", [0, 1, 5, 17, 5000, 20_000, -30, -8, -1])
def test_truncated_gzip_gives_its_good_lines_then_one_bad_row(tmp_path, cut):
    whole = gzip.compress(b"\n".join(LINES) + b"\n")
    rows = read(tmp_path / "a.jsonl.gz", whole[:cut])
    *good, last = rows
    assert [row.value for row in good] == VALUES[: len(good)]
    assert (last.reason, last.row) == ("truncated_gzip", len(good))
    # Nothing that could be decompressed is lost: the bad row begins where the good ones end and is part of the next.
    recovered = zlib.decompressobj(31).decompress(whole[:cut])
    assert len(good) == recovered.count(b"\n")
    assert last.raw == recovered.rpartition(b"\n")[2]


def test_corrupt_gzip_gives_the_lines_before_the_damage(tmp_path):
    whole = bytearray(gzip.compress(b"\n".join(LINES) + b"\n", mtime=0))
    whole[-6] ^= 1  # the checksum at the end: every line is there, and the file still is not to be trusted
    *good, last = read(tmp_path / "a.jsonl.gz", bytes(whole))
    assert [row.value for row in good] == VALUES
    assert last.reason == "truncated_gzip"
    *good, last = read(tmp_path / "a.jsonl.gz", gzip.compress(LINES[0] + b"\n") + b"garbage")
    assert (len(good), last.reason) == (1, "truncated_gzip")
    (row,) = read(tmp_path / "a.jsonl.gz", LINES[0] + b"\n")
    assert row.value == VALUES[0]  # not compressed, whatever its name says


def test_an_empty_file_has_no_rows(tmp_path):
    assert read(tmp_path / "a.jsonl", b"") == []
    assert read(tmp_path / "a.jsonl.gz", gzip.compress(b"")) == []


class Chunked(io.BytesIO):
    """Gives at most `size` bytes a read, whatever is asked."""

    def __init__(self, data, size):
        super().__init__(data)
        self.size = size

    def read(self, _=-1):
        return super().read(self.size)


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b""))), st.integers(1, 7), st.integers(1, 15)
)
def test_lines_do_not_depend_on_how_the_bytes_arrive(lines, chunk, limit):
    data = b"\n".join(lines)
    rows = list(read_jsonl(chunks(Chunked(data, chunk)), max_row_bytes=limit, broken=""))
    expected = [line for line in lines if line and not line.isspace()]
    assert [row.raw for row in rows] == expected
    assert [row.row for row in rows] == list(range(len(expected)))
    assert [getattr(row, "reason", "") == "row_too_large" for row in rows] == [len(line) > limit for line in expected]
    assert all(data[row.byte_position :].startswith(row.raw) for row in rows)


def test_the_arguments_are_checked_before_the_first_row(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        read_rows(str(tmp_path / "gone.jsonl"), max_row_bytes=LIMIT)
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match=r"d\.jsonl"):
        read_rows(str(tmp_path / "d.jsonl"), max_row_bytes=LIMIT)
    with pytest.raises(UserError, match="max_row_bytes"):
        read_rows("a.jsonl", max_row_bytes=0)
