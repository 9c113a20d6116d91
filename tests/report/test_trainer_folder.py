"""What `select` and `export --for` write, read back by `datasets` and as each trainer's loader reads it.

The readers of OpenRLHF, axolotl and LLaMA-Factory below are written after their documentation and loaders: what they
open, what they take of a row, and what they drop with a warning.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import prefsel
from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.report.trainer_folder import write_folder

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("local_ray")

CALL = [{"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Graz", "unit": None}}}]
OTHER_CALL = [{"type": "function", "function": {"name": "news", "arguments": '{"about": "tea"}'}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def plain(count: int) -> list[dict[str, Any]]:
    """Rows of text; every second prompt opens with a system message, every third has a history."""
    rows = []
    for number in range(count):
        prompt = [{"role": "system", "content": f"Be kind, {number}."}] if number % 2 else []
        if number % 3 == 0:
            prompt += [{"role": "user", "content": "Hello ü"}, {"role": "assistant", "content": 'Hi,\n"you".'}]
        prompt.append({"role": "user", "content": f"Question {number}?"})
        rows.append(row(prompt, f"Good {number}.", f"Bad {number}!", number))
    return rows


def row(prompt: list[dict[str, Any]], chosen: Any, rejected: Any, score: float) -> dict[str, Any]:
    sides = {
        name: side if isinstance(side, list) else [{"role": "assistant", "content": side}]
        for name, side in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": prompt, **sides, "score_chosen": float(score), "score_rejected": 0.0}


def with_calls(count: int) -> list[dict[str, Any]]:
    """A call in the history, null beside it; in every second row a call of other arguments is the better answer."""
    rows = []
    for number in range(count):
        user = {"role": "user", "content": f"Weather {number}?"}
        called = {"role": "assistant", "content": None, "tool_calls": CALL}
        found = {"role": "tool", "content": "rain", "tool_call_id": "a1"}
        if number % 2:
            chosen: Any = [{"role": "assistant", "content": None, "tool_calls": OTHER_CALL}]
            prompt = [user]
        else:
            chosen, prompt = "It rains.", [user, called, found]
        rows.append(row(prompt, chosen, f"No idea {number}.", 100 + number) | {"tools": TOOLS})
    return rows


def made(home: Path, sources: dict[str, list[dict[str, Any]]]) -> Path:
    """A workspace whose selection `all-of-it` keeps every pair; shards of four rows."""
    for name, rows in sources.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = {
        "name": "trainers",
        "sources": [{"name": name, "paths": [str(home / f"{name}.jsonl")]} for name in sources],
        "ingest": {"rows_per_shard": 4},
        "scorers": [{"kind": "imported", "name": "given"}],
        "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "given"}}],
        "selections": [{"name": "all-of-it", "rule": {"kind": "top", "score": "score_margin", "ratio": 1.0}}],
    }
    run(parse_config(config), str(home / "w"), Progress(quiet=True))
    return home / "w"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    return made(tmp_path_factory.mktemp("text"), {"plain": plain(14)})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Shards of text first, then one of text and calls, then calls alone."""
    sources = {"plain": plain(10), "calls": [*plain(12)[10:], *with_calls(6)]}
    return made(tmp_path_factory.mktemp("mixed"), sources)


def export(workspace: Path, trainer: str, output: Path, *more: str) -> int:
    chosen = ["--selection", "all-of-it", "--for", trainer, "--output", str(output), *more]
    return guarded(app, ["export", str(workspace), *chosen])


def opened(path: Path, cache: Path) -> Any:
    return datasets.load_dataset(str(path), split="train", cache_dir=str(cache))


def by_question(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda one: one["score_chosen"])


def as_given(rows: Any) -> list[dict[str, Any]]:
    """What was put in: texts and tools by score, as messages."""
    return [{name: one[name] for name in ("prompt", "chosen", "rejected")} for one in by_question(rows)]


