"""Rounds that are evaluated as they are played, and end when no reward rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_policies

from prefsel.config.file import parse_config
from prefsel.pipeline import run
from prefsel.progress import Progress

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

GOODS = {"kind": "function", "name": "goods", "function": "counting_judges:goods", "pool": {"size": 1}}
GENERATION = {
    **{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "max_repetition": None},
    **{"prompts_per_shard": 16, "pool": {"size": 1}},
}


class Told(Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def arm(**more: Any) -> dict[str, Any]:
    return {
        "name": "arm",
        "policy": "base",
        "rounds": 3,
        "generation": {**GENERATION, "samples": 4},
        "judges": [GOODS],
        "metric": {"metric": "explicit_margin"},
        "train": {
            **{"learning_rate": 1e-2, "dtype": "fp32", "global_batch_pairs": 4},
            **{"micro_batch_pairs": 4, "max_steps": 1},
        },
        **more,
    }


def test_rounds_are_compared_with_the_first_policy_and_end_early(tmp_path: Path) -> None:
    corpus = tiny_policies.save_prompts(tmp_path / "pairs.jsonl", 40)
    base = tiny_policies.save_policy(tmp_path / "base")
    table = {
        "name": "rounds",
        "sources": [{"name": "s", "paths": [str(corpus)]}],
        "split": {"holdout": 0.5},
        "models": [{"name": "base", "path": str(base), "dtype": "fp32"}],
        "selfplay": [arm(stop={"judge": "goods", "min_gain": 100.0})],
        "evaluate": {"generation": {**GENERATION, "samples": 1}, "judges": [GOODS], "resamples": 100},
    }
    told = Told()
    outcome = run(parse_config(table), str(tmp_path / "w"), told)
    found = {report.name: report for report in outcome.reports if report.stage == "evaluate"}
    assert list(found) == ["base", "arm-1"]
    assert [one.name for one in outcome.made] == ["arm-1"]
    (ended,) = [line for line in told.lines if line.startswith("selfplay")]
    assert ended.startswith("selfplay  arm: ended after round 1 of 3: the mean reward by goods changed by ")
    assert found["arm-1"].details["baseline"] == "base"
    (warning,) = found["arm-1"].details["warnings"]
    assert "'goods' also chose what the model was trained on (goods)" in warning
    assert found["base"].details["warnings"] == []
    assert not run(parse_config(table), str(tmp_path / "w"), Progress(quiet=True)).is_new
