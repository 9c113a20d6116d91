"""Runs of the real command that want one workspace at once: refused, waiting, and after one that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PREFSEL = [sys.executable, "-c", "from prefsel.cli import main; main()"]
TABLE = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "ingest": {"rows_per_shard": 10},
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
    rows = [{"prompt": f"name {n}", "chosen": f"red {n}", "rejected": "blue"} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TABLE))
    runs = [begin(tmp_path), begin(tmp_path)]
    (done, told, nothing), (refused, _, stderr) = sorted(end(run) for run in runs)
    assert (done, nothing, refused) == (0, "", 3), told
    assert stderr.startswith("prefsel: workspace: ")
    assert any(f"is being written by process {run.pid} of" in stderr for run in runs)
    assert stderr.count("\n") == 1

    waited = [end(run) for run in [begin(tmp_path, "--wait"), begin(tmp_path, "--wait")]]
    assert [(code, stderr) for code, _, stderr in waited] == [(0, ""), (0, "")], waited
    assert sorted(told.count("waiting for its end") for _, told, _ in waited) == [0, 1]
    assert "writer    none" in status(tmp_path)

    killed = begin(tmp_path)
    hear(killed, "starting Ray")
    killed.kill()
    killed.wait()
    shown = status(tmp_path)
    assert f"writer    process {killed.pid} of" in shown
    assert "it has ended without a word" in shown
    code, told, stderr = end(begin(tmp_path))
    assert (code, stderr) == (0, ""), told
    assert "watching" not in told
