"""What is counted, how the time left is estimated, and what a log gets while nothing happens."""

from __future__ import annotations

import re
import time

import pytest

from prefsel import progress as progress_module
from prefsel.progress import Counter, Progress, clock


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def test_speed_and_time_left_count_from_the_first_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading took 60 s; then 100 of 400 bytes came in 10 s, so that the 200 bytes left take 20 s."""
    passing = Clock(monkeypatch)
    counter = Counter(3, "shards", "loading policy", 400.0)
    assert counter.text() == "0/3 shards, loading policy"
    passing.now += 60
    counter.advance(tokens=700, size=100)
    assert counter.text() == "1/3 shards, 700 tokens"
    passing.now += 10
    counter.advance(tokens=500, size=100)
    assert counter.text() == "2/3 shards, 1,200 tokens, 50 tokens/s, 0:00:20 left"
    assert counter.share == 0.5
    passing.now += 5
    assert counter.text() == "2/3 shards, 1,200 tokens, 50 tokens/s, 0:00:15 left"
    passing.now += 60
    assert counter.text() == "2/3 shards, 1,200 tokens, 50 tokens/s, 0:00:00 left"
    counter.advance(size=200)
    assert counter.text() == "3/3 shards, 1,200 tokens, 7 tokens/s"  # 500 tokens in the 75 s since the first
    assert clock(counter.elapsed_s) == "0:02:15"


def test_units_without_sizes_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Clock(monkeypatch)
    counter = Counter(5, "files", "", 0.0)
    for _ in range(3):
        counter.advance(note="a.jsonl")
        passing.now += 2
    assert counter.share == pytest.approx(0.6)
    assert counter.text() == "3/5 files, 0:00:02 left, a.jsonl"  # one in 2 s, and 2 s have passed since the last


def test_a_log_hears_of_work_that_does_not_advance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_S", 0.02)
    progress = Progress()
    with progress.phase("starting Ray"):
        time.sleep(0.4)
    with progress.track("score policy", 4, note="loading policy"):
        time.sleep(0.4)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "starting Ray …"
    assert told.count("starting Ray … 0:00:00") >= 2
    assert "  score policy: 0/4 shards, loading policy" in told
    beats = [line for line in told if re.fullmatch(r"  score policy: 0/4 shards, loading policy  0:00:00", line)]
    assert len(beats) >= 2
    with progress.at("metric margin"):
        time.sleep(0.4)
        with progress.track("metric margin", 4):
            time.sleep(0.4)
    told = capsys.readouterr().out.splitlines()
    assert told.count("  at metric margin  0:00:00") >= 2
    assert told.count("  metric margin: 0/4 shards  0:00:00") >= 2
    assert sorted(told, key=lambda line: "0/4" in line) == told  # the inmost block speaks alone
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # the heart stops with the work


def test_a_quiet_one_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_S", 0.01)
    progress = Progress(quiet=True)
    with progress.at("x"), progress.phase("starting Ray"), progress.track("score", 4, note="loading") as counter:
        counter.advance()
        time.sleep(0.05)
    progress.line("done")
    assert capsys.readouterr().out == ""


def test_what_is_committed_is_finished_stages_and_counted_commits() -> None:
    progress = Progress(quiet=True)
    assert progress.committed() == "nothing new"
    progress.finished("ingest a")
    with progress.track("train dpo", 9, "steps") as counter:
        counter.advance(4)
        assert progress.committed() == "ingest a"  # steps are in no artifact
    with progress.track("score policy", 4, commits=True) as counter:
        counter.advance()
        assert progress.committed() == "ingest a, score policy 1/4 shards"
    assert progress.committed() == "ingest a"
    progress.finished("score policy")
    assert progress.committed() == "ingest a, score policy"
