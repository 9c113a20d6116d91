"""The table of docs/methods.md: every arm fits one corpus and one split, and gold labels nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from prefsel.config import FormatOptions
from prefsel.config.file import parse_config
from prefsel.ingest.formats import FORMATS
from prefsel.plan.check import check
from prefsel.workspace.storage import Storage
from prefsel.world.gold import gold
from prefsel.world.labels import corpus_row, write_jsonl

TOOL = Path(__file__).resolve().parents[2] / "docs/tools/methods.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", TOOL)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_arm_fits_and_shares_corpus_and_split(tool: ModuleType, small_world: Any, tmp_path: Path) -> None:
    configs = [parse_config(table) for table in tool.configurations(small_world.inputs)]
    for config in configs:
        check(config, Storage(str(tmp_path)))
    assert len({config.name for config in configs}) == len(configs) == len(tool.ARMS) + 2
    (labels,) = [config for config in configs if config.sources[0].paths == [str(small_world.inputs.proxies)]]
    configs.remove(labels)
    assert len({(*config.sources[0].paths, config.split, config.ingest.rows_per_shard) for config in configs}) == 1
    trained = {spec.name for config in configs for spec in tool.finals(config)}
    assert {tool.RANDOM, "dpo-rand-correct", "dpo-all", "dpo-avg", "dpo-lossdiff-irm30-random"} <= trained


def test_gold_is_beside_the_labels_and_moves_none(tool: ModuleType, tmp_path: Path) -> None:
    rng, adapt = np.random.default_rng(0), FORMATS["ultrafeedback"].adapt
    said = ["the lamp is warm .", "sure . the lamp is loud perhaps .", "thanks . the engine is steep .", "bye ."]
    given = [corpus_row(rng, prompt, said) for prompt in ("tell me about lamp", "tell me about lamp and engine")]
    write_jsonl(tmp_path / "corpus.jsonl", given)
    told = [json.loads(line) for line in tool.with_gold(tmp_path / "corpus.jsonl").read_text().splitlines()]
    for before, after in zip(given, told, strict=True):
        for options in (FormatOptions(), FormatOptions(label="mean", relabel=True)):
            assert adapt(before, options).preferences == adapt(after, options).preferences
        assert [one["fine-grained_score"] for one in after["completions"]] == [
            gold(after["instruction"], response) for response in said
        ]


def test_a_line_compares_with_random_over_the_same_prompts(tool: ModuleType) -> None:
    """Random 1 2 3 4, another 2 4 4 6: differences 1 2 1 2, mean 1.5 ± √(1/12); untrained −1: −3.5 ± √(5/12)."""
    greedy = {"mean": 5.0, "per_prompt": [5.0, 5.0, 5.0, 5.0]}
    made = {
        "dpo-rand30": {"pairs": 7, "gold": [{"mean": 2.5, "per_prompt": [1, 2, 3, 4]}, greedy], "cost": None},
        "untrained": {"pairs": 0, "gold": [{"mean": -1.0, "per_prompt": [-1.0] * 4}, greedy]},
        "dpo-b30": {"pairs": 1335, "gold": [{"mean": 4.0, "per_prompt": [2, 4, 4, 6]}, greedy], "cost": [2.9, 6.31]},
    }
    assert tool.rows(made) == [
        "| `rand30` | 7 | 2.50 | – | 5.00 | – | – | – |",
        "| `untrained` | 0 | −1.00 | −3.50 ± 0.65 | 5.00 | +0.00 ± 0.00 | – | – |",
        "| `b30` | 1,335 | 4.00 | +1.50 ± 0.29 | 5.00 | +0.00 ± 0.00 | 2.9 | 6.3 |",
    ]
