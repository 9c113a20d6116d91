"""A scoring run killed at half and at 99 % of its shards, then started again: against a run that nothing stopped.

    python benchmarks/resume_cost.py [--shards 240] [--shard-groups 24] [--write]

Runs alternate: whole, killed, whole, killed, whole; each is held against the mean of the whole runs before and after
it, since one minute of a machine may differ from the next by more than a resume costs. Every run is the product's own
command, `prefsel score`, in a process of its own; a kill is SIGKILL to it. Time is counted from the first attempt a
run logs to the last shard it commits, as the ledger's files say: starting Python, Ray and the actors is apart, and
printed. Nothing that was committed may be begun again, and the columns must be those of the run that nothing stopped,
byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import yaml
from score_throughput import small_model

from prefsel.scratch.tokenizer import train_tokenizer
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

SHARES = (0.5, 0.99)
SOURCE, POLICY = "generated", "policy"
WORDS = 60
"""In a completion; half as many in the prompt."""


@dataclass(frozen=True)
class Run:
    """What one process did."""

    begun: float
    """When it logged its first attempt, seconds of the file system's clock."""
    ended: float
    """When it committed its last shard, or was killed."""
    start_s: float
    """From its start to its first attempt."""
    peak_mib: float
    """Of the process, without Ray's workers."""

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def prepare(folder: Path, args: Any) -> Path:
    """A corpus, a model with random weights and a workspace that holds the corpus; where the configuration is."""
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000)])
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(args.shards * args.shard_groups):
            word = vocabulary[rng.integers(0, len(vocabulary), WORDS // 2 + 2 * WORDS)]
            texts = (word[: WORDS // 2], word[WORDS // 2 : -WORDS], word[-WORDS:])
            row = {name: " ".join(text) for name, text in zip(("prompt", "chosen", "rejected"), texts, strict=True)}
            file.write(json.dumps(row) + "\n")
    tokenizer = train_tokenizer([" ".join(vocabulary)], kind="bpe", vocab_size=1024)
    small_model(tokenizer, args).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config = {
        "name": "resume",
        "sources": [{"name": SOURCE, "paths": [str(folder / "pairs.jsonl")]}],
        "ingest": {"rows_per_shard": args.shard_groups},
        "split": {"holdout": 0.0},
        "models": [{"kind": "pretrained", "name": POLICY, "path": str(folder / "policy"), "dtype": "fp32"}],
        "scorers": [{"kind": "causal_logps", "model": POLICY, "pool": {"size": 2}}],
        "ray": {"num_cpus": 2, "object_store_gib": 0.25},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    subprocess.run(command("ingest", folder, folder / "ingested"), check=True, stdout=subprocess.DEVNULL)
    return folder / "config.yaml"


def command(stage: str, folder: Path, workspace: Path) -> list[str]:
    """Of the product's command line."""
    line = "import sys; from prefsel.cli import main; sys.argv[0] = 'prefsel'; main()"
    return [sys.executable, "-c", line, stage, str(folder / "config.yaml"), "--workspace", str(workspace)]


def columns(workspace: Path) -> Artifact | None:
    """The columns that are being made; None before there are any."""
    found = sorted((workspace / "columns").glob(f"*@*/{SOURCE}")) if (workspace / "columns").is_dir() else []
    return Artifact(Storage(str(workspace)), str(found[0].relative_to(workspace))) if found else None


def committed(workspace: Path) -> int:
    """Shards with a ledger object of their own."""
    artifact = columns(workspace)
    return len(list((workspace / artifact.path / "_ledger").glob("*.json"))) if artifact else 0


def score(folder: Path, workspace: Path, *, kill_at: int | None = None) -> Run:
    """Score what is left; stop the process when so many shards are committed."""
    known = _attempts(workspace)
    started, peak = time.time(), 0.0
    process = subprocess.Popen(command("score", folder, workspace), stdout=subprocess.DEVNULL, start_new_session=True)
    killed = begun = 0.0
    while process.poll() is None:
        peak = max(peak, peak_mib(process.pid))
        # Logs of attempts are gone once the ledger is folded.
        if not begun and (new := [path for name, path in _attempts(workspace).items() if name not in known]):
            begun = min(path.stat().st_mtime for path in new)
        if kill_at is not None and committed(workspace) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            killed = time.time()
            process.wait()
            time.sleep(3.0)  # Ray's own processes notice that their driver is gone
        time.sleep(0.02)
    if not killed and process.returncode:
        raise SystemExit(f"prefsel score: exit {process.returncode}")
    artifact = columns(workspace)
    assert artifact is not None
    ledger = workspace / artifact.path / "_ledger"
    # The driver folds the ledger's objects into one at the end: data files tell when the last shard was there. Actors
    # that outlive their killed driver by a moment may commit what they have at hand, even the last of all shards.
    last = max(killed, *(path.stat().st_mtime for path in ledger.parent.glob("*.parquet")))
    begun = begun or last
    return Run(begun, last, max(0.0, begun - started), peak)


def _attempts(workspace: Path) -> dict[str, Path]:
    artifact = columns(workspace)
    if artifact is None:
        return {}
    # None while the folder is not made yet, or no more once the ledger is folded; a glob of what is not there is empty.
    return {path.name: path for path in (workspace / artifact.path / "_ledger" / "attempts").glob("*")}


def peak_mib(pid: int) -> float:
    """The most memory that a process had so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def contents(workspace: Path) -> dict[str, str]:
    """Hash of every committed shard."""
    artifact = columns(workspace)
    assert artifact is not None
    return {name: entry.content for name, entry in artifact.entries().items()}


def uninterrupted(folder: Path, args: Any) -> tuple[Run, dict[str, str]]:
    """A run that nothing stops, and what it commits."""
    workspace = folder / "whole"
    shutil.rmtree(workspace, ignore_errors=True)
    shutil.copytree(folder / "ingested", workspace)
    run, found = score(folder, workspace), contents(workspace)
    assert len(found) == args.shards, f"{len(found)} shards, not {args.shards}"
    return run, found


def interrupted(folder: Path, expected: dict[str, str], share: float, args: Any) -> dict[str, Any]:
    """Kill at a share of the shards, start again, compare; what it took."""
    workspace = folder / f"killed-{share}"
    shutil.copytree(folder / "ingested", workspace)
    first = score(folder, workspace, kill_at=round(share * args.shards))
    artifact = columns(workspace)
    assert artifact is not None
    done = set(artifact.entries())
    second = score(folder, workspace)
    attempts = artifact.attempts()
    if again := [name for name in done if attempts[name] != 1]:
        raise SystemExit(f"{len(again)} shards were computed again though they were committed, first: {again[:3]}")
    if contents(workspace) != expected:
        raise SystemExit("the columns are not those of the run that nothing stopped")
    return {
        "case": f"killed at {share:.0%}",
        "shards": args.shards,
        "committed": len(done),
        "begun_twice": sum(count > 1 for count in attempts.values()),
        "killed_s": first.seconds,
        "resumed_s": second.seconds,
        "start_s": second.start_s,
        "driver_mib": second.peak_mib,
    }


def main() -> None:
    args = harness.arguments(
        __doc__, shards=240, shard_groups=24, hidden_size=256, layers=5, vocab_size=1024, threads=1
    )
    if args.quick:
        args.shards, args.shard_groups, args.hidden_size, args.layers = 24, 4, 64, 1
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args)
        whole, expected = uninterrupted(folder, args)
        for share in SHARES[:1] if args.quick else SHARES:
            row = interrupted(folder, expected, share, args)
            before = whole
            if not args.quick:
                whole, found = uninterrupted(folder, args)
                assert found == expected, "two runs that nothing stopped differ"
            row["whole_s"] = [before.seconds, whole.seconds]
            row["extra"] = (row["killed_s"] + row["resumed_s"]) / statistics.mean(row["whole_s"]) - 1
            rows.append(row)
    if args.quick:
        facts = {name: rows[0][name] for name in ("shards", "committed", "begun_twice")}
        print(f"killed and resumed: {facts}; nothing committed was begun again, the columns are the same")
        return
    claims = [
        harness.claim(
            f"{row['case']} of {row['shards']} shards and resumed; {row['committed']} committed, none begun again",
            100 * row["extra"],
            f"% of the {statistics.mean(row['whole_s']):.0f} s of a run more",
            "≤ 2",
        )
        for row in rows
    ]
    harness.finish("resume_cost", args, rows, list(rows[0]), claims, ("ray",))


if __name__ == "__main__":
    main()
