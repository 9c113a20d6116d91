"""A refresh where the corpus itself made the scorers: they stay, a gate compares, and others are made where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_damaged_models import table

from prefsel.config.file import parse_config
from prefsel.errors import GateError, PrefselError
from prefsel.progress import Progress
from prefsel.publishing.versions import read_pointer
from prefsel.refresh import Publishing, Refreshed, refresh
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

QUIET = Progress(quiet=True)


def write(file: Path, count: int) -> None:
    rows = [{"prompt": f"name {n}", "chosen": f"a red word {n}", "rejected": "blue"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def artifacts(done: Refreshed) -> dict[tuple[str, str], str]:
    return {(one.stage, one.name): one.artifact for one in done.outcome.reports}


def asked(workspace: str, folder: str) -> int:
    """Completions that a model was asked for, over all shards that a column set ever had."""
    entries = Artifact(Storage(workspace), f"{folder}/a").entries().values()
    return sum(one.info["completions"] - one.info.get("carried", 0) for one in entries)


def test_models_that_score_stay(tmp_path: Path, local_ray: None) -> None:
    file, workspace = tmp_path / "a.jsonl", str(tmp_path / "w")
    write(file, 120)
    made: dict[str, Any] = table(file)
    made["selections"][0]["dataset"] = "always"
    config = parse_config(made)
    what = Publishing("half", "served", "dpo", max_drop=100.0, keep=2)
    first = refresh(config, workspace, QUIET, trains=True, publishing=what)
    before = artifacts(first)
    columns = {name: path for (stage, name), path in before.items() if stage == "score"}
    was = {name: asked(workspace, path) for name, path in columns.items()}

    write(file, 130)
    second = refresh(config, workspace, QUIET, trains=True, publishing=what)
    now = artifacts(second)
    for key in (("scratch", "policy"), ("tangent", "aim"), *(("score", name) for name in columns)):
        assert now[key] == before[key]
    assert now["train", "dpo"] != before["train", "dpo"]
    assert {name: asked(workspace, path) - was[name] for name, path in columns.items()} == dict.fromkeys(columns, 20)
    pointer = read_pointer(Storage(workspace), "served")
    assert pointer is not None
    assert [move.version for move in pointer[0].moves] == ["v0001", "v0002"]
    assert verify(Storage(workspace)).is_clean

    write(file, 131)
    with pytest.raises(GateError, match="v0002 stays current"):
        refresh(config, workspace, QUIET, trains=True, publishing=Publishing("half", "served", "dpo", max_drop=-200.0))

    write(file, 132)
    other = {**made, "models": [made["models"][0] | {"steps": 9}]}
    anew = artifacts(refresh(parse_config(other), workspace, QUIET))
    assert anew["scratch", "policy"] != before["scratch", "policy"]
    assert ("train", "dpo") not in anew

    (weights,) = (tmp_path / "w" / anew["scratch", "policy"]).glob("*.safetensors")
    weights.unlink()
    write(file, 133)
    with pytest.raises(PrefselError, match="--retrain-scorers"):
        refresh(parse_config(other), workspace, QUIET)
    again = artifacts(refresh(parse_config(other), workspace, QUIET, retrain_scorers=True))
    assert again["scratch", "policy"] != anew["scratch", "policy"]
