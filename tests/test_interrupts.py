"""Ctrl-C and SIGTERM on real processes: exit codes, one line, nothing left running; the next run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from prefsel.interrupts import kept_handlers

PREFSEL = [sys.executable, "-c", "from prefsel.cli import main; main()"]
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 8, "batch_tokens": 512, "max_length": 64}
TOKENIZER = {"kind": "bpe", "vocab_size": 300}
TABLE: dict[str, Any] = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "ingest": {"rows_per_shard": 20},
    "split": {"holdout": 0.2, "proxy": 0.3},
    "models": [{"kind": "scratch_policy", "name": "policy", "tokenizer": TOKENIZER, **SHAPE}],
    "scorers": [{"kind": "causal_logps", "model": "policy"}],
    "metrics": [{"name": "margin", "metric": "implicit_margin", "params": {"policy": "policy"}}],
    "selections": [{"name": "half", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
    "train": [
        {
            **{"name": "dpo", "selection": "half", "model": "policy", "reference": "policy"},
            **{"learning_rate": 1e-3, "dtype": "fp32", "zero_stage": 0, "max_steps": 2, "global_batch_pairs": 6},
        }
    ],
    "ray": {"num_cpus": 2, "object_store_gib": 0.25},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interrupted")
    rows = [{"prompt": f"name {n}", "chosen": f"a long red word {n}", "rejected": "blue"} for n in range(80)]
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "c.yaml").write_text(yaml.safe_dump(TABLE))
    return made


def run_until(
    folder: Path, said: str, number: int, *more: str, wait_s: float = 0.5
) -> tuple[int, str, list[psutil.Process]]:
    """Start the run, signal it a moment after it said something; exit code, stderr, and its processes."""
    command = [*PREFSEL, "run", "c.yaml", *more]
    process = subprocess.Popen(
        command,
        cwd=folder,
        bufsize=1,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    is_heard = threading.Event()

    def listen() -> None:
        for line in process.stdout:
            if said in line:
                is_heard.set()
        is_heard.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert is_heard.wait(300)
    time.sleep(wait_s)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    stderr = process.stderr.read()
    code = process.wait(60)
    listener.join()
    return code, stderr, children


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended between the two questions
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


PHASES = [
    ("starting Ray", signal.SIGINT, "nothing new"),
    ("starting Ray", signal.SIGTERM, "nothing new"),
    ("ingest    a", signal.SIGTERM, "ingest a"),
    ("score policy: 0/4", signal.SIGINT, "ingest a, eligible all, scratch policy, score policy "),
    ("score     policy", signal.SIGTERM, "ingest a, eligible all, scratch policy, score policy"),
    ("train dpo: 0/2", signal.SIGINT, "metric margin, select half"),
    ("train dpo: 0/2", signal.SIGTERM, "metric margin, select half"),
    ("writing the report", signal.SIGINT, "train dpo, holdout holdout"),
]


@pytest.mark.slow
@pytest.mark.fault
def test_every_phase_can_be_interrupted_and_the_next_run_goes_on(folder: Path) -> None:
    for said, number, committed in PHASES:
        code, stderr, children = run_until(folder, said, number, "--workspace", "w")
        assert code == 128 + number, (said, stderr)
        assert stderr.count("\n") == 1, (said, stderr)
        assert stderr.startswith(f"prefsel: {number.name}; committed so far: "), (said, stderr)
        assert committed in stderr, (said, stderr)
        assert stderr.endswith("; run again to continue\n")
        assert not alive(children), (said, children)
    ledgers = [*folder.glob("w/columns/*/a/_ledger/attempts/*"), *folder.glob("w/groups/a/_ledger/attempts/*")]
    done = subprocess.run(
        [*PREFSEL, "run", "c.yaml", "--workspace", "w"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ingest    a: 80 rows in, 80 out; nothing to do" in done.stdout
    assert "score     policy: 160 completions in, 160 out; nothing to do" in done.stdout
    again = [*folder.glob("w/columns/*/a/_ledger/attempts/*"), *folder.glob("w/groups/a/_ledger/attempts/*")]
    assert sorted(again) == sorted(ledgers)  # what was committed was not begun again
    assert subprocess.run([*PREFSEL, "verify", "-w", "w"], cwd=folder, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.fault
def test_a_cluster_that_was_joined_is_left_without_our_actors(folder: Path) -> None:
    """Its processes are not ours to kill; it ends what belonged to the driver that went away."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})

    def workers() -> list[str]:
        names = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
                names.append(process.name())
        return [name for name in names if name.startswith("ray::MapWorker")]  # Ray's own agents stay with the cluster

    try:
        more = ("--workspace", "joined", "--set", f"ray.address={cluster.address}")
        code, stderr, _ = run_until(folder, "score policy: 0/4", signal.SIGTERM, *more, wait_s=4.0)
        told = [line for line in stderr.splitlines() if "core_worker.cc" not in line]  # Ray's own, see DECISIONS.md
        assert (code, len(told)) == (143, 1), stderr
        assert "committed so far: ingest a, eligible all, scratch policy, score policy" in stderr
        until = time.monotonic() + 60
        while workers() and time.monotonic() < until:
            time.sleep(0.2)
        assert not workers()
    finally:
        cluster.shutdown()


WAITING = """
import sys, time
from prefsel import interrupts
from prefsel.progress import Progress
interrupts.install()
progress = Progress()
with interrupts.telling(lambda: {told}), progress.track("score policy", 4, note="loading policy"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once() -> None:
    """The first one hangs in what it tells."""
    command = [sys.executable, "-c", WAITING.format(told="time.sleep(60)")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "ready" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


def test_ctrl_c_in_a_terminal_leaves_a_line_and_a_cursor() -> None:
    """The key itself, typed into a terminal that shows a bar."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", WAITING.format(told="'score policy 1/4 shards'")]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, preexec_fn=own_terminal, env=os.environ | {"TERM": "xterm"}, **streams)
    os.close(theirs)
    shown = b""
    while b"0/4 shards, loading policy" not in shown:
        shown += os.read(ours, 4096)
    os.write(ours, b"\x03")
    assert process.wait(20) == 130
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # how Linux says that nobody holds the other end any more
            break
        if not more:
            break
        shown += more
    os.close(ours)
    line = b"prefsel: SIGINT; committed so far: score policy 1/4 shards; run again to continue\r\n"
    assert shown.endswith(b"\x1b[?25h" + line), shown[-300:]
    assert b"Traceback" not in shown


def test_handlers_come_back_after_a_block_that_sets_its_own() -> None:
    """As `ray.init` does; a SIGTERM that its handler answered by leaving is answered again after the block."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with kept_handlers():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        assert signal.getsignal(signal.SIGTERM) is mine
        with kept_handlers():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert heard == [signal.SIGTERM]
        with pytest.raises(SystemExit), kept_handlers():
            sys.exit(3)
    finally:
        signal.signal(signal.SIGTERM, before)
