"""The printed schema describes every key, accepts what is shipped and refuses what a run would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from prefsel.metrics import METRICS
from prefsel.plan.config_schema import full_schema
from prefsel.rules import RULES

CONFIGS = sorted((Path(__file__).parents[2] / "jobs/configs").rglob("*.yaml"))
FILE: dict[str, Any] = {"name": "x", "sources": [{"name": "a", "paths": ["a.jsonl"]}]}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = full_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def fields(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every property of every record in a schema, with its path; conditions (`if`) name properties and define none."""
    if isinstance(node, dict):
        for name, field in node.get("properties", {}).items():
            yield f"{path}.{name}", field
        for key, below in node.items():
            if key not in ("if", "then"):
                yield from fields(below, f"{path}/{key}")
    elif isinstance(node, list):
        for below in node:
            yield from fields(below, path)


def test_every_field_says_what_it_means() -> None:
    found = dict(fields(full_schema()))
    assert len(found) > 250  # the walk reaches the records: 21 at the top, some 40 of a training alone
    assert [path for path, field in found.items() if not field.get("description", "").strip()] == []


def test_rules_and_metrics_are_part_of_it() -> None:
    found = dict(fields(full_schema()))
    for record in RULES.values():
        assert f"/$defs/{record.__name__}.kind" in found
    for metric in METRICS.values():
        for name in metric.params.model_fields:
            assert f"/$defs/{metric.params.__name__}.{name}" in found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configurations_are_valid(file: Path, validator: Draft202012Validator) -> None:
    table = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(table)] == []


def test_shipped_configurations_use_a_base() -> None:
    assert sum("base" in yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONFIGS) == 30


def selection(**rule: Any) -> dict[str, Any]:
    return {"selections": [{"name": "s", "rule": rule}]}


def metric(name: str, **params: Any) -> dict[str, Any]:
    return {"metrics": [{"name": "m", "metric": name, "params": params}]}


@pytest.mark.parametrize(
    "change",
    [
        selection(kind="quota", score="score_m", by="aspect", ratio=0.3),
        selection(kind="quota", score="score_m", by=["aspect", "source"], count=3),
        selection(kind="intersect", rules=[{"kind": "band", "score": "score_m", "low": 1, "high": 2}]),
        metric("random"),
        {"metrics": [{"name": "m", "metric": "random"}]},
        metric("less", tangent=["a", "b"]),
        {"train": [{"name": "t", "selection": "all", "model": "m", "reference": "m", "learning_rate": 1e-6}]},
        {"scorers": [{"kind": "imported", "name": "gold", "as": "ratings", "field": ["a", "b"]}]},
    ],
)
def test_it_accepts(change: dict[str, Any], validator: Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(FILE | change)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"trian": []},
        {"sources": []},
        {"sources": [{"name": "a", "paths": ["a"], "format": "hh"}]},
        selection(kind="tip", score="score_m", ratio=0.3),
        selection(kind="top", score="score_m", ratio=1.3),
        selection(kind="top", score="score_m", ratoi=0.3),
        selection(kind="quota", score="score_m", by=3, ratio=0.3),
        selection(kind="threshold", score="score_m", low="high"),
        selection(kind="agree", scores=["score_m"]),
        selection(kind="dedupe", by="prompt", rule={"kind": "top", "ratio": 0.3}),
        metric("explicit_margn", rm="x"),
        metric("explicit_margin", rmm="x"),
        metric("explicit_margin"),
        {"metrics": [{"name": "m", "metric": "explicit_margin"}]},
        {"scorers": [{"kind": "causal_logps", "modle": "policy"}]},
        {"train": [{"kind": "reward", "name": "t", "model": "m"}]},
    ],
)
def test_it_refuses(change: dict[str, Any], validator: Draft202012Validator) -> None:
    assert not validator.is_valid(FILE | change)


def test_what_a_base_may_hold_is_needed_without_one(validator: Draft202012Validator) -> None:
    assert validator.is_valid({"base": "other.yaml"})
    assert not validator.is_valid({"base": 3})
    assert not validator.is_valid({"name": "x"})
    assert not validator.is_valid({})
