"""A whole run, killed again and again at any moment: nothing is lost, doubled, or computed again once it is committed.

`PREFSEL_KILLS` says how many kills; CI makes two, `make chaos` fifty.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from prefsel.workspace.entries import checked_entries
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import verify

PREFSEL = [sys.executable, "-c", "from prefsel.cli import main; main()"]
KILLS = int(os.environ.get("PREFSEL_KILLS", "2"))
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 8, "batch_tokens": 512, "max_length": 64}
TABLE: dict[str, Any] = {
    "name": "killed",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "ingest": {"rows_per_shard": 20},
    "split": {"holdout": 0.1, "proxy": 0.2},
    "models": [{"kind": "scratch_policy", "name": "policy", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE}],
    "scorers": [{"kind": "causal_logps", "model": "policy"}, {"kind": "imported", "name": "q", "field": "q"}],
    "metrics": [
        {"name": "margin", "metric": "implicit_margin", "params": {"policy": "policy"}},
        {"name": "q", "metric": "explicit_margin", "params": {"rm": "q"}},
    ],
    "selections": [
        {"name": "half", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}},
        {"name": "good", "rule": {"kind": "top", "score": "score_q", "ratio": 0.2}, "controls": ["random"]},
    ],
    "train": [
        {
            **{"name": "dpo", "selection": "half", "model": "policy", "reference": "policy"},
            **{"learning_rate": 1e-3, "dtype": "fp32", "zero_stage": 0, "max_steps": 4, "global_batch_pairs": 6},
            "checkpoint_every_steps": 1,
        }
    ],
    "ray": {"num_cpus": 2, "object_store_gib": 0.25},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("killed")
    rows = [
        {
            "prompt": f"name {n}",
            "chosen": f"a long red word {n}",
            "rejected": "blue",
            "q_chosen": n % 17,
            "q_rejected": 3,
        }
        for n in range(840)
    ]
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "c.yaml").write_text(yaml.safe_dump(TABLE))
    return made


def run(home: Path, workspace: str) -> subprocess.Popen[str]:
    command = [*PREFSEL, "run", "c.yaml", "--workspace", workspace]
    return subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, str]:
    """The hash of every file that a run ends with, but for those that hold times."""
    found = [*folder.rglob("*.parquet"), *folder.glob("models/*/*.safetensors"), *folder.glob("datasets/*/README.md")]
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in found}


def committed(folder: Path) -> dict[tuple[str, str], str]:
    """The attempt that committed each shard."""
    storage = Storage(str(folder))
    paths = {str(ledger.parent.relative_to(folder)) for ledger in folder.rglob("_ledger")}
    entries = {path: checked_entries(storage, path)[0] for path in sorted(paths)}
    return {(path, shard): entry.attempt for path, found in entries.items() for shard, entry in found.items()}


def end_of(process: subprocess.Popen[str]) -> str:
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    return stderr


@pytest.mark.slow
@pytest.mark.fault
def test_a_run_killed_at_any_moment_ends_with_the_bytes_of_one_that_was_not(home: Path) -> None:
    began = time.monotonic()
    end_of(run(home, "whole"))
    seconds = time.monotonic() - began
    rng, known = random.Random(11), dict[tuple[str, str], str]()
    left: list[psutil.Process] = []
    kills = finished = 0
    while kills < KILLS:
        process = run(home, f"w{finished}")
        try:
            process.wait(rng.uniform(2.0, min(30.0, 1.1 * seconds)))
        except subprocess.TimeoutExpired:
            left += psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.communicate()
            kills += 1
            now = committed(home / f"w{finished}")
            assert {key: now[key] for key in known} == known, "a committed shard was computed again"
            known = now
            continue
        end_of(process)  # ended before the kill: that one is compared, and another is begun
        _compare(home, f"w{finished}")
        finished, known = finished + 1, {}
    end_of(run(home, f"w{finished}"))
    now = committed(home / f"w{finished}")
    assert {key: now[key] for key in known} == known, "a committed shard was computed again"
    _compare(home, f"w{finished}")
    deadline = time.monotonic() + 60
    while (alive := [one for one in left if one.is_running()]) and time.monotonic() < deadline:
        time.sleep(1)
    assert not alive
    for name in ("whole", f"w{finished}"):
        command = [*PREFSEL, "export", name, "--output", f"{name}.parquet"]
        subprocess.run(command, cwd=home, check=True, capture_output=True)
    assert (home / "whole.parquet").read_bytes() == (home / f"w{finished}.parquet").read_bytes()
    print(
        f"{kills} kills, {finished + 1} finished runs, {len(now)} shards, {seconds:.0f} s for one that was not killed"
    )


def _compare(home: Path, name: str) -> None:
    assert files(home / name) == files(home / "whole")
    assert verify(Storage(str(home / name))).findings == []
    assert not list((home / name).rglob(".tmp-*"))
