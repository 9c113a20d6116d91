"""Two gloo processes give the trajectory of one: ZeRO-2, ZeRO-3, and ZeRO-3 killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import TinyRun

from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.data import TrainingPairs
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.loop import train_dpo

# 17 pairs in batches of 8: 8 + 8 + 1, so that in steps 3 and 6 the second worker has no pair at all.
CONFIG: dict[str, Any] = {
    "policy_is_reference": True,
    "learning_rate": 3e-3,
    "max_length": 128,
    "dtype": "fp32",
    "beta": 0.5,
    "num_epochs": 2,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "token_budget": 128,
    "eval_every_steps": 3,
    "keep_optimizer_state": True,
}


@pytest.fixture(scope="module")
def job(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tables")
    pq.write_table(tiny_run.train.slice(0, 17), folder / "train.parquet")
    pq.write_table(tiny_run.held_out.slice(0, 5), folder / "held_out.parquet")
    return {
        "train": str(folder / "train.parquet"),
        "held_out": str(folder / "held_out.parquet"),
        "model_dir": str(tiny_run.model_dir),
        "own_folders": False,
    }


@pytest.fixture(scope="module")
def one_worker(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_dpo(
        DpoConfig.model_validate({**CONFIG, "zero_stage": 0}),
        TrainingPairs.from_parquet(job["train"]),
        TrainingPairs.from_parquet(job["held_out"]),
        model_dir=job["model_dir"],
        output_dir=tmp_path_factory.mktemp("one"),
        report=lambda record, checkpoint_dir: None,
        resume_dir=None,
    )


def launch(jobs: list[dict[str, Any]], folder: Path) -> int:
    for job in jobs:
        Path(job["output_dir"]).mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("dpo_worker.py")), str(folder / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    with (folder / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [*launcher, *worker], env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        try:
            code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # workers that wait for each other do not die with their launcher
            raise
    if code:
        print((folder / "stderr.txt").read_text()[-5000:])  # shown when the test fails
    return code


def results(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(Path(job["output_dir"], f"result-{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_run(got: dict[str, Any], want: dict[str, Any], *, is_checkpointed: bool = False) -> None:
    for got_record, want_record in zip(got["history"], want["history"], strict=True):
        assert got_record["event"] == want_record["event"]
        numbers = [
            {k: v for k, v in record.items() if isinstance(v, int | float)} for record in (got_record, want_record)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-5)
        assert ("margins" in got_record) == (got_record["event"] == "eval" and got_record["step"] in (0, 6))
        # Of every held-out pair, whichever worker saw it.
        assert got_record.get("margins", []) == pytest.approx(want_record.get("margins", []), rel=1e-4, abs=2e-5)
    weights = [load_file(Path(result["model_dir"]) / "model.safetensors") for result in (got, want)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=2e-4, msg=name)
    assert got["flops_train"] == want["flops_train"] * (4 / 3 if is_checkpointed else 1)
    for moment in ("exp_avg", "exp_avg_sq"):
        states = [load_file(Path(result["optimizer_dir"]) / f"{moment}.safetensors") for result in (got, want)]
        assert states[0].keys() == states[1].keys()
        for name, state in states[1].items():
            atol = 2e-3 * state.abs().max().item()
            torch.testing.assert_close(states[0][name], state, rtol=0, atol=atol, msg=f"{moment} {name}")


@pytest.mark.slow
def test_two_workers_follow_one_and_survive_a_kill(
    job: dict[str, Any], one_worker: dict[str, Any], tmp_path: Path
) -> None:
    stage_2 = {**job, "config": {**CONFIG, "zero_stage": 2}, "output_dir": str(tmp_path / "stage-2")}
    saving = {**CONFIG, "zero_stage": 3, "checkpoint_every_steps": 2, "gradient_checkpointing": True}
    # As under Ray Train: every worker has a folder of its own, and what is resumed from is their union.
    # Small chunks of the head: the workers have different numbers of them, and each gathers weights from both.
    stage_3 = {
        **job,
        "config": saving,
        "output_dir": str(tmp_path / "stage-3"),
        "own_folders": True,
        "logits_bytes": 3600,
    }
    killed = {**stage_3, "output_dir": str(tmp_path / "killed"), "dies_in_step": 5}
    assert launch([stage_2, stage_3, killed], tmp_path) != 0
    for result in results(stage_2):
        assert_same_run(result, one_worker)
    assert_same_run(results(stage_3)[0], one_worker, is_checkpointed=True)
    assert results(stage_3)[1]["history"] == results(stage_3)[0]["history"]

    for rank in (0, 1):
        shutil.copytree(tmp_path / "killed" / f"worker-{rank}", tmp_path / "union", dirs_exist_ok=True)
    checkpoint = latest_checkpoint(tmp_path / "union" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000004"
    resumed = {**stage_3, "output_dir": str(tmp_path / "resumed"), "resume_dir": str(checkpoint)}
    assert launch([resumed], tmp_path) == 0
    assert results(resumed)[0]["history"] == results(stage_3)[0]["history"]
    weights = [load_file(Path(results(job)[0]["model_dir"]) / "model.safetensors") for job in (resumed, stage_3)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
