"""Parquet, Arrow and `datasets:`: the same rows as the JSON lines they were made from, broken bytes in place."""

import datetime
import decimal
import io
import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from prefsel.errors import UserError
from prefsel.ingest import hub
from prefsel.ingest.columnar import read_arrow, read_parquet, rows_of
from prefsel.ingest.identity import file_digest
from prefsel.ingest.readers import OVERSIZE_KEPT_BYTES, BadRow, RawRow, read_rows

ROWS = [
    {
        "prompt": f"question {n}",
        "chosen": [{"role": "assistant", "content": "é" * n}],
        "score_chosen": n / 2,
        "note": None,
    }
    for n in range(60)
]
TABLE = pa.Table.from_pylist(ROWS, pa.Table.from_pylist(ROWS).schema.set(3, pa.field("note", pa.string())))


def write(path, kind):
    if kind == "parquet":
        pq.write_table(TABLE, path, row_group_size=20)
    elif kind == "feather":
        feather.write_feather(TABLE, str(path))
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(str(path), TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=20)
    return path


def read(path, max_row_bytes=1 << 20):
    return list(read_rows(str(path), max_row_bytes=max_row_bytes))


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "arrows"])
def test_columnar_files_give_their_rows(tmp_path, kind):
    rows = read(write(tmp_path / f"a.{kind}", kind))
    assert [row.value for row in rows] == ROWS
    assert [row.row for row in rows] == list(range(60))
    assert {row.byte_position for row in rows} == {None}
    assert [json.loads(row.raw) for row in rows] == ROWS
    # Canonical: sorted keys, no spaces, UTF-8.
    assert rows[1].raw.startswith('{"chosen":[{"content":"é","role"'.encode())


@pytest.mark.parametrize(("kind", "reason"), [("parquet", "truncated_parquet"), ("arrow", "truncated_arrow")])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_file_without_its_footer_is_one_bad_row(tmp_path, kind, reason, keep):
    path = write(tmp_path / f"a.{kind}", kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    (row,) = read(path)
    assert (row.reason, row.row) == (reason, 0)
    assert row.detail


def test_a_truncated_stream_gives_its_good_batches_first(tmp_path):
    path = write(tmp_path / "a.arrows", "arrows")
    path.write_bytes(path.read_bytes()[:-400])
    *good, last = read(path)
    assert [row.value for row in good] == ROWS[:40]
    assert (last.reason, last.row) == ("truncated_arrow", 40)


def test_a_corrupt_row_group_costs_only_itself(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=20, compression="zstd", use_dictionary=False, write_page_checksum=True)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 60] ^= 0xFF
    path.write_bytes(bytes(data))
    rows = read(path)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.reason, row.row) for row in bad] == [("truncated_parquet", 20)]
    assert "row group 1 of 3" in bad[0].detail
    assert [row.value for row in rows if isinstance(row, RawRow)] == ROWS[:20] + ROWS[40:]


def test_offsets_that_point_outside_are_found_before_they_are_followed(tmp_path):
    table = pa.table({"text": ["aaaa", "bbbb", "cccc"]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12))
    wrong = b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 4, -8, 12))
    data = sink.getvalue()
    assert data.count(offsets) == 1
    (row,) = read_arrow(io.BytesIO(data.replace(offsets, wrong)), max_row_bytes=99)
    assert row.reason == "truncated_arrow"


class Flaky(io.BytesIO):
    """A file whose connection is lost after `good` reads."""

    good = 2

    def read(self, size=-1):
        if self.good == 0:
            raise ConnectionResetError("connection lost")
        self.good -= 1
        return super().read(size)


@pytest.mark.parametrize(("kind", "reader"), [("parquet", read_parquet), ("arrow", read_arrow)])
@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_lost_connection_is_not_a_corrupt_file(tmp_path, kind, reader, good):
    file = Flaky(write(tmp_path / f"a.{kind}", kind).read_bytes())
    file.good = good
    with pytest.raises(ConnectionResetError):
        list(reader(file, max_row_bytes=1 << 20))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_text_that_is_not_utf8_costs_only_its_row(tmp_path, kind):
    nested = pa.array([[{"role": b"user", "content": text}] for text in (b"ok", b"\xff\xfe", b"fine")])
    wanted = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table({"chosen": nested.view(wanted), "n": [0, 1, 2]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    first, bad, last = read(path)
    assert (first.value["n"], last.value["n"]) == (0, 2)
    assert (bad.reason, bad.row) == ("undecodable", 1)
    kept = pa.ipc.open_stream(bad.raw).read_all()
    assert kept["n"].to_pylist() == [1]
    assert kept["chosen"].chunk(0).view(nested.type).to_pylist() == [[{"role": b"user", "content": b"\xff\xfe"}]]


def test_an_oversize_row_keeps_its_place(tmp_path):
    pq.write_table(pa.table({"t": ["a", "b" * 100_000, "c"]}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet", max_row_bytes=1000)
    assert (first.value, last.value) == ({"t": "a"}, {"t": "c"})
    assert (bad.reason, bad.row, len(bad.raw)) == ("row_too_large", 1, OVERSIZE_KEPT_BYTES)


def test_what_json_has_not_becomes_text():
    day, cost = datetime.date(2024, 5, 6), decimal.Decimal("1.50")
    batch = pa.RecordBatch.from_pylist([{"b": b"\x01\xff", "d": day, "e": cost, "f": float("nan")}])
    (row,) = rows_of(batch, 7, 1000)
    assert row.row == 7
    assert row.raw == b'{"b":"01ff","d":"2024-05-06","e":"1.50","f":NaN}'
    assert row.value["b"] == b"\x01\xff"


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset(pa.table(TABLE))
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select(range(5))).save_to_disk(tmp_path / "many")
    return tmp_path


def test_saved_data_sets(saved):
    assert [row.value for row in read(f"datasets:{saved}/one")] == ROWS
    assert [row.value for row in read(f"datasets:{saved}/many/train")] == ROWS
    assert [row.value for row in read(f"datasets:{saved}/many/test")] == ROWS[:5]
    with pytest.raises(UserError, match="many/train"):
        read(f"datasets:{saved}/many")
    digests = {file_digest(f"datasets:{saved}/{name}") for name in ("one", "many/train", "many/test")}
    assert len(digests) == 2  # the same rows saved twice are the same bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imdb/train", ("imdb", None, "train")),
        ("org/name/train", ("org/name", None, "train")),
        ("org/name:config/test_prefs", ("org/name", "config", "test_prefs")),
    ],
)
def test_hub_names(name, expected):
    assert hub.parse(f"datasets:{name}") == expected


@pytest.mark.parametrize("name", ["", "train", "/train", "org/name/", ":c/train"])
def test_names_of_another_form_are_refused(name):
    with pytest.raises(UserError, match="NAME"):
        hub.parse(f"datasets:{name}")


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = []
    load = datasets.load_dataset

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        if split == "nope":
            raise ValueError("Bad split: nope")
        return load("json", data_files=str(tmp_path / "a.jsonl"), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("prefsel.ingest.hub._revision", lambda source: "c0ffee")
    assert [row.value for row in read("datasets:org/name:small/train")] == ROWS
    assert asked == [("org/name", "small", "train", "c0ffee", True)]
    with pytest.raises(UserError, match="nope"):
        read("datasets:org/name/nope")