def read(rows: Any) -> list[dict[str, Any]]:
    ordered = sorted(rows, key=lambda one: one["rm_given_chosen"])
    return [{name: one[name] for name in ("prompt", "chosen", "rejected")} for one in ordered]


# -------------------------------------------------------------------------------------------------------------- lists


def test_a_dataset_of_text_opens_as_it_is(text: Path, tmp_path: Path) -> None:
    (dataset,) = (text / "datasets").iterdir()
    data = opened(dataset, tmp_path)
    assert read(data.to_list()) == as_given(plain(14))


def test_a_dataset_of_which_some_messages_hold_more_has_one_schema(mixed: Path, tmp_path: Path) -> None:
    (dataset,) = (mixed / "datasets").iterdir()
    data = opened(dataset, tmp_path)
    assert "which no trainer reads from there" in (dataset / "README.md").read_text()
    assert len(data) == 18
    kept = [json.loads(m["rest"]) for one in data.to_list() for m in one["prompt"] if m["rest"]]
    assert {tuple(sorted(one)) for one in kept} == {("tools",), ("tool_calls",), ("tool_call_id",)}
    table = prefsel.open(mixed).pairs().to_table()
    assert sum(m["rest"] is not None for prompt in table["prompt"].to_pylist() for m in prompt) == len(kept) == 12


@pytest.mark.parametrize("trainer", ["trl", "openrlhf"])
def test_lists_of_text_are_plain_columns(text: Path, tmp_path: Path, trainer: str) -> None:
    assert export(text, trainer, tmp_path / "out") == 0
    data = opened(tmp_path / "out", tmp_path)
    assert read(data.to_list()) == as_given(plain(14))
    assert "tools" not in data.column_names
    assert set(data.features["prompt"].feature) == {"role", "content"}
    # OpenRLHF opens the file by its ending, and the folder through `load_dataset`.
    file = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/train.parquet"), cache_dir=str(tmp_path))
    assert read(file["train"].to_list()) == as_given(plain(14))


def test_trl_gets_messages_as_they_came(mixed: Path, tmp_path: Path) -> None:
    assert export(mixed, "trl", tmp_path / "out") == 0
    rows = opened(tmp_path / "out", tmp_path).to_list()
    wanted = [*plain(12), *with_calls(6)]
    assert read(rows) == as_given(wanted)
    tools = [one["tools"] for one in sorted(rows, key=lambda one: one["rm_given_chosen"])]
    assert [one and json.loads(one) for one in tools] == [one.get("tools") for one in by_question(wanted)]


def test_openrlhf_is_refused_tools_that_it_would_not_show(mixed: Path, tmp_path: Path, capfd: Any) -> None:
    assert export(mixed, "openrlhf", tmp_path / "out") == 2
    told = capfd.readouterr().err
    assert "OpenRLHF cannot hold 6 of 18 pairs: 6 × tools that are offered to the model (first " in told
    assert "add --leave-out" in told
    assert not list((tmp_path / "out").iterdir())
    assert export(mixed, "openrlhf", tmp_path / "out", "--leave-out") == 0
    assert "left out 6: 6 × tools that are offered" in capfd.readouterr().out
    assert read(opened(tmp_path / "out", tmp_path).to_list()) == as_given(plain(12))
    assert "Left out, because OpenRLHF cannot hold them: 6 × tools" in (tmp_path / "out/README.md").read_text()


# ------------------------------------------------------------------------------------------------------------ objects


