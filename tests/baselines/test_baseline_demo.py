"""The demo measures what it measured: minutes, so only among the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import Golden, machine

STANDARD_ERRORS = 4


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The gold table of the demo of seed 0, made in a new workspace by the command a newcomer types."""
    workspace = tmp_path_factory.mktemp("demo")
    command = [str(Path(sys.executable).with_name("prefsel")), "demo", "--workspace", str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((workspace / "demo-table-demo-0.json").read_text())


@pytest.mark.slow
def test_the_demo_measures_the_same_gold(table: dict[str, Any], golden: Callable[[str], Golden]) -> None:
    """Every number to a relative 1e-9 where torch and the processor are those that recorded.

    Elsewhere models made on the spot round differently, sample other responses, and so make another corpus: there a
    mean must lie within four of its recorded standard errors.
    """
    if golden("demo").entry("machine", machine()) == machine():
        golden("demo").check("gold", by_model(table), rel=1e-9)
        return
    found, recorded = by_model(table), golden("demo").entry("gold", by_model(table))
    assert list(found) == list(recorded)
    for model, numbers in recorded.items():
        near = pytest.approx(numbers["gold T=1"], abs=STANDARD_ERRORS * numbers["gold T=1 ±"])
        assert found[model]["gold T=1"] == near, model


def by_model(table: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rows by model, the cells by column; an error is called after the column before it."""
    names = table["columns"]
    columns = [f"{names[n - 1]} ±" if name == "±" else name for n, name in enumerate(names)]
    return {row[0]: dict(zip(columns[1:], row[1:])) for row in table["rows"]}
