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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import TinyRun
from tiny_rewards import reward_table
from tiny_runs import Case, assert_same_history, assert_same_weights, fresh_environment, policy_case, reward_case

from prefsel.train.checkpoint import latest_checkpoint

# 17 pairs are trained on in batches of 8: 8 + 8 + 1, so that in steps 3 and 6 the second worker has no pair at all.
COMMON = {"eval_every_steps": 3, "warmup_ratio": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "policy": {**COMMON, "keep_optimizer_state": True},
    "rewards": {**COMMON, "holdout": 0.15},
}


def case_of(objective: str, tiny_run: TinyRun) -> Case:
    if objective == "policy":
        return policy_case(tiny_run.model_dir, tiny_run.train.slice(0, 17), tiny_run.held_out.slice(0, 5))
    return reward_case(tiny_run.model_dir, reward_table(20))  # a causal model: the head is fresh


def launch(jobs: list[dict[str, Any]], folder: Path) -> int:
    for job in jobs:
        Path(job["output_dir"]).mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("train_worker.py")), str(folder / "jobs.json")]
    with (folder / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [*launcher, *worker],
            env=fresh_environment(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
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
    assert_same_history(got["history"], want["history"])
    assert_same_weights(got, want, atol=2e-4)
    assert got["flops_forward"] == want["flops_forward"]
    assert got["flops_train"] == want["flops_train"] * (4 / 3 if is_checkpointed else 1)
    trained_on = [Path(result["model_dir"]) / "trained_on.parquet" for result in (got, want)]
    if trained_on[1].exists():
        assert pq.read_table(trained_on[0]).equals(pq.read_table(trained_on[1]))
    for moment in ("exp_avg", "exp_avg_sq") if want.get("optimizer_dir") else ():
        states = [load_file(Path(result["optimizer_dir"]) / f"{moment}.safetensors") for result in (got, want)]
        assert states[0].keys() == states[1].keys()
        for name, state in states[1].items():
            atol = 2e-3 * state.abs().max().item()
            torch.testing.assert_close(states[0][name], state, rtol=0, atol=atol, msg=f"{moment} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["policy", "rewards"])
def test_two_workers_follow_one_and_survive_a_kill(tiny_run: TinyRun, tmp_path: Path, objective: str) -> None:
    case, options = case_of(objective, tiny_run), OPTIONS[objective]
    one_worker = case.run(tmp_path / "one", **options)
    assert one_worker["num_pairs"] == 17
    job = {"objective": objective, "model_dir": str(case.model_dir), "table": str(tmp_path / "table.parquet")}
    job |= {"held_out": "" if case.held_out is None else str(tmp_path / "held_out.parquet"), "own_folders": False}
    pq.write_table(case.table, job["table"])
    if case.held_out is not None:
        pq.write_table(case.held_out, job["held_out"])

    stage_2 = {**job, "config": {**options, "zero_stage": 2}, "output_dir": str(tmp_path / "stage-2")}
    # As under Ray Train: every worker has a folder of its own, and what is resumed from is their union.
    # Small chunks of the head: the workers have different numbers of them, and each gathers weights from both.
    stage_3 = {
        **job,
        "config": {**options, "zero_stage": 3, "checkpoint_every_steps": 2, "gradient_checkpointing": True},
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
    assert_same_weights(results(resumed)[0], results(stage_3)[0])


@pytest.mark.slow
def test_two_workers_weigh_pairs_as_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Both ways round, under ZeRO-2; in the last batch the second worker has no pair, and so no weight."""
    case = case_of("policy", tiny_run)
    weight_N = np.random.default_rng(1).random(17)
    weight_N[3] = 0.0
    table = case.table.append_column("weight", pa.array(weight_N))
    options = {**COMMON, "weight": "w", "weighting": "label"}
    one_worker = case.run(tmp_path / "one", table=table, **options)
    job = {"objective": "policy", "model_dir": str(case.model_dir), "table": str(tmp_path / "table.parquet")}
    job |= {"held_out": str(tmp_path / "held_out.parquet"), "own_folders": False, "output_dir": str(tmp_path / "two")}
    pq.write_table(table, job["table"])
    pq.write_table(case.held_out, job["held_out"])
    assert launch([{**job, "config": {**options, "zero_stage": 2}}], tmp_path) == 0
    for result in results({"output_dir": job["output_dir"]}):
        assert_same_run(result, one_worker)
