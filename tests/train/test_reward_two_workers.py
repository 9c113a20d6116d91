"""Two gloo processes train the reward model that one trains: ZeRO-2, ZeRO-3, and ZeRO-3 killed and resumed."""

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
from tiny_rewards import reward_table

from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_loop import train_reward_model

# 17 of 20 pairs are trained on in batches of 8: 8 + 8 + 1, so that in steps 3 and 6 one worker has no pair at all.
CONFIG: dict[str, Any] = {
    "learning_rate": 3e-3,
    "max_length": 64,
    "dtype": "fp32",
    "num_epochs": 2,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "token_budget": 96,
    "eval_every_steps": 3,
    "length_penalty_rho": 0.05,
    "holdout": 0.15,
}


@pytest.fixture(scope="module")
def job(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("tables") / "pairs.parquet"
    pq.write_table(reward_table(20), file)
    return {"table": str(file), "model_dir": str(tiny_run.model_dir)}


@pytest.fixture(scope="module")
def one_worker(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_reward_model(
        RewardConfig.model_validate({**CONFIG, "zero_stage": 0}),
        pq.read_table(job["table"]),
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
    worker = [str(Path(__file__).with_name("reward_worker.py")), str(folder / "jobs.json")]
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


def assert_same_run(got: dict[str, Any], want: dict[str, Any]) -> None:
    for got_record, want_record in zip(got["history"], want["history"], strict=True):
        assert got_record["event"] == want_record["event"]
        numbers = [
            {k: v for k, v in record.items() if isinstance(v, int | float)} for record in (got_record, want_record)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-5)
    weights = [load_file(Path(result["model_dir"]) / "model.safetensors") for result in (got, want)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=2e-4, msg=name)
    trained_on = [pq.read_table(Path(result["model_dir"]) / "trained_on.parquet") for result in (got, want)]
    assert trained_on[0].equals(trained_on[1])


@pytest.mark.slow
def test_two_workers_follow_one_and_survive_a_kill(
    job: dict[str, Any], one_worker: dict[str, Any], tmp_path: Path
) -> None:
    assert one_worker["num_pairs"] == 17
    stage_2 = {**job, "config": {**CONFIG, "zero_stage": 2}, "output_dir": str(tmp_path / "stage-2")}
    saving = {**CONFIG, "zero_stage": 3, "checkpoint_every_steps": 2, "gradient_checkpointing": True}
    stage_3 = {**job, "config": saving, "output_dir": str(tmp_path / "stage-3")}
    killed = {**stage_3, "output_dir": str(tmp_path / "killed"), "dies_in_step": 5}
    assert launch([stage_2, stage_3, killed], tmp_path) != 0
    for done in (stage_2, stage_3):
        first, second = results(done)
        assert_same_run(first, one_worker)
        assert second["history"] == first["history"]
        assert second["holdout_after"] == first["holdout_after"]
        assert first["flops_forward"] == one_worker["flops_forward"]

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
