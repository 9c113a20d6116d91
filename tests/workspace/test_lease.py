"""One writer per workspace: on real processes that are stopped, killed and started again, in a directory and on S3."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from prefsel.errors import LostLeaseError, PrefselError, RefusedError, UserError
from prefsel.workspace.fence import FRESH_S
from prefsel.workspace.lease import Lease, hold, holder
from prefsel.workspace.owner import Owner, this_process
from prefsel.workspace.storage import Storage

HOLDER = """
import sys
from prefsel import interrupts
from prefsel.cli import guarded
from prefsel.workspace.lease import hold
from prefsel.workspace.storage import Storage

def work(args, standalone_mode):
    with hold(Storage(sys.argv[1]), expiry_s=float(sys.argv[2])) as held:
        print("holds", flush=True)
        for line in sys.stdin:
            held.write("data", line.encode())
            print("wrote", flush=True)

interrupts.install()
sys.exit(guarded(work))
"""


@contextmanager
def holding(uri: str, expiry_s: float, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that holds the lease and writes what it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(expiry_s)],
        env=os.environ | environment,
        text=True,
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
    )
    try:
        assert process.stdout.readline() == "holds\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    pafs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield f"s3://key:secret@bucket/%s?{options}"
    server.stop()


@pytest.fixture(params=["directory", "store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "w")
    return request.getfixturevalue("bucket") % request.node.name.partition("[")[0]


def test_a_second_writer_is_refused_and_told_who_holds_it(uri: str) -> None:
    with holding(uri, 60) as process:
        with pytest.raises(RefusedError, match=rf"being written by process {process.pid} of .* since .*--wait"):
            hold(Storage(uri)).__enter__()
        process.stdin.write("1\n")
        process.stdin.flush()
        assert process.stdout.readline() == "wrote\n"
        assert process.communicate()[0] == ""
        assert process.returncode == 0
    assert holder(Storage(uri)) is None
    with hold(Storage(uri)) as held:
        assert held.epoch == 2
        assert held.read("data") == b"1\n"


@pytest.mark.fault
def test_a_stopped_writer_is_taken_over_and_commits_nothing_afterwards(uri: str) -> None:
    said: list[str] = []
    with holding(uri, 2) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        began = time.monotonic()
        with hold(Storage(uri), tell=said.append) as held:
            assert 1.5 < time.monotonic() - began < 20
            held.write("data", b"ours")
            process.send_signal(signal.SIGCONT)
            _, stderr = process.communicate("theirs\n")
            assert (process.returncode, held.read("data")) == (1, b"ours"), stderr
            assert stderr.startswith("prefsel: workspace: another run has taken it over"), stderr
            held.write("data", b"ours again")
        assert len(said) == 1
        assert "watching up to 2 s whether it is alive" in said[0]


@pytest.mark.fault
def test_a_killed_writer_of_this_machine_is_followed_at_once(uri: str) -> None:
    with holding(uri, 60) as process:
        process.kill()
        process.wait()
        assert holder(Storage(uri)).owner.pid == process.pid
        began = time.monotonic()
        with hold(Storage(uri)) as held:
            assert held.epoch == 2
        assert time.monotonic() - began < 3


@pytest.mark.fault
def test_an_interrupted_writer_gives_the_lease_back(uri: str) -> None:
    """So that other machines need not wait until it expires."""
    with holding(uri, 60) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        assert holder(Storage(uri)) is None


def test_a_lease_of_another_hand_is_told(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for text in (b"mine", b"{}", b"[]"):
        with hold(storage) as held:
            time.sleep(FRESH_S)
            (tmp_path / "lease.json").write_bytes(text)
            with pytest.raises(LostLeaseError, match=r"lease\.json is no lease any more"):
                held.write("data", b"1")
        with pytest.raises(PrefselError, match=r"lease\.json: not a lease; if no run writes"):
            hold(storage).__enter__()
        storage.delete("lease.json")


def test_a_retry_of_the_same_slot_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSEL_SLOT", "nightly")
    with holding(str(tmp_path), 60) as process, hold(Storage(str(tmp_path))) as held:
        assert held.epoch == 2
        _, stderr = process.communicate("theirs\n")
        assert (process.returncode, held.exists("data")) == (1, False), stderr
    monkeypatch.setenv("PREFSEL_SLOT", "another")
    with holding(str(tmp_path), 60, PREFSEL_SLOT="nightly"), pytest.raises(RefusedError, match="nightly"):
        hold(Storage(str(tmp_path))).__enter__()


def test_waiting_ends_with_the_writer_and_is_told_once(uri: str) -> None:
    said: list[str] = []
    with holding(uri, 3) as process:
        ending = threading.Timer(2.0, process.stdin.close)
        ending.start()
        with hold(Storage(uri), wait=True, tell=said.append) as held:
            assert held.epoch == 2
        ending.join()
    assert len(said) == 1
    assert "waiting for its end" in said[0]


def from_elsewhere(expiry_s: float) -> Lease:
    """As a process of another machine would write it; nothing here can know whether that runs."""
    return Lease(7, 3, Owner(None, "far", "other machine", 1, 1, "somebody"), "yesterday", expiry_s)


def test_a_silent_writer_of_another_machine_is_followed_after_its_own_expiry(uri: str) -> None:
    storage = Storage(uri)
    storage.write("lease.json", from_elsewhere(1.5).to_bytes())
    began = time.monotonic()
    with hold(storage, expiry_s=600) as held:
        assert held.epoch == 8
        assert 1.4 < time.monotonic() - began < 15


def test_a_writer_of_another_machine_that_beats_is_seen_to_live(tmp_path: Path) -> None:
    storage, lease = Storage(str(tmp_path)), from_elsewhere(600)
    storage.write("lease.json", lease.to_bytes())
    beat = threading.Timer(0.5, lambda: storage.write("lease.json", replace(lease, beat=4).to_bytes()))
    beat.start()
    with pytest.raises(RefusedError, match="process 1 of somebody on far, since yesterday"):
        hold(storage).__enter__()
    beat.join()


def test_a_holder_goes_on_for_longer_than_its_expiry(uri: str) -> None:
    with hold(Storage(uri), expiry_s=1) as held:
        time.sleep(2.5)
        held.write("data", b"1")
        lease = holder(Storage(uri))
        assert (lease.epoch, lease.beat > 5) == (held.epoch, True)


def test_workers_carry_the_epoch_and_stop_when_their_driver_lost_it(tmp_path: Path) -> None:
    with hold(Storage(str(tmp_path))) as held:
        worker = pickle.loads(pickle.dumps(held))
        worker.write("data", b"1")
        with hold(Storage(str(tmp_path))) as inner:
            assert inner == held
        worker.write("data", b"2")
    time.sleep(FRESH_S)
    for change in (lambda: worker.write("data", b"3"), lambda: worker.delete("data"), lambda: worker.delete_tree("")):
        with pytest.raises(LostLeaseError, match="has ended"):
            change()
    assert Storage(str(tmp_path)).read("data") == b"2"


def test_what_a_killed_writer_left_unfinished_is_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "w"))
    storage.write("scores/a/s.parquet", b"1")
    left = tmp_path / "w/scores/a/.tmp-0123"
    left.write_bytes(b"half")
    with hold(storage):
        assert not left.exists()
    assert storage.exists("scores/a/s.parquet")


def test_what_cannot_be_written_or_is_no_lease_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        hold(Storage(str(tmp_path / "file"))).__enter__()
    monkeypatch.setenv("PREFSEL_LEASE_EXPIRY_S", "soon")
    with pytest.raises(UserError, match="PREFSEL_LEASE_EXPIRY_S: got 'soon'"):
        hold(Storage(str(tmp_path / "w"))).__enter__()


def test_a_process_number_that_came_again_is_another_process() -> None:
    me = this_process()
    assert (me.is_dead(), me.is_at_work()) == (False, True)
    assert replace(me, started=me.started - 1).is_dead()
    assert not replace(me, started=me.started - 1, machine="another").is_dead()