def read_as_axolotl(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """`chat_template.default`: `field_messages`, and one message object or the last of a list for either response."""
    roles = {"user", "assistant", "system", "tool"}
    found = []
    for one in opened(folder, cache).to_list():
        for message in (*one["messages"], one["chosen"], one["rejected"]):
            assert message.keys() == {"role", "content"}
            assert message["role"] in roles
            assert isinstance(message["content"], str)
        sides = {"prompt": one["messages"], "chosen": [one["chosen"]], "rejected": [one["rejected"]]}
        found.append(sides | {"rm_given_chosen": one["rm_given_chosen"]})
    return found


def test_axolotl_reads_every_pair_of_text(text: Path, mixed: Path, tmp_path: Path, capfd: Any) -> None:
    assert export(text, "axolotl", tmp_path / "out") == 0
    assert read(read_as_axolotl(tmp_path / "out", tmp_path)) == as_given(plain(14))
    assert export(mixed, "axolotl", tmp_path / "calls") == 2
    assert "6 × a message with tools" in capfd.readouterr().err


def read_as_llamafactory(folder: Path, name: str, cache: Path) -> list[dict[str, Any]]:
    """A `sharegpt` entry with `ranking`: what its converter makes of the rows; one it would skip fails here."""
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    assert entry["formatting"] == "sharegpt"
    assert entry["ranking"] is True
    place = folder / entry["file_name"]
    files = list(place.iterdir()) if place.is_dir() else [place]
    assert {one.suffix for one in files} <= {".parquet"}
    columns, tags = entry["columns"], entry["tags"]
    found = []
    for one in datasets.load_dataset("parquet", data_files=[str(f) for f in files], cache_dir=str(cache))["train"]:
        turns, system = one[columns["messages"]], ""
        if turns and turns[0][tags["role_tag"]] == tags["system_tag"]:
            system, turns = turns[0][tags["content_tag"]], turns[1:]
        odd, even = (tags["user_tag"], tags["observation_tag"]), (tags["assistant_tag"], tags["function_tag"])
        for number, turn in enumerate(turns):
            assert turn[tags["role_tag"]] in (odd, even)[number % 2]
        assert len(turns) % 2 == 1
        sides = [one[columns[side]] for side in ("chosen", "rejected")]
        assert all(isinstance(side, dict) and side[tags["role_tag"]] in even for side in sides)
        texts = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in (*turns, *sides)]
        assert all(isinstance(content, str) for _, content in texts)
        tools = one[columns["tools"]] if "tools" in columns else ""
        found.append({"system": system, "turns": texts, "tools": tools, "score": one["rm_given_chosen"]})
    return sorted(found, key=lambda one: one["score"])


def test_llamafactory_reads_every_pair(text: Path, tmp_path: Path) -> None:
    assert export(text, "llamafactory", tmp_path / "out") == 0
    found = read_as_llamafactory(tmp_path / "out", "all-of-it", tmp_path)
    assert len(found) == 14
    for one, given in zip(found, by_question(plain(14)), strict=True):
        messages = [*given["prompt"], *given["chosen"], *given["rejected"]]
        is_system = messages[0]["role"] == "system"
        assert one["system"] == (messages[0]["content"] if is_system else "")
        assert one["turns"] == [(m["role"], m["content"]) for m in messages[is_system:]]


def test_llamafactory_gets_calls_as_its_own_turns(mixed: Path, tmp_path: Path) -> None:
    assert export(mixed, "llamafactory", tmp_path / "out") == 0
    found = read_as_llamafactory(tmp_path / "out", "all-of-it", tmp_path)
    assert len(found) == 18
    assert [json.loads(one["tools"]) if one["tools"] else None for one in found] == [None] * 12 + [TOOLS] * 6
    history, answered = found[12]["turns"], found[13]["turns"]
    assert [role for role, _ in history] == ["user", "function_call", "tool", "assistant", "assistant"]
    assert json.loads(history[1][1]) == [{"name": "weather", "arguments": {"city": "Graz", "unit": None}}]
    assert answered[1][0] == "function_call"
    assert json.loads(answered[1][1]) == [{"name": "news", "arguments": {"about": "tea"}}]


# ---------------------------------------------------------------------------------------------------------- the folder


