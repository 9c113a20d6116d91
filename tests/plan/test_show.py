"""What `prefsel graph` prints: every node with its place, before and after parts of the work are done."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from stage_runs import run

from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.plan import show
from prefsel.plan.nodes import make_plan
from prefsel.workspace.storage import Storage


def config(tmp_path: Path) -> Any:
    rows = [
        {"prompt": f"q{n}", "chosen": "yes", "rejected": "no", "score_chosen": n, "score_rejected": 0} for n in range(8)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(
        {
            "name": "t",
            "sources": [{"name": "a", "paths": [str(tmp_path / "a.jsonl")]}],
            "scorers": [{"kind": "imported", "name": "gold", "field": "score"}],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
            "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
        }
    )


def test_before_anything_is_ingested_paths_are_names(tmp_path: Path) -> None:
    lines = list(show.text(make_plan(config(tmp_path), Storage(str(tmp_path / "w")))))
    assert [line.split("  ")[0].strip() for line in lines] == [
        *("eligible all", "columns gold", "scores margin", "selection top", "dataset top"),
    ]
    assert all("to be made" in line for line in lines)
    assert lines[-1].endswith("datasets/top@…  ← selection top, columns gold")


@pytest.mark.usefixtures("local_ray")
def test_what_is_there_is_told(tmp_path: Path) -> None:
    made = config(tmp_path)
    plan, _ = run(made, tmp_path / "w")
    plan = make_plan(made, plan.storage)
    assert {found for found, _ in (show.state(plan, node) for node in show.shown_nodes(plan))} == {"there"}
    for _, path in (show.state(plan, node) for node in show.shown_nodes(plan)):
        assert plan.storage.local(path).is_dir()
    shutil.rmtree(plan.storage.local(plan.node("columns", "gold").path))
    plan = make_plan(made, plan.storage)
    assert show.state(plan, plan.node("columns", "gold"))[0] == "to be made"


def test_dot_is_a_digraph(tmp_path: Path) -> None:
    lines = list(show.dot(make_plan(config(tmp_path), Storage(str(tmp_path / "w")))))
    assert lines[0] == "digraph prefsel {"
    assert '  "scores margin" -> "selection top";' in lines
    assert lines[-1] == "}"
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input="\n".join(lines), text=True, check=True, capture_output=True)


def test_a_file_is_no_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(config(tmp_path).model_dump_json())
    (tmp_path / "file").write_text("")
    assert guarded(app, ["graph", str(tmp_path / "c.yaml"), "-w", str(tmp_path / "file")]) == 2
    assert "is a file; valid: a directory or a URI" in capsys.readouterr().err
