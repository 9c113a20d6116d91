import json

import pyarrow.fs as pafs
import pytest

from prefsel.errors import UserError
from prefsel.ingest.identity import file_digest
from prefsel.ingest.locations import list_files
from prefsel.ingest.readers import read_rows


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.parquet", "deep/er/c.json.gz", "deep/d1.jsonl", "deep/d2.jsonl", "deep/x1.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS.json", "state.json", ".cache/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def below(tree, found):
    return [name.removeprefix(f"{tree}/") for name in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.parquet", "b.jsonl", "deep/d1.jsonl", "deep/d2.jsonl", "deep/er/c.json.gz", "deep/x1.jsonl"]),
        ("/", ["a.parquet", "b.jsonl", "deep/d1.jsonl", "deep/d2.jsonl", "deep/er/c.json.gz", "deep/x1.jsonl"]),
        ("/b.jsonl", ["b.jsonl"]),
        ("/*.jsonl", ["b.jsonl"]),
        ("/**/*.jsonl", ["b.jsonl", "deep/d1.jsonl", "deep/d2.jsonl", "deep/x1.jsonl"]),
        ("/d*/*1.jsonl", ["deep/d1.jsonl", "deep/x1.jsonl"]),
        ("/deep/d?.jsonl", ["deep/d1.jsonl", "deep/d2.jsonl"]),
        ("/deep/[!d]*.jsonl", ["deep/x1.jsonl"]),
        ("/deep/[dx]1.jsonl", ["deep/d1.jsonl", "deep/x1.jsonl"]),
        ("/deep/**", ["deep/d1.jsonl", "deep/d2.jsonl", "deep/er/c.json.gz", "deep/x1.jsonl"]),
    ],
)
def test_folders_and_globs_expand_in_order(tree, pattern, expected):
    assert below(tree, list_files(f"{tree}{pattern}")) == expected


def test_relative_names_stay_relative(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert list_files("*.jsonl") == ["b.jsonl"]
    assert list_files("deep/d*.jsonl") == ["deep/d1.jsonl", "deep/d2.jsonl"]
    assert list_files("deep/er") == ["deep/er/c.json.gz"]


def test_uris_and_file_systems(tree):
    assert list_files(f"file://{tree}/deep/d*.jsonl") == [
        f"file://{tree}/deep/d1.jsonl",
        f"file://{tree}/deep/d2.jsonl",
    ]
    inside = pafs.SubTreeFileSystem(str(tree), pafs.LocalFileSystem())
    assert list_files("deep/d*.jsonl", filesystem=inside) == ["deep/d1.jsonl", "deep/d2.jsonl"]
    assert [row.value for row in read_rows("deep/d1.jsonl", max_row_bytes=99, filesystem=inside)] == [{}]
    assert list_files("datasets:org/name/train") == ["datasets:org/name/train"]


def test_a_name_with_wildcard_characters_that_exists_is_that_file(tree):
    (tree / "odd[1].jsonl").write_text("{}\n")
    assert below(tree, list_files(f"{tree}/odd[1].jsonl")) == ["odd[1].jsonl"]


@pytest.mark.parametrize("pattern", ["/nope.jsonl", "/*.arrow", "/nope/", "/.cache"])
def test_nothing_found_is_an_error_that_names_it(tree, pattern):
    (tree / ".cache/e.jsonl").unlink()
    with pytest.raises(UserError, match=r"nope|\*\.arrow|\.cache"):
        list_files(f"{tree}{pattern}")


def test_errors_do_not_show_secrets():
    with pytest.raises(UserError) as caught:
        list_files("zzz://KEY:SECRET@bucket/x.jsonl")
    assert "SECRET" not in str(caught.value)
    assert "bucket" in str(caught.value)


def test_an_object_store(monkeypatch):
    server_module = pytest.importorskip("moto.server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        query = f"?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true&region=us-east-1"
        store, _ = pafs.FileSystem.from_uri(f"s3://corpus{query}")
        store.create_dir("corpus")
        for name in ("in/a.jsonl", "in/b.jsonl", "out/c.jsonl"):
            with store.open_output_stream(f"corpus/{name}") as stream:
                stream.write(json.dumps({"name": name}).encode())
        expected = [f"s3://corpus/in/{name}.jsonl{query}" for name in "ab"]
        assert list_files(f"s3://corpus/in{query}") == expected
        assert list_files(f"s3://corpus/i*/*.jsonl{query}") == expected
        assert [row.value for row in read_rows(expected[1], max_row_bytes=99)] == [{"name": "in/b.jsonl"}]
        assert len({file_digest(uri) for uri in expected}) == 2
        with pytest.raises(UserError, match=r"gone\.jsonl"):
            read_rows(f"s3://corpus/in/gone.jsonl{query}", max_row_bytes=99)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("names", "choices"),
    [
        (["data/train_prefs-00000-of-00002.parquet", "data/train_prefs-00001-of-00002.parquet",
          "data/test_prefs-00000-of-00001.parquet"], ["data/test_prefs-00000-of-00001.parquet", "data/train_prefs*"]),
        (["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"],
         ["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"]),
        (["data/raw-00000-of-00001.parquet", "data/filtered-00000-of-00001.parquet"],
         ["data/filtered-00000-of-00001.parquet", "data/raw-00000-of-00001.parquet"]),
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], ["test", "train"]),
        (["train.jsonl", "valid.jsonl.gz"], ["train.jsonl", "valid.jsonl.gz"]),
        (["en/dev.csv", "en/train-1.csv", "en/train-2.csv"], ["en/dev.csv", "en/train*"]),
    ],
)  # fmt: skip
def test_a_folder_of_several_splits_is_refused_with_what_to_choose_from(tmp_path, names, choices):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=f"holds {len(choices)} splits") as caught:
        list_files(str(tmp_path))
    named = str(caught.value).split("name one: ")[1].split(", ")
    assert named == [f"{tmp_path}/{choice}" for choice in choices]
    assert sorted(below(tmp_path, [file for one in named for file in list_files(one)])) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
        ["train/a.jsonl", "train/b.jsonl"],
        ["math.jsonl", "trainings.jsonl", "evaluated.jsonl"],
        ["2024/data-00000-of-00002.arrow", "2025/data-00000-of-00001.arrow"],
    ],
)
def test_a_folder_of_parts_is_one_corpus(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert below(tmp_path, list_files(str(tmp_path))) == sorted(names)
