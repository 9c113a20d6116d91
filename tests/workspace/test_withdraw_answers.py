"""A prompt that models answered is taken back: its answers, numbers, pairs and pages go, and no model runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from showing import showing
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config.file import parse_config
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.withdraw.found import find
from prefsel.withdraw.keys import Asked
from prefsel.withdraw.removal import withdraw
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

QUIET = Progress(quiet=True)
GENERATION = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "prompts_per_shard": 2}
JUDGE = {"kind": "reward_model", "model": "reward"}
TRAIN = {"learning_rate": 1e-3, "dtype": "fp32", "global_batch_pairs": 2, "max_steps": 2}


def noisy(policy: str, folder: Path) -> str:
    """A policy with noise in its weights."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.02 * torch.randn_like(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


def configuration(small_world: Any, weak: str) -> Any:
    """An arm that trains on pairs by a judge, and one of answers of two models beside each other."""
    inputs = small_world.inputs
    model = {"kind": "pretrained", "dtype": "fp32"}
    arm = {"policy": "policy", "generation": GENERATION, "judges": [JUDGE], "judge": "overall"}
    beside = {"name": "delta", "judges": [], "judge": None, "beside": ["weak"], "metric": {"metric": "random"}}
    beside["pairs"] = {"kind": "by_generator", "strong": "$policy", "weak": "weak", "max_length_difference": None}
    return parse_config(
        {
            "name": "withdraw",
            "sources": [{"name": "world", "paths": [str(inputs.corpus)], "format": "ultrafeedback"}],
            "ingest": {"rows_per_shard": 3, "max_quarantine_fraction": 0.5},
            "models": [
                {**model, "name": "policy", "path": str(inputs.policy)},
                {**model, "name": "weak", "path": weak},
                {**model, "name": "reward", "path": str(inputs.reward_model)},
            ],
            "selfplay": [arm | {"name": "best", "train": TRAIN}, arm | beside],
        }
    )


def test_answers_of_a_prompt_go_and_no_other_is_made_again(small_world: Any, tmp_path: Path) -> None:
    weak = noisy(str(small_world.inputs.policy), tmp_path / "weak")
    config, storage = configuration(small_world, weak), Storage(str(tmp_path / "w"))
    run(config, storage.uri, QUIET)
    made = next(
        name for name in storage.files("pairs", recursive=True) if "best" in name.split("@")[0] and ".parquet" in name
    )
    prompt = pq.read_table(storage.full(made))["prompt_id"][0].as_py()
    ids = [prompt]
    for name in storage.files("groups", recursive=True):
        for row in pq.read_table(storage.full(name)).to_pylist() if name.endswith(".parquet") else ():
            if row["prompt_id"] == prompt:
                ids += [one["completion_id"] for one in row["completions"]]
    kinds = {name.split("/")[0] for name in showing(storage, ids)}
    assert kinds >= {"groups", "pairs", "columns", "prompts", "selections"}
    record = find(storage, Asked(prompts=frozenset([prompt])), "")
    assert record is not None
    withdraw(storage, record)
    assert showing(storage, ids) == set()
    assert verify(storage).findings == []
    outcome = run(config, storage.uri, QUIET)
    for one in outcome.made:
        for report in one.reports:
            assert report.rows_in == report.rows_out + sum(report.dropped.values())
            if report.stage in ("prompts", "generate", "score", "pair"):
                assert report.computed_shards == 0, report
    assert showing(storage, ids) == set()
    assert verify(storage).is_clean
