"""One worker of a multi-process test: runs the jobs of a JSON file one after the other; start with torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_loop import train_reward_model


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:

        def report(record: dict[str, Any], checkpoint_dir: Path | None, job: dict[str, Any] = job) -> None:
            if record["event"] == "step" and record["step"] == job.get("dies_in_step"):
                os._exit(9)

        rank = os.environ["RANK"]
        result = train_reward_model(
            RewardConfig.model_validate(job["config"]),
            pq.read_table(job["table"]),
            model_dir=job["model_dir"],
            output_dir=Path(job["output_dir"]) / f"worker-{rank}",
            report=report,
            resume_dir=Path(job["resume_dir"]) if job.get("resume_dir") else None,
        )
        Path(job["output_dir"], f"result-{rank}.json").write_text(json.dumps(result))
    # Leave together: a worker that is still in gloo when another has gone may be aborted.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
