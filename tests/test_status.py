"""`prefsel status`, on a workspace that is made step by step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from prefsel.cli import app, guarded
from prefsel.errors import UserError
from prefsel.status import lines, size_text, status
from prefsel.workspace.catalog import Catalog, FileRecord, SourceRecord, write_catalog
from prefsel.workspace.folders import seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

CONFIG: dict[str, Any] = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "scorers": [{"kind": "imported", "name": "gold"}],
    "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
    "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
}
SHARDS = ["s0", "s1", "s2"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Three shards ingested; the column is there for two of them, one of which was made from other groups."""
    made = Storage(str(tmp_path / "w"))
    made.write("config.yaml", yaml.safe_dump(CONFIG).encode())
    for kind in ("groups", "pairs"):
        for number, shard in enumerate(SHARDS):
            table = pa.table({"number": list(range(10 * (number + 1)))})
            Artifact(made, f"{kind}/a").commit(shard, table, made_from="x", attempt=f"{number}")
    file = FileRecord("a.jsonl", "c", SHARDS, {"pairs": 60}, {})
    write_catalog(made, Catalog([SourceRecord("a", "train", [file])]))
    groups = Artifact(made, "groups/a").entries()
    column = Artifact(made, "columns/gold@1111111111111111/a")
    for shard, made_from in (("s0", groups["s0"].content), ("s1", "other groups")):
        attempt = column.log_attempt(shard)
        column.commit(shard, pa.table({"number": [1.0]}), made_from=made_from, attempt=attempt)
    return made


def by_path(storage: Storage) -> dict[str, Any]:
    return {one.path: one for one in status(storage).artifacts}


def test_what_is_there_and_what_is_missing(storage: Storage) -> None:
    found = status(storage)
    artifacts = by_path(storage)
    assert list(artifacts) == ["groups/a", "pairs/a", "columns/gold@1111111111111111"]
    groups, column = artifacts["groups/a"], artifacts["columns/gold@1111111111111111"]
    sizes = [entry.bytes for entry in Artifact(storage, "groups/a").entries().values()]
    assert (groups.shards, groups.of, groups.rows, groups.bytes) == (3, 3, 60, sum(sizes))
    assert (column.shards, column.of, column.rows) == (1, 3, 1)
    assert found.missing == ["eligible all", "columns gold", "scores margin", "selections top", "datasets top"]
    assert (found.name, found.reports) == ("t", [])


def test_what_was_begun_lately_is_running(storage: Storage) -> None:
    artifact = Artifact(storage, "columns/gold@1111111111111111/a")
    assert by_path(storage)["columns/gold@1111111111111111"].running == 0  # both attempts were committed
    artifact.log_attempt("s2")
    artifact.log_attempt("s2")  # twice the same shard is one
    running = by_path(storage)["columns/gold@1111111111111111"]
    assert running.running == 1
    assert 0 <= running.begun_s < 60
    for path in storage.local("columns").rglob("attempts/s2.*"):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    old = by_path(storage)["columns/gold@1111111111111111"]
    assert (old.running, old.begun_s) == (0, None)


def test_folders_and_older_artifacts(storage: Storage) -> None:
    seal_files(storage, "models/dpo@2222222222222222", {"model.safetensors": b"1234"}, {"num_pairs": 7})
    storage.write("models/dpo@3333333333333333/training/checkpoint", b"12")
    old = time.time() - 100
    for path in storage.local("models/dpo@2222222222222222").rglob("*"):
        os.utime(path, (old, old))
    artifacts = by_path(storage)
    sealed, unfinished = artifacts["models/dpo@2222222222222222"], artifacts["models/dpo@3333333333333333"]
    assert (sealed.is_complete, sealed.rows, sealed.bytes, sealed.is_newest) == (True, 7, 4, False)
    assert (unfinished.is_complete, unfinished.bytes, unfinished.running, unfinished.is_newest) == (False, 2, 1, True)
    told = "\n".join(lines(status(storage)))
    assert "models/dpo@3333333333333333, last written" in told
    assert "older: of another configuration or corpus" in told


def test_as_people_and_as_programs_read_it(
    storage: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(storage.local("").parent))
    assert guarded(app, ["status", "~/w"]) == 0
    told = capsys.readouterr().out
    assert f"workspace {storage.uri}, configuration 't'" in told
    assert "groups/a" in told
    assert "1/3 shards" in told
    assert "missing   eligible all, columns gold" in told
    assert guarded(app, ["status", storage.uri, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["artifacts"][0]["path"] == "groups/a"
    assert record["artifacts"][0]["is_complete"] is True
    assert record["missing"][0] == "eligible all"


def test_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a workspace: no config\.yaml, no catalog\.json"):
        status(Storage(str(tmp_path)))


def test_sizes() -> None:
    assert [size_text(size) for size in (0, 1023, 1024, 3 * 2**30, 5000 * 2**30)] == [
        *("0 B", "1,023 B", "1.0 KiB", "3.0 GiB", "5,000.0 GiB")
    ]


@pytest.mark.parametrize("text", [b"a: [", b"5", b"name: 7"])
def test_a_configuration_that_is_none_is_one_message(storage: Storage, text: bytes) -> None:
    storage.write("config.yaml", text)
    with pytest.raises(UserError):
        status(storage)
