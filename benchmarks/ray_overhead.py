"""A scoring job of minutes on Ray Data: how busy it keeps its models, and what two plain processes need for the same.

    python benchmarks/ray_overhead.py [--seconds 180] [--shard-groups 96] [--write]

Both sides score the same shards with the product's own functions on two logical CPUs, one torch thread each: two
actors through `stages.score`, and two processes without Ray that read, score and commit one shard after the other.
Efficiency is model seconds over wall seconds of an actor, in steady state: from when its first shard left the models to
when its last one entered them. Model seconds are wall seconds, which the threads of an actor share with each other, so
the second number, Ray's wall over the plain one's, is what a user pays.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import psutil
from resume_cost import SOURCE, contents, prepare

from prefsel.config.file import load_config
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

ACTORS = 2


def plan_of(folder: Path, workspace: Path) -> Plan:
    """The job's configuration in a workspace that holds its corpus."""
    return make_plan(load_config(folder / "config.yaml"), Storage(str(workspace)))


def plain(folder: Path, workspace: Path, part: int, parts: int) -> dict[str, float]:
    """Score every `parts`-th shard in this process, with what an actor loads and commits, but without Ray."""
    import torch

    from prefsel.score.kinds import load
    from prefsel.score.shards import commit_scored
    from prefsel.stages.score import scoring_job

    torch.set_num_threads(1)
    plan = plan_of(folder, workspace)
    storage, node = plan.storage, plan.node("columns", plan.scorers[0].label)
    artifact = Artifact(storage, f"{node.path}/{SOURCE}")
    groups_of, entries = Artifact(storage, f"groups/{SOURCE}"), plan.catalog.entries(storage, "groups")
    loaded = load([scoring_job(plan, node)], storage)
    began, model_s = time.time(), 0.0
    for shard in plan.catalog.shards[part::parts]:
        attempt = artifact.log_attempt(shard.shard)
        groups = groups_of.read(shard.shard)
        (scored,) = loaded.begin(shard, groups)()
        model_s += scored.counters["seconds_model"]
        commit_scored(artifact, shard, groups, scored, made_from=entries[shard.key].content, attempt=attempt)
    return {"began": began, "ended": time.time(), "model_s": model_s}


def plain_run(folder: Path, workspace: Path) -> dict[str, float]:
    """All shards by plain processes at the same time: wall seconds after loading, model seconds."""
    parts = [
        subprocess.Popen(
            [sys.executable, __file__, "--plain", str(folder), str(workspace), str(part)], stdout=subprocess.PIPE
        )
        for part in range(ACTORS)
    ]
    found = [json.loads(part.communicate()[0].splitlines()[-1]) for part in parts]
    wall = max(one["ended"] for one in found) - min(one["began"] for one in found)
    model_s = sum(one["model_s"] for one in found)
    return {"wall_s": wall, "model_s": model_s, "busy": model_s / (ACTORS * wall)}


def ray_run(folder: Path, workspace: Path) -> tuple[StageReport, dict[str, float]]:
    """All shards by the stage: its report, and what stands beside it."""
    from prefsel.stages.score import score
    from prefsel.stages.session import connect

    plan = plan_of(folder, workspace)
    connect(plan.config.ray, quiet=True)
    before, began = cpu_seconds(), time.time()
    nodes = [plan.node("columns", scorer.label) for scorer in plan.scorers]
    (report,) = score(plan, nodes, Progress(quiet=True))
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in cpu_seconds().items()}
    artifact = Artifact(plan.storage, f"{report.artifact}/{SOURCE}")
    spans = [entry.info["span"] for entry in artifact.entries().values()]
    first, last = min(span["entered"] for span in spans), max(span["left"] for span in spans)
    # Returned are names of shards; what is asked back goes the same way.
    names = sum(len(shard.source) + len(shard.shard) for shard in plan.catalog.shards)
    again = sum(count != 1 for count in artifact.attempts().values())
    beside = {"start_s": first - began, "wall_s": last - first, "returned_bytes": names, "again": again}
    return report, beside | {"ray_cpu_s": sum(spent.values())}


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of Ray's own processes and of this driver, by pid; its workers apart."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name, times = process.name(), process.cpu_times()
        except psutil.Error:
            continue
        if not name.startswith("ray::"):
            found[str(process.pid)] = times.user + times.system
    return found


def shards_for(seconds: float, args: Any) -> int:
    """How many shards keep two processes at work for so long, by one shard that this process scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known, args.shards = args.shards, 2 * ACTORS
        prepare(folder, args)
        args.shards = known
        each = plain_run(folder, folder / "ingested")["wall_s"] / 2
    return max(8, math.ceil(ACTORS * seconds / each))


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        folder, workspace, part = sys.argv[2:]
        print(json.dumps(plain(Path(folder), Path(workspace), int(part), ACTORS)))
        return
    sizes = {"hidden_size": 512, "layers": 6, "vocab_size": 1024}
    args = harness.arguments(__doc__, seconds=180.0, shards=0, shard_groups=96, threads=1, **sizes)
    if args.quick:
        args.shards, args.shard_groups, args.hidden_size, args.layers = 8, 4, 64, 1
    args.shards = args.shards or shards_for(args.seconds, args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args)
        for side in ("plain", "ray"):
            shutil.copytree(folder / "ingested", folder / side)
        report, beside = ray_run(folder, folder / "ray")
        alone = plain_run(folder, folder / "plain")
        expected = contents(folder / "plain")
        if len(expected) != args.shards or contents(folder / "ray") != expected:
            raise SystemExit("the columns of the Ray job are not those of the plain processes")
    counters, pool = report.details["counters"], report.details["pool"]
    groups = args.shards * args.shard_groups
    if beside["again"] or counters["groups_read"] != groups or counters["groups_tokenised"] != groups:
        raise SystemExit(f"not everything was done once: {beside['again']} shards again, {counters}")
    if args.quick:
        print(f"{args.shards} shards, {groups} groups: read, tokenised and scored once, equal to plain processes")
        return
    row = {"shards": args.shards, "overall": pool["overall"], **beside, "plain_s": alone["wall_s"]}
    row |= {name: pool[name] for name in ("steady", "steady_s", "steady_shards") if name in pool}
    row |= {"over_plain": beside["wall_s"] / alone["wall_s"], "plain_busy": alone["busy"]}
    row["gap_ms"] = 1000 * (1 - pool["steady"]) * pool["steady_s"] / pool["steady_shards"]
    claims = [
        harness.claim(
            f"model seconds of two actors over wall, steady state of a job of {beside['wall_s']:.0f} s",
            100 * pool["steady"],
            "%",
            "≥ 97",
        ),
        harness.claim(
            "wall of the Ray job over two plain processes', start-up apart", row["over_plain"], "×", "≤ 1.03"
        ),
    ]
    harness.finish("ray_overhead", args, [row], list(row), claims, ("ray",), details=report.details)


if __name__ == "__main__":
    main()
