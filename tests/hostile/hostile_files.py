"""Hostile input files: kinds times parameters, the same bytes for the same seed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LIMIT = 1 << 20
"""Bytes of the largest row that is read in these tests."""
MIB = 1 << 20


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


GOOD = [line(row(n)) for n in range(6)]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(table: pa.Table, *, is_file: bool) -> bytes:
    out = io.BytesIO()
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def nested(depth: int, kind: str) -> bytes:
    return {"list": b"[" * depth + b"]" * depth, "dict": b'{"a":' * depth + b"1" + b"}" * depth}[kind]


def bad_lines() -> Iterator[tuple[str, bytes]]:
    """Lines that are no rows, or rows that something is wrong with."""
    for depth in (10, 500, 5_000, 100_000):
        for kind in ("list", "dict"):
            yield f"depth-{kind}-{depth}", nested(depth, kind)
            yield (
                f"depth-in-{kind}-{depth}",
                b'{"prompt": "p", "chosen": ' + nested(depth, kind) + b', "rejected": "b"}',
            )
    for digits in (20, 400, 4_301, 100_000):
        yield f"digits-{digits}", b'{"prompt":"p","chosen":"a","rejected":"b","score_chosen":' + b"9" * digits + b"}"
    for text in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "1e-999",
        "00",
        "+1",
        ".5",
        "0x1",
        "1_000",
        "nul",
        "None",
    ):
        yield f"number-{text}", b'{"prompt":"p","chosen":"a","rejected":"b","score_chosen":' + text.encode() + b"}"
        yield f"key-{text}", b"{" + text.encode() + b': "p"}'
    for name in ("prompt", "chosen", "rejected"):
        yield f"twice-{name}", line(row(0))[:-1] + b', "' + name.encode() + b'": "other"}'
        for value in (
            None,
            1,
            1.5,
            True,
            [],
            {},
            [[]],
            [None],
            [{}],
            "",
            " ",
            "\0",
            "\x1b[2J",
            "\u202eabc",
            "\ufeff",
            "a" * 100_000,
        ):
            yield f"{name}-{ascii(value)[:20]}", line(row(0, **{name: value}))
        for role in ("user", "assistant", "", None, 5, "<|im_start|>"):
            yield f"{name}-role-{role}", line(row(0, **{name: [{"role": role, "content": "x"}]}))
    for escape in (b"\\ud800", b"\\udc00\\ud800", b"\\uZZZZ", b"\\x41", b"\\", b"\\u0000", b"\x01", b"\t"):
        yield f"escape-{escape!r}", b'{"prompt":"p","chosen":"' + escape + b'","rejected":"b"}'
    for raw in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf", b"\x00" * 50, b"\xef\xbb\xbf"):
        yield f"bytes-{raw[:4]!r}", b'{"prompt":"' + raw + b'","chosen":"a","rejected":"b"}'
        yield f"bare-{raw[:4]!r}", raw
    yield "long", b'{"prompt": "' + b"x" * (2 * LIMIT) + b'"}'
    yield "at-limit", b'{"prompt": "' + b"x" * (LIMIT - 60) + b'","chosen":"a","rejected":"b"}'
    yield "many-values", b'{"prompt": [' + b"[]," * (LIMIT // 4) + b"[]]}"
    yield "many-keys", b"{" + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}"
    for text in (
        b"}",
        b"{",
        b"]",
        b'"',
        b"null",
        b"true",
        b"3",
        b"{}",
        b"[]",
        b'{"a":}',
        b"{'a':1}",
        b"//x",
        b"a,b,c",
        b"\x00",
    ):
        yield f"text-{text!r}", text


def text_files() -> Iterator[tuple[str, bytes, int | None]]:
    """(name, bytes, lines that are rows; None where that is not plain to see)."""
    for number, (name, bad) in enumerate(bad_lines()):
        yield f"line-{number}-{name}.jsonl", b"\n".join([*GOOD[:3], bad, *GOOD[3:]]), None if b"\n" in bad else 7
    for name, joint in {
        "crlf": b"\r\n",
        "blank": b"\n\n\n",
        "spaces": b"\n \t\n",
        "cr": b"\r",
        "nel": "\x85".encode(),
        "ls": "\u2028".encode(),
    }.items():
        yield f"joint-{name}.jsonl", joint.join(GOOD), None
        yield f"joint-{name}.json", b"[" + b",".join([joint + one for one in GOOD]) + b"]", None
    for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7", "latin-1", "cp037"):
        yield f"codec-{codec}.jsonl", "\n".join(one.decode() for one in GOOD).encode(codec), None
    for cut in (0, 1, 2, 10, 60, 100):
        yield f"cut-{cut}.jsonl", b"\n".join(GOOD)[:cut], None
        yield f"cut-{cut}.json", (b"[" + b",\n".join(GOOD) + b"]")[:cut], None
    header = b"prompt,chosen,rejected\n"
    for number, cell in enumerate(
        (
            b'"open',
            b'a"b',
            b'"a"b',
            b"a\0b",
            b"\xff",
            b"x" * (LIMIT + 9),
            b'"' + b"\n" * 5_000,
            b",,,,,,",
            b'""""',
            b"'a'",
            b"\r",
        )
    ):
        for name, start in {
            "csv": header,
            "nothing": b"",
            "twice": b"prompt,prompt\n",
            "spaced": b"prompt, chosen\n",
            "wide": b"c," * 20_000 + b"\n",
        }.items():
            yield f"table-{name}-{number}.csv", start + b"q,a,b\n" + cell + b",a,b\n" + b"q2,a,b\n", None
    for number in range(8):
        yield f"array-{number}.json", b"[" * (number * 7) + b",".join(GOOD) + b"]" * (number * 3), None


