"""Runs of the real command that want one workspace at once: refused, waiting, and after one that was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from prefsel.workspace.lease import hold
from prefsel.workspace.storage import Storage

PREFSEL = [sys.executable, "-c", "from prefsel.cli import main; main()"]
TABLE = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "ingest": {"rows_per_shard": 1000},
    "ray": {"num_cpus": 2, "object_store_gib": 0.25},
}


def begin(folder: Path, *more: str) -> subprocess.Popen:
    command = [*PREFSEL, "ingest", "c.yaml", "-w", "w", *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hear(process: subprocess.Popen, said: str) -> None:
    """Wait until a run says something."""
    heard = ""
    while said not in heard:
        line = process.stdout.readline()
        assert line, heard + process.stderr.read()
        heard += line


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output and errors of a run that is waited for."""
    told, stderr = process.communicate(timeout=120)
    return process.returncode, told, stderr


def status(folder: Path) -> str:
    command = [*PREFSEL, "status", "w"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.fault
def test_one_writes_and_others_are_refused_or_wait(tmp_path: Path) -> None:
    rows = [{"prompt": f"name {n}", "chosen": f"red {n}", "rejected": "blue"} for n in range(100_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TABLE))
    first = begin(tmp_path)
    while not (tmp_path / "w/lease.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    code, told, stderr = end(begin(tmp_path))
    assert (code, told) == (3, ""), stderr
    assert first.poll() is None
    assert stderr.startswith("prefsel: workspace: ")
    assert f"is being written by process {first.pid} of" in stderr
    assert stderr.count("\n") == 1
    first.kill()
    first.wait()
    shown = status(tmp_path)
    assert f"writer    process {first.pid} of" in shown
    assert "it has ended without a word" in shown

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    with hold(Storage(str(tmp_path / "w"))) as held:  # at once
        assert held.epoch == 2
        waiting = begin(tmp_path, "--wait")
        hear(waiting, f"held by process {os.getpid()} of")
    code, told, stderr = end(waiting)
    assert (code, stderr) == (0, ""), told
    assert "40 rows in, 40 out" in told
    assert "writer    none" in status(tmp_path)
