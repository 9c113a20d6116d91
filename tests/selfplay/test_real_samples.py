"""One round on samples of public data, killed while the policy answers and run again: the same bytes as without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

FILES = ("ultrafeedback_binarized_1k.jsonl.gz", "hh_rlhf_harmless_1156.jsonl.gz", "qa_feedback_250x4.jsonl.gz")
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "steps": 20, "batch_tokens": 2048, "max_length": 1024}
TOKENIZER = {"kind": "bpe", "vocab_size": 1024}

pytestmark = [pytest.mark.slow, pytest.mark.samples]


def configured(sample: Path) -> dict[str, Any]:
    arm = {
        "name": "own",
        "policy": "policy",
        "prompts": {"count": 24},
        "generation": {"samples": 3, "max_new_tokens": 32, "prompts_per_shard": 4, "pool": {"size": 1}},
        "judges": [{"kind": "reward_model", "model": "judge"}],
        "train": {"learning_rate": 1e-3, "dtype": "fp32", "global_batch_pairs": 4, "max_steps": 2},
    }
    return {
        "name": "real",
        "sources": [{"name": "sample", "paths": [str(sample)]}],
        "split": {"proxy": 0.5, "holdout": 0.1},
        "models": [
            {"kind": "scratch_policy", "name": "policy", "tokenizer": TOKENIZER, **SHAPE},
            {"kind": "scratch_reward", "name": "judge", "tokenizer": TOKENIZER, **SHAPE},
        ],
        "selfplay": [arm],
        "ray": {"num_cpus": 2, "object_store_gib": 0.25},
    }


def start(file: Path, home: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", "from prefsel.cli import main; main()", "run", str(file), "-w", str(home)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def answered(home: Path) -> dict[str, str]:
    """Shard → content, of the groups, pairs and quarantine that the round made."""
    storage = Storage(str(home))
    found = {}
    for kind in ("groups", "quarantine"):
        for source in storage.folders(kind):
            if "@" in source:
                entries = Artifact(storage, f"{kind}/{source}").entries()
                found |= {f"{kind}/{source}/{name}": entry.content for name, entry in entries.items()}
    for name in storage.folders("pairs"):
        for source in storage.folders(f"pairs/{name}"):
            if "@" in source:
                entries = Artifact(storage, f"pairs/{name}/{source}").entries()
                found |= {f"pairs/{name}/{source}/{shard}": entry.content for shard, entry in entries.items()}
    return found


@pytest.mark.parametrize("sample", FILES)
def test_a_killed_round_ends_as_one_that_was_not(sample: str, shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "real.yaml"
    file.write_text(yaml.safe_dump(configured(shared / "data/real" / sample)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(file, whole).wait(timeout=900) == 0
    process = start(file, killed)
    while process.poll() is None and len([name for name in answered(killed) if name.startswith("groups/")]) < 2:
        time.sleep(0.05)
    assert process.poll() is None, "the round was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len([name for name in answered(killed) if name.startswith("groups/")])
    assert done < 6
    assert start(file, killed).wait(timeout=900) == 0
    assert answered(killed) == answered(whole)
    assert verify(Storage(str(killed))).is_clean
    models = [sorted(one.name for one in (home / "models").glob("own-1@*")) for home in (whole, killed)]
    assert models[0] == models[1] != []