def packed_files(seed: int) -> Iterator[tuple[str, bytes, int | None]]:
    """Compressed files that are cut, damaged, nested, or far larger inside than outside."""
    draw = random.Random(seed)
    plain = b"\n".join(GOOD)
    for ending, pack in COMPRESSIONS.items():
        whole = pack(plain)
        yield f"whole.jsonl.{ending}", whole, 6
        yield f"twice.jsonl.{ending}", pack(whole), None
        yield f"tail.jsonl.{ending}", whole + b"garbage", None
        yield f"lie.{ending}", plain, None
        yield f"bomb.jsonl.{ending}", pack(b"\0" * (64 * MIB)), None
        yield f"bomb-lines.jsonl.{ending}", pack(b"\n" * (8 * MIB)), 0
        for number in range(8):
            place = draw.randrange(1, len(whole))
            yield f"cut-{number}.jsonl.{ending}", whole[:place], None
            yield (
                f"flip-{number}.jsonl.{ending}",
                whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :],
                None,
            )


def columnar_files(seed: int) -> Iterator[tuple[str, bytes, int | None]]:
    """Parquet and Arrow files: cut, damaged, nested without reason, of odd types, empty."""
    draw = random.Random(seed)
    table = pa.Table.from_pylist([row(n) for n in range(50)])
    wholes = {
        "parquet": parquet(table),
        "small-pages.parquet": parquet(table, data_page_size=1, row_group_size=1),
        "arrow": arrow(table, is_file=True),
        "stream.arrow": arrow(table, is_file=False),
    }
    for name, whole in wholes.items():
        yield f"whole.{name}", whole, 50
        yield f"empty.{name}", b"", None
        for number in range(12):
            place = draw.randrange(4, len(whole))
            yield f"cut-{number}.{name}", whole[:place], None
            data = bytearray(whole)
            for _ in range(1 + number):
                data[draw.randrange(8, len(data))] = draw.randrange(256)
            yield f"flip-{number}.{name}", bytes(data), None
    odd: dict[str, list[Any]] = {
        "no-rows": [],
        "ints": [1, 2],
        "nulls": [None, None],
        "bytes": [b"\xff", b"\0"],
        "long": ["x" * (LIMIT + 5), "y"],
        "structs": [{"a": {"b": 1}}, None],
        "many": [[0] * 200_000],
    }
    for name, values in odd.items():
        column = pa.array(values) if values else pa.array([], pa.string())
        made = pa.table({"prompt": column, "chosen": column, "rejected": column})
        yield f"odd-{name}.parquet", parquet(made), len(values)
        yield f"odd-{name}.arrow", arrow(made, is_file=True), len(values)
    for depth in (20, 60):
        kind: Any = pa.int64()
        for _ in range(depth):
            kind = pa.list_(kind)
        made = pa.table({"prompt": pa.array([None], kind)})
        yield f"nested-{depth}.arrow", arrow(made, is_file=True), None
        yield f"nested-{depth}.parquet", parquet(made), None
    yield "no-columns.parquet", parquet(pa.table({})), None


def all_files(seed: int = 0) -> list[tuple[str, bytes, int | None]]:
    return [*text_files(), *packed_files(seed), *columnar_files(seed)]
