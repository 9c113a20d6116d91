"""Whatever a user gives besides files of rows: it is taken, or one message of bounded length says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_inputs import BASE, GLOBS, OVERRIDES, PLACES, model_files, rules, tables, yaml_texts

from prefsel import display
from prefsel.cli import app, guarded
from prefsel.config.file import apply_override, load_config, parse_config
from prefsel.errors import PrefselError, UserError
from prefsel.ingest.readers import list_files, read_rows
from prefsel.rules import parse_rule

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

MAX_S = 20.0
"""Of one input: many times what any takes, for busy machines."""


def taken(call: Callable[[], object]) -> bool:
    """Whether an input is valid; where not, its error is one readable message of the user's."""
    began = time.monotonic()
    refused: PrefselError | None = None
    try:
        call()
    except PrefselError as error:
        refused = error
    assert time.monotonic() - began < MAX_S
    if refused is None:
        return True
    told = display.message(str(refused))
    assert refused.exit_code in (1, 2)
    assert 0 < len(told) <= display.MAX_MESSAGE
    assert all(c.isprintable() or c in "\n\t" for c in told)
    return False


def each(inputs: list[tuple[str, Any]], call: Callable[[Any], object]) -> list[str]:
    """The names of the inputs that were valid."""
    valid = []
    for name, one in inputs:
        try:
            valid += [name] if taken(lambda one=one: call(one)) else []
        except BaseException as error:
            error.add_note(f"input: {name[:100]!a}")
            raise
    return valid


def test_tables() -> None:
    made = list(tables())
    assert len(made) > 1_000
    assert len(each(made, parse_config)) < len(made) / 2


def test_yaml(tmp_path: Path) -> None:
    made = list(yaml_texts())

    def read(text: str | bytes) -> None:
        (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        load_config(tmp_path / "c.yaml")

    assert each(made, read) == []

    def as_base(text: str | bytes) -> None:
        (tmp_path / "base.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "c.yaml").write_text("base: base.yaml\n" + json.dumps(BASE)[1:-1].replace("}], ", "}]\n"))
        load_config(tmp_path / "c.yaml")

    each(made, as_base)


def test_overrides() -> None:
    def override(text: str) -> None:
        table = copy.deepcopy(BASE)
        apply_override(table, text)
        parse_config(table)

    assert each([(one, one) for one in OVERRIDES], override) == []


def test_rules() -> None:
    valid = each(list(rules()), parse_rule)
    assert not [name for name in valid if name.startswith(("deep", "itself", "value", "kind"))]


@pytest.fixture
def odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("circle", "circle")
    os.symlink("nothing", "dangling")
    Path("c.yaml").write_text(json.dumps(BASE))
    return tmp_path


@pytest.mark.usefixtures("odd_folder")
def test_sources() -> None:
    def read(place: str) -> None:
        for file in list_files(place):
            for _ in read_rows(file, max_row_bytes=1 << 20):
                pass

    assert each([(one, one) for one in (*PLACES, *GLOBS)], read) == []


def test_odd_names_below_a_folder(odd_folder: Path) -> None:
    """A name that is not UTF-8, links that lead round, a folder that is called like a file, a pipe."""
    folder = odd_folder / "in"
    (folder / "x.jsonl").mkdir(parents=True)
    (folder / "x.jsonl" / "a.jsonl").write_text("{}\n")
    os.symlink(".", folder / "one")
    os.symlink(".", folder / "two")
    os.symlink("..", folder / "x.jsonl" / "up")
    os.mkfifo(folder / "pipe.jsonl")
    assert list_files(str(folder)) == [f"{folder}/x.jsonl/a.jsonl"]
    assert list_files(f"{folder}/**/*.jsonl") == [f"{folder}/x.jsonl/a.jsonl"]
    (odd_folder / "bytes").mkdir()
    Path(os.fsdecode(os.fsencode(odd_folder / "bytes") + b"/\xff.jsonl")).write_text("{}\n")
    with pytest.raises(UserError, match=r"holds a name that is not UTF-8: b'\\xff\.jsonl'"):
        list_files(str(odd_folder / "bytes"))


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "status": lambda place: ["status", place],
    "verify": lambda place: ["verify", "--workspace", place],
    "explain": lambda place: ["explain", "ab", "--workspace", place],
    "export": lambda place: ["export", place],
    "answers": lambda place: ["answers", place, "m", "--output", "o", "--for", "alpaca_eval"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("odd_folder")
def test_workspaces(command: str) -> None:
    for place in PLACES:
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = guarded(app, COMMANDS[command](place))
        assert code in (1, 2), ascii(place[:80])
        assert told.getvalue().startswith("prefsel: ")
        assert len(told.getvalue()) <= display.MAX_MESSAGE + len("prefsel: \n")


@pytest.mark.parametrize("place", ["folder-as-config", "folder-as-catalog", "alias-as-config"])
def test_workspaces_that_hold_something_else(odd_folder: Path, place: str) -> None:
    kind, _, file = place.partition("-as-")
    target = odd_folder / "w" / {"config": "config.yaml", "catalog": "catalog.json"}[file]
    target.parent.mkdir()
    target.mkdir() if kind == "folder" else target.write_text("&a [*a]")
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = guarded(app, ["status", "w"])
    assert code == 2
    assert told.getvalue().startswith("prefsel: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import bpe_tokenizer, tiny_causal

    folder = tmp_path_factory.mktemp("model")
    for made in (tiny_causal(), bpe_tokenizer()):
        made.save_pretrained(folder)
    return folder


def test_model_folders(model: Path, tmp_path: Path) -> None:
    import shutil

    from prefsel.models.directory import model_identity
    from prefsel.models.loading import load_causal, load_tokenizer

    def load(change: tuple[str, bytes, int]) -> None:
        file, data, number = change
        folder = tmp_path / str(number)
        shutil.copytree(model, folder)
        if file == "config.json" and data.startswith(b'{"'):
            data = json.dumps(json.loads((model / file).read_text()) | json.loads(data)).encode()
        if file == "model.safetensors.index.json":  # read only where the weights lie in several files
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / file).write_bytes(data)
        model_identity(str(folder))
        load_tokenizer(str(folder))
        load_causal(str(folder), dtype="fp32", device="cpu")

    made = [(name, (file, data, number)) for number, (name, file, data) in enumerate(model_files())]
    assert each(made, load) == []
    assert taken(lambda: load(("README.md", b"", len(made))))


def test_there_are_many() -> None:
    counts = [len(list(one)) for one in (tables(), yaml_texts(), rules(), model_files(), PLACES, GLOBS, OVERRIDES)]
    assert sum(counts) > 1_500
