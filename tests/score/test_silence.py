"""An actor that hangs is ended, and its shards are begun again by another one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_stages import config, row, write

from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

TABLE = {
    "scorers": [
        {
            **{"kind": "function", "name": "length", "function": "hanging_judges:hangs_once"},
            "pool": {"size": 1, "silence_s": 3},
        }
    ],
    "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "length"}}],
    "ingest": {"rows_per_shard": 5},
}


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_hangs_costs_its_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(n) | {"prompt": f"{tmp_path}/hung {n}"} for n in range(20)]
    made = config({"a": write(tmp_path / "a.jsonl", rows)}, **TABLE)
    storage = Storage(str(tmp_path / "w"))
    run(made, storage.uri, Progress(), until="score")
    told = capsys.readouterr().out
    assert re.search(r"score +length: an actor died, or said nothing for 3 s; 4 shards left, begun again", told), told
    (name,) = storage.folders("columns")
    assert Artifact(storage, f"columns/{name}/a").attempts().total() == 6  # two were in its hand
