"""A disk that is full, refuses, or fails: one message, what is committed is kept, nothing unfinished is left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefsel.errors import DamagedError, known_error
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

LIMITED = """
import json, resource, sys
import pyarrow as pa
from prefsel.errors import known_error
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
folder, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
artifact = Artifact(Storage(folder), "scores/a/first")
told = []
for number, rows in enumerate((10, 50_000, 20)):
    shard = f"s{number}"
    try:
        if not artifact.is_done(shard, "i"):
            table = pa.table({"score": pa.array([float(row) for row in range(rows)])})
            artifact.commit(shard, table, made_from="i", attempt=artifact.log_attempt(shard))
    except OSError as error:
        told.append(str(known_error(error)))
print(json.dumps(told))
"""


def run_with(folder: Path, limit: int) -> list[str]:
    """Commit three shards where no file may be longer than `limit` bytes; returns the messages."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(folder), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def left_over(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.name.startswith(".tmp-")]


def test_a_limit_of_the_disk_ends_one_shard_and_the_next_run_continues(tmp_path: Path) -> None:
    (message,) = run_with(tmp_path, 100_000)
    assert message == (
        f"{tmp_path}/scores/a/first/s1.parquet: File too large; "
        "what is committed is kept, so run again once that is mended"
    )
    artifact = Artifact(Storage(str(tmp_path)), "scores/a/first")
    assert left_over(tmp_path) == []
    assert set(artifact.entries()) == {"s0", "s2"}
    assert run_with(tmp_path, 10_000_000) == []
    assert left_over(tmp_path) == []
    assert {shard: artifact.read(shard).num_rows for shard in artifact.entries()} == {"s0": 10, "s1": 50_000, "s2": 20}
    assert artifact.attempts() == {"s0": 1, "s1": 2, "s2": 1}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_no_unfinished_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Whichever call the disk refuses: a full one often says so only when it is waited for."""
    storage = Storage(str(tmp_path))
    storage.write("a/one", b"before")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write("a/one", b"after")
    assert str(known_error(caught.value)).startswith(f"{tmp_path}/a/one: No space left on device; what is committed")
    assert left_over(tmp_path) == []
    assert storage.read("a/one") == b"before"


def test_a_disk_that_fails_to_read_names_the_file(tmp_path: Path) -> None:
    """Reading the memory of a process at 0 is the one input error that every machine gives."""
    storage = Storage(str(tmp_path))
    (tmp_path / "catalog.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught, storage.opened("catalog.json") as file:
        file.read(10)
    message = str(known_error(caught.value))
    assert message.startswith(f"{tmp_path}/catalog.json: Input/output error; what is committed is kept")
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"^folder: altered .a file lies in the place of a folder.;"):
        storage.files("folder")
