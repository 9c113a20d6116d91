"""What the pages say of Python is what the package installs on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/getting-started.md"])
def test_the_oldest_python_is_that_of_the_package(page: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=")
    named = re.findall(r"Python\s(?:≥ )?(3\.\d+)", (REPOSITORY / page).read_text(encoding="utf-8"))
    assert named
    assert set(named) == {oldest}
