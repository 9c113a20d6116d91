"""Whole trainings of tiny models, by either objective: what the tests that hold for both of them run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_policy import naive_logps
from tiny_rewards import naive_reward
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefsel.train.data import TrainingPairs
from prefsel.train.draws import every_pair_once
from prefsel.train.loop import train
from prefsel.train.objective import Objective
from prefsel.train.preference import Preference
from prefsel.train.reward import BradleyTerry
from prefsel.train.run_config import DpoConfig, RewardConfig

COMMON: dict[str, Any] = {
    "learning_rate": 3e-3,
    "dtype": "fp32",
    "num_epochs": 2,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "zero_stage": 0,
    "warmup_ratio": 0.2,
}
# 22 pairs in batches of 8: 8 + 8 + 6 per epoch, so every run here has an incomplete batch.
POLICY = {**COMMON, "policy_is_reference": True, "max_length": 128, "beta": 0.5, "token_budget": 128}
# 26 of 28 pairs are trained on: 8 + 8 + 8 + 2 per epoch.
REWARD = {
    **COMMON,
    "max_length": 64,
    "token_budget": 96,
    "length_balance_tau": 1.0,
    "length_penalty_rho": 0.05,
    "holdout": 0.1,
}


def preference(**options: Any) -> Preference:
    return Preference(DpoConfig.model_validate({**POLICY, **options}))


def bradley_terry(**options: Any) -> BradleyTerry:
    return BradleyTerry(RewardConfig.model_validate({**REWARD, **options}))


def dpo_loss(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    ratios = chosen - row["reference_logps_chosen"], rejected - row["reference_logps_rejected"]
    return -F.logsigmoid(POLICY["beta"] * (ratios[0] - ratios[1]))


def reward_loss(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    # One token a word, and an end-of-turn each.
    words = [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")]
    return -F.logsigmoid(chosen - rejected - REWARD["length_penalty_rho"] * (words[0] - words[1]))


@dataclass(frozen=True)
class Case:
    """One objective with a start and pairs, and what a textbook would do with them."""

    objective: Callable[..., Objective]
    model_dir: Path
    table: pa.Table
    held_out: pa.Table | None
    auto_class: Any
    output: Callable[..., torch.Tensor]
    """(model, tokenizer, prompt, completion) → the number that is learnt from, of one unpadded sequence."""
    loss: Callable[..., torch.Tensor]
    """(row, output of chosen, output of rejected) → loss."""
    unchecked: dict[str, Any]
    """Options under which any model and a single pair may be trained on."""

    def run(
        self,
        output_dir: Path,
        *,
        table: pa.Table | None = None,
        model_dir: Path | None = None,
        report: Any = None,
        resume_dir: Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        return train(
            self.objective(**options),
            TrainingPairs.from_table(self.table if table is None else table),
            None if self.held_out is None else TrainingPairs.from_table(self.held_out),
            model_dir=self.model_dir if model_dir is None else model_dir,
            output_dir=output_dir,
            report=report or (lambda record, checkpoint_dir: None),
            resume_dir=resume_dir,
        )


def policy_case(model_dir: Path, table: pa.Table, held_out: pa.Table) -> Case:
    unchecked = {"policy_is_reference": False}
    return Case(preference, model_dir, table, held_out, AutoModelForCausalLM, naive_logps, dpo_loss, unchecked)


def reward_case(model_dir: Path, table: pa.Table) -> Case:
    auto_class = AutoModelForSequenceClassification
    return Case(bradley_terry, model_dir, table, None, auto_class, naive_reward, reward_loss, {"holdout": 0.0})


def first_epoch(num_pairs: int = 22) -> list[np.ndarray]:
    """The batches of 8 in which a shuffled epoch visits the pairs."""
    order = every_pair_once(np.arange(num_pairs), seed=0, is_shuffled=True).of_epoch(0)
    return [order[start : start + 8] for start in range(0, num_pairs, 8)]


def steps(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in result["history"] if record["event"] == "step"]


def losses(result: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in steps(result)]


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["model_dir"]) / "model.safetensors")


def assert_same_weights(got: dict[str, Any], want: dict[str, Any], *, atol: float = 0.0) -> None:
    there, expected = weights(got), weights(want)
    assert there.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=atol, msg=name)


def assert_same_history(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for got_record, want_record in zip(got, want, strict=True):
        assert got_record["event"] == want_record["event"]
        numbers = [
            {k: v for k, v in record.items() if isinstance(v, int | float)} for record in (got_record, want_record)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-5)
        # Of every held-out pair, whichever worker saw it.
        assert ("margins" in got_record) == ("margins" in want_record)
        assert got_record.get("margins", []) == pytest.approx(want_record.get("margins", []), rel=1e-4, abs=2e-5)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))
