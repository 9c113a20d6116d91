"""Versions of a dataset behind one pointer: published, gone back to, removed, killed in the middle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import datasets
import pyarrow.fs as pafs
import pytest
from finished_runs import run_again
from moto.server import ThreadedMotoServer

from prefsel.cli import app, guarded
from prefsel.errors import IntegrityError, UserError
from prefsel.publishing.publish import publish, read_lineage
from prefsel.publishing.versions import prune, read_pointer, rollback, versions
from prefsel.workspace.folders import check_folder
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify


def current(place: Path) -> str:
    return json.loads((place / "published/top/current.json").read_text())["version"]


def opened(place: Path, version: str) -> datasets.Dataset:
    found = datasets.load_dataset(str(place / "published/top" / version), cache_dir=str(place / "cache"))
    assert list(found) == ["train"]
    return found["train"]


def test_a_version_opens_as_a_dataset_and_says_where_it_came_from(place: Path, storage: Storage) -> None:
    made = publish(storage, "top", "top")
    assert (made.version, made.rows, made.is_new) == ("v0001", 12, True)
    rows = opened(place, "v0001")
    assert rows.num_rows == 12
    assert rows[0]["chosen"][0]["role"] == "assistant"
    assert check_folder(storage, "published/top/v0001", quick=False) == {}
    lineage = read_lineage(storage, "top", "v0001")
    assert (lineage["parent"], lineage["selection"], lineage["rows"]) == (None, "top", 12)
    assert lineage["dataset"]["path"] in {f"datasets/{name}" for name in storage.folders("datasets")}
    assert [one["stage"] for one in lineage["flow"]][:2] == ["ingest", "eligible"]
    card = storage.read("published/top/v0001/README.md").decode()
    assert card.startswith("---\nconfigs:")
    assert "`v0001` of `top`; the version before: none" in card


def test_the_same_again_is_no_new_version(storage: Storage) -> None:
    publish(storage, "top", "top")
    pointer = storage.read("published/top/current.json")
    assert publish(storage, "top", "top").is_new is False
    assert (versions(storage, "top"), storage.read("published/top/current.json")) == (["v0001"], pointer)


def test_versions_follow_each_other_and_can_be_gone_back_to(
    finished: tuple[Path, Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = ["-w", str(place)]
    assert guarded(app, ["publish", "top", *w]) == 0
    run_again(finished, place)
    assert guarded(app, ["publish", "top", *w]) == 0
    assert (current(place), opened(place, "v0002").num_rows) == ("v0002", 20)
    assert read_lineage(Storage(str(place)), "top", "v0002")["parent"] == "v0001"
    assert guarded(app, ["diff", "top/v0001", "top/current", *w, "--output", str(place / "ids.jsonl")]) == 0
    assert guarded(app, ["rollback", "top", *w]) == 0
    assert current(place) == "v0001"
    assert guarded(app, ["rollback", "top", *w]) == 2
    assert guarded(app, ["rollback", "top", *w, "--to", "v0003"]) == 2
    assert guarded(app, ["rollback", "top", *w, "--to", "v0002"]) == 0
    assert current(place) == "v0002"
    told = capsys.readouterr()
    assert "publish: top v0002 is current now: 20 pairs" in told.out
    assert "diff top/v0001 -> top/current: 8 entered, 0 left, 12 unchanged" in told.out
    assert "rollback: top v0001 is current; it was v0002" in told.out
    assert "v0001 is current, and no version before it is left" in told.err
    assert "--to: got 'v0003'; valid: v0001, v0002" in told.err
    (place / "config.yaml").write_text("name: of a run that did not finish")
    assert guarded(app, ["diff", "top/v0001", "top/v0002", *w]) == 0
    changed = [json.loads(line) for line in (place / "ids.jsonl").read_text().splitlines()]
    before, after = (set(opened(place, one)["pair_id"]) for one in ("v0001", "v0002"))
    assert {one["pair_id"] for one in changed} == after - before
    assert {one["change"] for one in changed} == {"entered"}


def test_what_cannot_be_published_is_told(storage: Storage, place: Path) -> None:
    with pytest.raises(UserError, match=r"selection: got 'nothing'; valid: top"):
        publish(storage, "nothing", "top")
    with pytest.raises(UserError, match=r"publish unwritten: .*set selections\.unwritten\.dataset to always"):
        publish(storage, "unwritten", "top")
    with pytest.raises(UserError, match=r"--model: got 'dpo'; valid: none"):
        publish(storage, "top", "top", "dpo")
    assert guarded(app, ["publish", "top", "-w", str(place), "--name", "../top"]) == 2
    assert not (place / "published").exists()


def test_damage_is_neither_published_nor_gone_back_to(
    finished: tuple[Path, Path], place: Path, storage: Storage
) -> None:
    publish(storage, "top", "top")
    run_again(finished, place)
    publish(storage, "top", "top")
    file = next((place / "published/top/v0001/data").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match=r"v0001/data/train-.*altered"):
        rollback(storage, "top")
    assert current(place) == "v0002"
    made = storage.local(read_lineage(storage, "top", "v0002")["dataset"]["path"]) / "README.md"
    made.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"README\.md: altered"):
        publish(storage, "top", "another")
    assert read_pointer(storage, "another") is None


@pytest.mark.parametrize("lost", ["data/train-00000-of-00001.parquet", "lineage.json", "_ledger/files.json", ""])
def test_what_is_damaged_is_published_anew(
    place: Path, storage: Storage, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    publish(storage, "top", "top")
    version = place / "published/top/v0001"
    if not lost:
        shutil.rmtree(version)
    elif lost.startswith("data"):
        (version / lost).unlink()
    else:
        (version / lost).write_text("{}")
    assert guarded(app, ["diff", "top", "top/v0001", "-w", str(place)]) in ((0,) if lost == "lineage.json" else (1, 2))
    told = capsys.readouterr().err
    assert ("publish once more" in told) == (lost.startswith(("data", "_ledger")))
    assert publish(storage, "top", "top").version == "v0002"
    assert guarded(app, ["diff", "top", "top/current", "-w", str(place)]) == 0
    assert "0 entered, 0 left, 12 unchanged" in capsys.readouterr().out


def test_a_pointer_of_another_hand_is_told(place: Path, storage: Storage) -> None:
    publish(storage, "top", "top")
    for text in ("v0001", '{"version": "v0001"}'):
        (place / "published/top/current.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"published/top/current\.json: not what `prefsel publish` writes"):
            publish(storage, "top", "top")
        assert [one.path for one in verify(storage, quick=True).findings] == ["published/top/current.json"]
    (place / "published/top/current.json").unlink()
    assert [one.problem for one in verify(storage, quick=True).findings] == ["missing"]
    assert publish(storage, "top", "top").version == "v0001"  # it is sealed, and pointed to again


def test_old_versions_are_removed_when_nobody_can_read_them(
    finished: tuple[Path, Path], place: Path, storage: Storage
) -> None:
    for number in range(1, 5):
        run_again(finished, place, number % 2)
        assert publish(storage, "top", "top").version == f"v{number:04}"
    assert prune(storage, "top", 1) == []  # all were current a moment ago
    rollback(storage, "top", "v0002")
    pointer = place / "published/top/current.json"
    long_ago = (datetime.now(UTC) - timedelta(hours=30)).isoformat(timespec="seconds")
    moves = json.loads(pointer.read_text())
    moves["moves"] = [move | {"at": long_ago} if n < 4 else move for n, move in enumerate(moves["moves"])]
    pointer.write_text(json.dumps(moves))
    assert prune(storage, "top", 1) == ["v0001", "v0003"]  # v0004 is the newest and was current until now
    assert versions(storage, "top") == ["v0002", "v0004"]
    assert prune(storage, "top", 1, grace_h=0) == []
    assert not (place / "published/top/v0001").exists()


def test_selections_without_a_dataset_are_compared_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(app, ["diff", "top", "unwritten", "-w", str(place)]) == 0
    assert "diff top -> unwritten: 0 entered, 8 left, 4 unchanged" in capsys.readouterr().out
    assert guarded(app, ["diff", "top", "top/v0001", "-w", str(place)]) == 2
    assert "top/v0001: got 'v0001'; valid: none: 'top' is not published" in capsys.readouterr().err


def test_an_object_store_holds_what_a_directory_holds(place: Path, storage: Storage) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        pafs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
        uri = f"s3://key:secret@bucket/w?{options}"
        for name in storage.files("", recursive=True):
            Storage(uri).write(name.lstrip("/"), storage.read(name.lstrip("/")))
        assert guarded(app, ["publish", "top", "-w", uri]) == 0
        publish(storage, "top", "top")
        names = storage.files("published/top/v0001", recursive=True)
        assert Storage(uri).files("published/top/v0001", recursive=True) == names
        assert [Storage(uri).read(name) for name in names] == [storage.read(name) for name in names]
        assert Storage(uri).exists("published/top/current.json")
    finally:
        server.stop()


KILLED = """
import os, signal, sys
from prefsel.publishing.publish import publish
from prefsel.workspace import lease, swap
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

left = int(sys.argv[2])

def counted(write):
    def call(storage, path, *rest):
        global left
        if path != "lease.json":
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return write(storage, path, *rest)
    return call

Storage.write = counted(Storage.write)
swap.swap = counted(swap.swap)
with lease.hold(Storage(sys.argv[1])) as held:
    publish(held, "top", "top")
"""


@pytest.mark.fault
def test_a_publishing_killed_before_any_of_its_writes_harms_nothing(
    finished: tuple[Path, Path], place: Path, storage: Storage
) -> None:
    publish(storage, "top", "top")
    run_again(finished, place)
    for writes in range(10):
        process = subprocess.run([sys.executable, "-c", KILLED, str(place), str(writes)], check=False)
        if process.returncode == 0:
            break
        assert process.returncode == -9
        assert (current(place), check_folder(storage, "published/top/v0001", quick=False)) == ("v0001", {})
        if writes == 2:
            assert opened(place, "v0001").num_rows == 12
    assert writes == 5  # card, data, lineage, seal, pointer; the last try only had to move the pointer
    assert (current(place), versions(storage, "top")) == ("v0002", ["v0001", "v0002"])
    assert opened(place, "v0002").num_rows == 20
