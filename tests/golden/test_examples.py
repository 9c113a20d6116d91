"""The golden examples of this repository, beside the file they restate where that one lies next to the checkout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def values(item: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every number and string of a JSON value with its place in it; empty lists and objects count as values."""
    if isinstance(item, dict | list) and item:
        for key, inner in item.items() if isinstance(item, dict) else enumerate(item):
            yield from values(inner, f"{place}.{key}" if place else str(key))
    else:
        yield place, item


def test_an_example_holds_all_that_a_test_needs(golden: dict[str, dict]) -> None:
    for name, example in golden.items():
        assert list(example) == ["method", "inputs", "params", "expected", "atol"], name
        assert example["inputs"], name
        assert example["expected"], name
        assert 0 < example["atol"] <= 1e-5, name


def test_they_agree_with_the_file_they_restate(golden: dict[str, dict], shared: Path) -> None:
    restated = {row.pop("id"): row for row in json.loads((shared / "golden/golden.json").read_text())}
    assert dict(values(golden, "")) == dict(values(restated, ""))