def test_card_and_page_show_the_lines(text: Path, tmp_path: Path, capfd: Any) -> None:
    (dataset,) = (text / "datasets").iterdir()
    card = (dataset / "README.md").read_text()
    assert '"@" in this folder' in card
    for trainer in ("trl", "openrlhf", "axolotl", "llamafactory"):
        assert f"prefsel export W --selection all-of-it --for {trainer} --output all-of-it-{trainer}" in card
        folder = tmp_path / f"all-of-it-{trainer}"
        assert export(text, trainer, folder) == 0
        page, told = (folder / "README.md").read_text(), capfd.readouterr().out
        assert str(folder) in page
        assert f"export: 14 pairs for {prefsel_title(trainer)}" in told
    assert "--data.apply_chat_template" in card
    assert "--data.prompt_key prompt" in card
    assert "type: chat_template.default" in card
    assert "dataset: all-of-it" in card


def prefsel_title(trainer: str) -> str:
    return {"trl": "TRL", "openrlhf": "OpenRLHF", "axolotl": "axolotl", "llamafactory": "LLaMA-Factory"}[trainer]


def test_what_cannot_be_written(text: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    here = [str(text), "--selection", "all-of-it"]
    for arguments, told in (
        ([*here, "--for", "unsloth", "--output", str(tmp_path / "a")], "valid: trl, openrlhf, axolotl, llamafactory"),
        ([*here, "--for", "trl", "--output", str(tmp_path / "a@b")], 'without "@" and ","'),
        ([*here, "--for", "trl", "--output", "s3://b/a"], "valid: a local folder"),
        ([*here, "--for", "trl", "--output", str(tmp_path / "full")], "a new or an empty folder"),
        ([*here, "--for", "trl"], "it needs --selection and --output FOLDER"),
        ([str(text), "--for", "trl", "--output", str(tmp_path / "a")], "it needs --selection"),
        ([*here, "--leave-out"], "name the trainer with --for"),
        ([str(text), "--selection", "al", "--for", "trl", "--output", str(tmp_path / "a")], "selection: got 'al'"),
    ):
        assert guarded(app, ["export", *arguments]) == 2
        assert told in capfd.readouterr().err
    assert (tmp_path / "full/notes").read_text() == "mine"


def test_a_folder_that_takes_no_file_is_named(text: Path, tmp_path: Path, capfd: Any) -> None:
    """A path so long that a folder still fits and a file in it does not: nobody can write there."""
    folder = tmp_path
    while len(os.fsencode(folder)) < 4095 - 20:
        folder /= "x" * min(200, 4095 - 10 - len(os.fsencode(folder)))
    assert export(text, "trl", folder) == 2
    assert "--output: cannot write in " in capfd.readouterr().err


def test_nothing_is_left_of_an_export_of_no_selection(text: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = [str(text), "--selection", "none", "--for", "trl", "--output", str(tmp_path / "new/folder")]
    assert guarded(app, ["export", *arguments]) == 2
    assert "selection: got 'none'" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["my data", "a: b #c"])
def test_the_page_names_any_folder(text: Path, tmp_path: Path, name: str, capfd: Any) -> None:
    for trainer in ("trl", "axolotl", "openrlhf"):
        folder = tmp_path / trainer / name
        assert export(text, trainer, folder) == 0
        page = (folder / "README.md").read_text()
        block = page.split("```")[1]
        assert block.partition("\n")[2].strip() in capfd.readouterr().out
        if trainer == "trl":
            assert f'load_dataset("{folder}"' in block
        elif trainer == "axolotl":
            assert yaml.safe_load(block.removeprefix("yaml"))["datasets"][0]["path"] == str(folder)
        else:
            assert f"{folder}/train.parquet" in shlex.split(block.removeprefix("bash").replace("\\\n", ""))


def test_nothing_is_written_of_a_selection_that_a_trainer_cannot_hold_at_all(tmp_path: Path, local_ray: None) -> None:
    workspace = prefsel.open(made(tmp_path, {"calls": with_calls(5)}))
    with pytest.raises(UserError, match="no pair is left to write: 5 × a message with tools"):
        write_folder(workspace, "all-of-it", "axolotl", str(tmp_path / "out"), leave_out=True)
