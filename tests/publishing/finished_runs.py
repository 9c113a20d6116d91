"""Finished runs, as the tests of publishing need them."""

from __future__ import annotations

import shutil
from pathlib import Path

from test_stages import config, row, write

from prefsel.pipeline import run
from prefsel.progress import Progress


def finish(folder: Path, ratio: float) -> None:
    """Run a configuration that keeps a share of 40 pairs in the workspace `w` of a folder."""
    selections = [
        {"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": ratio}},
        {"name": "unwritten", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.1}, "dataset": "never"},
    ]
    source = write(folder / "a.jsonl", [row(n) for n in range(40)])
    made = config({"a": source}, selections=selections, ingest={"rows_per_shard": 15})
    run(made, str(folder / "w"), Progress(quiet=True))


def run_again(finished: tuple[Path, Path], place: Path, which: int = 1) -> None:
    """As if the run that keeps more, or the other one again, had ended in the workspace."""
    shutil.copytree(finished[which], place, dirs_exist_ok=True)
