"""What the documentation shows is run: configurations, rules, code, the notebook, and what is written from the code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import yaml
from jsonschema import Draft202012Validator

from prefsel.cli import app, guarded
from prefsel.config import FormatOptions
from prefsel.config.file import parse_config
from prefsel.config.losses import LOSSES
from prefsel.ingest.example import RowError
from prefsel.metrics import METRICS, score_table
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


def test_the_performance_page_has_the_newest_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert page == module(ROOT / "benchmarks/table.py").page(), "run `python benchmarks/table.py --write`"


def test_every_method_is_described() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for name in METRICS:
        assert f"\n## {name}\n" in page
        assert f"[`{name}`](#{name})" in page
    rules = page.split("\n## rules\n")[1].split("\n## ")[0]
    assert {name for name in RULES if f"kind: {name}," in rules} == set(RULES) - {"random"}
    losses = page.split("\n## losses\n")[1].split("\n## ")[0]
    assert set(LOSSES) - {"weighted_dfpo"} == {name for name in LOSSES if f"`{name}`" in losses}


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


@pytest.mark.usefixtures("local_ray")
def test_getting_started_says_what_a_run_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, _ = blocks(DOCS / "getting-started.md", "yaml")
    (here / "own.yaml").write_text(own)
    assert guarded(app, ["run", "own.yaml", "--workspace", "W"]) == 0
    printed = [re.sub(r"; [\d.]+ s$", "", line) for line in capsys.readouterr().out.splitlines()]
    (shown,) = blocks(DOCS / "getting-started.md", "text")
    assert printed[:-1] == [re.sub(r"; [\d.]+ s$", "", line) for line in shown.splitlines()][:-1]
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


# -------------------------------------------------------------------------------------------------------- extending


@pytest.fixture
def extending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports the page's Python example that begins so, as the module it would be."""

    def imported(beginning: str) -> ModuleType:
        (code,) = (block for block in blocks(DOCS / "extending.md", "python") if block.startswith(beginning))
        (tmp_path / "example_of_extending.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "example_of_extending", raising=False)
        return importlib.import_module("example_of_extending")

    return imported


def test_the_metric_of_the_page_scores(extending: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    metric = extending('"""Brevity').METRIC
    monkeypatch.setitem(METRICS, metric.name, metric)
    table = pa.table({"num_tokens_m_chosen": [3, 8, None], "num_tokens_m_rejected": [5, 2, 1]})
    np.testing.assert_array_equal(score_table(table, "brevity", policy="m"), [2.0, -6.0, np.nan])
    properties = full_schema()["$defs"]["Brevity"]["properties"]
    assert properties["policy"]["description"] == (
        "Name of the model whose tokens are counted: reads `num_tokens_<policy>_chosen|rejected`."
    )


def test_the_format_of_the_page_reads(extending: Callable[[str], ModuleType]) -> None:
    adapt = extending("from prefsel.ingest.example").adapt_thumbs
    example = adapt({"question": "why?", "up": "because", "down": "no"}, FormatOptions())
    assert example.prompt == [{"role": "user", "content": "why?"}]
    assert [one.messages[0]["content"] for one in example.completions] == ["because", "no"]
    assert [(one.chosen, one.rejected) for one in example.preferences] == [(0, 1)]
    with pytest.raises(RowError, match="missing_field"):
        adapt({"question": "why?", "up": "because"}, FormatOptions())


def test_the_imported_score_of_the_page_is_valid() -> None:
    (text,) = blocks(DOCS / "extending.md", "yaml")
    table = {"name": "x", "sources": [{"name": "a", "paths": ["a"]}], **yaml.safe_load(text)}
    assert [error.message for error in Draft202012Validator(full_schema()).iter_errors(table)] == []


# ----------------------------------------------------------------------------------------------------- the workshop


def test_pre_commit_has_the_checks_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    hooked = [" ".join([hook["entry"], *hook.get("args", [])]) for hook in hooks]
    recipe = (ROOT / "Makefile").read_text().split("\ncheck: ")[1].split("\n\n")[0].splitlines()[1:]
    assert hooked == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe]


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90
