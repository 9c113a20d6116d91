"""`prefsel init`: a configuration for every format that ingest reads, and two of them really run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import published
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prefsel.cli import app, guarded
from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.draft import draft
from prefsel.errors import UserError
from prefsel.ingest.example import Format
from prefsel.ingest.formats import FORMATS
from prefsel.plan.check import check_without_models
from prefsel.workspace.storage import Storage

NUM_ROWS = 60
COLOURS = ("red", "green", "blue", "grey")


def pair(number: int) -> dict[str, Any]:
    good = f"the answer to {number} is {COLOURS[number % 4]} and nothing else"
    return {"prompt": f"question {number}?", "chosen": good, "rejected": f"perhaps {number}"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def explicit(number: int) -> dict[str, Any]:
    row = pair(number)
    return {"prompt": [said("user", row["prompt"])]} | {
        side: [said("assistant", row[side])] for side in ("chosen", "rejected")
    }


def implicit(number: int) -> dict[str, Any]:
    row = pair(number)
    question = said("user", row["prompt"])
    return {side: [question, said("assistant", row[side])] for side in ("chosen", "rejected")}


def transcript(number: int) -> dict[str, Any]:
    row = pair(number)
    begin = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
    return {side: begin + row[side] for side in ("chosen", "rejected")}


def ultrafeedback(number: int) -> dict[str, Any]:
    def completion(text: str, rating: int) -> dict[str, Any]:
        ratings = {"helpfulness": {"Rating": str(rating)}, "honesty": {"Rating": str(5 - rating % 3)}}
        return {"response": text, "annotations": ratings, "overall_score": rating, "model": "m"}

    row = pair(number)
    return {
        "instruction": row["prompt"],
        "completions": [completion(row["chosen"], 4), completion(row["rejected"], 2), completion("no idea", 1)],
    }


def ranked(number: int) -> dict[str, Any]:
    row = pair(number)
    return {"question": row["prompt"], "completions": [row["chosen"], row["rejected"], "no"], "preference": [1, 1, 0]}


def scored(number: int) -> dict[str, Any]:
    row = pair(number)
    return {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "rewards": [1.0, number % 7 / 10]}


def with_score(number: int) -> dict[str, Any]:
    return pair(number) | {"score_chosen": 3.0 + number % 5, "score_rejected": 2.0}


def safe(number: int) -> dict[str, Any]:
    row = pair(number)
    both = {"response_0": row["rejected"], "response_1": row["chosen"]}
    return {"prompt": row["prompt"], **both, "better_response_id": 1, "safer_response_id": number % 4 and 1}


MAKERS = {
    "prompt_chosen_rejected": pair,
    "transcript": transcript,
    "messages_explicit": explicit,
    "messages_implicit": implicit,
    "ultrafeedback": ultrafeedback,
    "ranked": ranked,
    "scored": scored,
    "pku_saferlhf": safe,
}
SELECTED_BY = {"ultrafeedback": ["explicit_margin", "preference_divergence"], "scored": ["explicit_margin"]}
"""Every other format comes without a number, so that models are made on the spot."""


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def checked(text: str, folder: Path) -> Config:
    """The configuration, which must pass every check that needs no model."""
    config = parse_config(yaml.safe_load(text))
    check_without_models(config, Storage(str(folder / "w")))
    return config


def with_alternatives(text: str) -> str:
    return re.sub(r"(?m)^( *)#~ ", r"\1", text)


@pytest.mark.parametrize("format", MAKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
def test_every_format_gives_a_configuration_that_passes(tmp_path: Path, format: str, ending: str) -> None:
    file = written(tmp_path / f"my data{ending}", [MAKERS[format](number) for number in range(NUM_ROWS)])
    drafted = draft([file])
    config = checked(drafted.text, tmp_path)
    assert drafted.name == config.name == "my-data"
    assert config.sources[0].format == format
    assert config.sources[0].paths == [file]
    expected = SELECTED_BY.get(format, ["alignment_potential"])
    assert [metric.metric for metric in config.metrics] == expected
    assert len(config.selections) == len(expected)
    assert not config.train
    everything = checked(with_alternatives(drafted.text), tmp_path)
    assert [spec.name for spec in everything.train] == ["dpo"]
    assert all(f"# {line}" in drafted.text for line in drafted.seen)


@pytest.mark.parametrize("name", published.ROWS)
def test_a_published_row_gives_a_configuration_that_passes(tmp_path: Path, name: str) -> None:
    format, row, _, _ = published.ROWS[name]
    drafted = draft([written(tmp_path / "a.jsonl", [row])])
    assert checked(drafted.text, tmp_path).sources[0].format == format


def test_all_formats_are_tried() -> None:
    of_one_response = {name for name, one in FORMATS.builtin.items() if isinstance(one, Format) and one.pair_up}
    tried = set(MAKERS) | {format for format, *_ in published.ROWS.values()}
    assert tried | of_one_response == set(FORMATS)


def test_several_files_are_several_sources(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [with_score(number) for number in range(NUM_ROWS)])
    (tmp_path / "more").mkdir()
    second = written(tmp_path / "more" / "a.jsonl", [transcript(number) for number in range(100, 120)])
    config = checked(draft([first, second], name="both").text, tmp_path)
    assert config.name == "both"
    assert [(source.name, source.format) for source in config.sources] == [
        ("a", "prompt_chosen_rejected"),
        ("a-2", "transcript"),
    ]
    assert [metric.metric for metric in config.metrics] == ["explicit_margin"]  # 60 of 80 pairs have the score


def test_a_rare_number_is_not_selected_by(tmp_path: Path) -> None:
    rows = [with_score(number) if number < 20 else pair(number) for number in range(NUM_ROWS)]
    config = checked(draft([written(tmp_path / "a.jsonl", rows)]).text, tmp_path)
    assert [metric.metric for metric in config.metrics] == ["alignment_potential"]


def test_too_few_prompts_for_models_are_drawn_by_lot(tmp_path: Path) -> None:
    drafted = draft([written(tmp_path / "a.jsonl", [pair(number) for number in range(6)])])
    config = checked(drafted.text, tmp_path)
    assert [metric.metric for metric in config.metrics] == ["random"]
    assert not config.models
    checked(with_alternatives(drafted.text), tmp_path)


def test_bad_rows_are_told_and_allowed(tmp_path: Path) -> None:
    rows = [with_score(number) for number in range(NUM_ROWS)] + [{"prompt": "alone"}] * 12
    drafted = draft([written(tmp_path / "a.jsonl", rows)])
    assert "  12 rows cannot be used: missing_field (a field the format needs is absent or null)" in drafted.seen
    config = checked(drafted.text, tmp_path)
    assert config.ingest.max_quarantine_fraction == 0.18  # 12 of 72 are 16.7 %, rounded up, and one more percent


def test_no_pair_is_no_configuration(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "same", "rejected": "same"}])
    with pytest.raises(UserError, match=r"no pair of completions in what was read\n.*\n.*\n.*identical_completions"):
        draft([file])
    (tmp_path / "b.json").write_text(json.dumps([pair(1), pair(2)], indent=1))
    assert checked(draft([str(tmp_path / "b.json")]).text, tmp_path).sources[0].format == "prompt_chosen_rejected"


def test_a_file_that_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", [with_score(number) for number in range(NUM_ROWS)])
    assert guarded(app, ["init", "a.jsonl"]) == 0
    assert "wrote a.yaml; next: prefsel run a.yaml --workspace a-workspace" in capsys.readouterr().out
    assert guarded(app, ["init", "a.jsonl", "--output", "my run.yaml"]) == 0
    for line in (capsys.readouterr().out, Path("my run.yaml").read_text()):
        assert "prefsel run 'my run.yaml' --workspace a-workspace" in line
    (tmp_path / "a.yaml").write_text("mine")
    assert guarded(app, ["init", "a.jsonl"]) == 2
    assert "a.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "a.yaml").read_text() == "mine"
    assert guarded(app, ["init", "a.jsonl", "--output", "nowhere/b.yaml"]) == 2
    assert guarded(app, ["init", "a.jsonl", "--output", ".", "--force"]) == 2
    assert guarded(app, ["init", "a.jsonl", "--output", "b.yaml"]) == 0
    assert guarded(app, ["init", "a.jsonl", "--force"]) == 0
    assert (tmp_path / "a.yaml").read_text() == (tmp_path / "b.yaml").read_text().replace("run b.yaml", "run a.yaml")
    assert guarded(app, ["init", "none.jsonl"]) == 2
    assert guarded(app, ["init", "a.jsonl", "--name", "no name", "--force"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("maker", [ultrafeedback, pair], ids=["numbers of the data", "models made on the spot"])
def test_what_is_written_runs(tmp_path: Path, maker: Any) -> None:
    """From the files to the report, by the two commands that a new user types."""
    written(tmp_path / "mine.jsonl", [maker(number) for number in range(NUM_ROWS)])
    for arguments in (["init", "mine.jsonl"], ["run", "mine.yaml", "--workspace", "mine-workspace"]):
        command = [sys.executable, "-c", "from prefsel.cli import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    folders = {folder.name.rsplit("@", 1)[0] for folder in (tmp_path / "mine-workspace" / "datasets").iterdir()}
    drafted = parse_config(yaml.safe_load((tmp_path / "mine.yaml").read_text()))
    assert folders >= {name for one in drafted.selections for name in (one.name, f"{one.name}-random")}
    assert "report    " in done.stdout
    assert "next      prefsel explain PAIR_ID --workspace mine-workspace" in done.stdout
