"""One worker of a multi-process test: runs the jobs of a JSON file one after the other; start with torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_runs import bradley_terry, preference

from prefsel.models import head
from prefsel.train.data import TrainingPairs
from prefsel.train.loop import train


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:

        def report(record: dict[str, Any], checkpoint_dir: Path | None, job: dict[str, Any] = job) -> None:
            if record["event"] == "step" and record["step"] == job.get("dies_in_step"):
                os._exit(9)

        if "logits_bytes" in job:
            head.LOGITS_BYTES = job["logits_bytes"]
        rank = os.environ["RANK"]
        objective = {"policy": preference, "rewards": bradley_terry}[job["objective"]](**job["config"])
        result = train(
            objective,
            TrainingPairs.from_parquet(job["table"]),
            TrainingPairs.from_parquet(job["held_out"]) if job["held_out"] else None,
            model_dir=job["model_dir"],
            output_dir=Path(job["output_dir"]) / (f"worker-{rank}" if job["own_folders"] else ""),
            report=report,
            resume_dir=Path(job["resume_dir"]) if job.get("resume_dir") else None,
        )
        Path(job["output_dir"], f"result-{rank}.json").write_text(json.dumps(result))
    # Leave together: a worker that is still in gloo when another has gone may be aborted (seen once: exit code -6).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
