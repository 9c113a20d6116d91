"""What the documentation shows is run: configurations, rules, code, the notebook, and what is written from the code."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
import yaml

from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.config.losses import LOSSES
from prefsel.ingest.formats import FORMATS
from prefsel.metrics import METRICS
from prefsel.plan.config_schema import full_schema
from prefsel.rules import RULES
from prefsel.select import select_table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def module(path: Path) -> ModuleType:
    """A script that is part of no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# ------------------------------------------------------------------------------------ written from code and results


def test_the_configuration_page_is_what_the_schema_says() -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == module(DOCS / "tools/reference.py").reference(), "run `make docs` and commit the page"


def test_the_configuration_page_has_every_key() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    schema = full_schema()
    for record in (schema, *schema["$defs"].values()):
        for key in record.get("properties", {}):
            assert f"`{key}`" in page
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    assert len(headings) == len(set(headings))  # every anchor means one section


@pytest.mark.parametrize("name", ["performance.md", "selfplay.md"])
def test_the_pages_have_the_newest_results(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == module(ROOT / "benchmarks/table.py").page(name), "run `python benchmarks/table.py --write`"


def test_every_format_has_its_row() -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS.builtin if f"`{name}`" not in page] == []


def test_every_method_is_described() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for name in METRICS:
        assert f"\n## {name}\n" in page
        assert f"[`{name}`](#{name})" in page
    rules = page.split("\n## rules\n")[1].split("\n## ")[0]
    assert {name for name in RULES if f"kind: {name}," in rules} == set(RULES) - {"random"}
    losses = page.split("\n## losses\n")[1].split("\n## ")[0]
    assert set(LOSSES) == {name for name in LOSSES if f"`{name}`" in losses}


# --------------------------------------------------------------------------------------------------------- examples


def example_table() -> pa.Table:
    """The table at the head of the page on rules."""
    lines = (DOCS / "selecting.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| p(air_id|\d) ", line)
    ]
    head, *pairs = rows
    numbers = [name for name in head if name.startswith(("num_tokens", "score"))]
    columns = {name: [pair[place] for pair in pairs] for place, name in enumerate(head)}
    return pa.table(
        {name: [float(x) if x else None for x in xs] if name in numbers else xs for name, xs in columns.items()}
    )


EXAMPLES = re.findall(
    r"```yaml\n(.*?)```\n\nKeeps ([p\d, ]+)[:.]", (DOCS / "selecting.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_every_rule_has_an_example() -> None:
    assert len(EXAMPLES) == len(blocks(DOCS / "selecting.md", "yaml"))
    assert {yaml.safe_load(rule)["kind"] for rule, _ in EXAMPLES} == set(RULES)


@pytest.mark.parametrize(("rule", "keeps"), EXAMPLES)
def test_a_rule_keeps_what_the_page_says(rule: str, keeps: str) -> None:
    table = example_table()
    kept = table["pair_id"].take(pa.array(select_table(table, yaml.safe_load(rule)))).to_pylist()
    assert kept == keeps.split(", ")


def test_the_notebook_gives_what_it_shows() -> None:
    command = [sys.executable, str(DOCS / "tools/notebook.py"), str(DOCS / "notebook.ipynb"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) > 8


def test_a_notebook_that_changed_is_told_apart(tmp_path: Path) -> None:
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    cell = {"id": "a", "cell_type": "code", "metadata": {}, "source": ["print(1 + 1)"], "execution_count": 1}
    stored = {"output_type": "stream", "name": "stdout", "text": ["3\n"]}
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({**notebook, "cells": [{**cell, "outputs": [stored]}]}))
    command = [sys.executable, str(DOCS / "tools/notebook.py"), str(file), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, "+[1] 2" in found.stderr) == (1, True)


# -------------------------------------------------------------------------------------------------- getting started


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the corpus that the page on getting started makes."""
    monkeypatch.chdir(tmp_path)
    (make,) = (block for block in blocks(DOCS / "getting-started.md", "bash") if "pairs.jsonl" in block)
    python = make.removeprefix("python - <<'END'\n").removesuffix("END\n")
    subprocess.run([sys.executable, "-c", python], check=True)
    return tmp_path


def timeless(text: str) -> list[str]:
    """The lines of a run without times, what is slowest, fingerprints and where the workspace lies, which vary."""
    lines = [line for line in text.splitlines() if not re.search(r"… \d:\d\d:\d\d$", line)]  # still at it
    for pattern in (
        r"; [\d.]+ s$",
        r"\d:\d\d:\d\d",
        r"(?<=^  seconds   ).*",
        r"(?<=@)[0-9a-f]{16}",
        r"\S*(?=/W/reports/)",
        r"(?<=/W/reports/own-)[\w-]+",
    ):
        lines = [re.sub(pattern, "", line) for line in lines]
    return lines


@pytest.mark.usefixtures("local_ray")
def test_getting_started_says_what_a_run_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, _ = blocks(DOCS / "getting-started.md", "yaml")
    (here / "own.yaml").write_text(own)
    assert guarded(app, ["run", "own.yaml", "--workspace", "W"]) == 0
    printed = timeless(capsys.readouterr().out)
    (shown,) = blocks(DOCS / "getting-started.md", "text")
    assert printed == timeless(shown)
    (python,) = blocks(DOCS / "getting-started.md", "python")
    exec(python, {})
    assert re.match(r"19 \d+\.\d+ Look at", capsys.readouterr().out)
    assert guarded(app, ["run", "own.yaml", "--workspace", "W"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_configurations_of_the_pages_fit_the_data(here: Path) -> None:
    from prefsel.plan.check import check
    from prefsel.workspace.storage import Storage

    for table in map(yaml.safe_load, blocks(DOCS / "getting-started.md", "yaml")):
        check(parse_config(table), Storage(str(here / "W")))
    (shell,) = (block for block in blocks(ROOT / "README.md", "bash") if "own.yaml" in block)
    check(parse_config(yaml.safe_load(shell.split("<<'END'\n")[1].split("END\n")[0])), Storage(str(here / "W")))


# ----------------------------------------------------------------------------------------------------- the workshop


def test_pre_commit_has_the_checks_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    hooked = [" ".join([hook["entry"], *hook.get("args", [])]) for hook in hooks]
    recipe = (ROOT / "Makefile").read_text().split("\ncheck: ")[1].split("\n\n")[0].splitlines()[1:]
    assert hooked == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe]


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90
