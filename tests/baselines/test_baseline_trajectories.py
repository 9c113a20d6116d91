"""Every training takes the steps it took: loss, gradient norm, learning rate and order of the pairs, step by step.

Two-layer models on one CPU thread. Right and wrong are decided elsewhere, against textbook loops; this is the net under
merging the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import pytest
import tiny_llama
import torch
from adapters import train_policy, train_reward_model, train_scratch_policy, train_scratch_reward
from golden import Golden, machine
from safetensors.torch import load_file

# 22 pairs in batches of 8: 8 + 8 + 6 per epoch, so every run has an incomplete batch.
SHARED: dict[str, Any] = {
    "learning_rate": 3e-3,
    "dtype": "fp32",
    "num_epochs": 3,
    "max_steps": 8,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 8,
    "token_budget": 8192,
    "zero_stage": 0,
    "warmup_ratio": 0.2,
}
POLICY = {**SHARED, "beta": 0.5, "reference_check_pairs": 0}
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
POLICIES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "accumulated": {"micro_batch_pairs": 3, "token_budget": 128, "zero_stage": 2},
    "lora": {"lora": LORA, "learning_rate": 3e-2},
    "every option": {
        **{"seed": 5, "weight_decay": 0.1, "adam_betas": (0.8, 0.95), "adam_eps": 1e-6, "max_grad_norm": 0.3},
        **{"min_lr_ratio": 0.2, "warmup_ratio": 0.4, "label_smoothing": 0.1, "gradient_checkpointing": True},
        "eval_every_steps": 3,
    },
    "by score": {"order": "score"},
    "as given": {"order": "given", "max_steps": 4},
    "robust_dpo": {"loss": "robust_dpo", "label_smoothing": 0.2, "max_steps": 4},
    "ipo": {"loss": "ipo", "max_steps": 4},
    "ipo per token": {"loss": "ipo", "ipo_reduction": "mean", "max_steps": 4},
    "hinge": {"loss": "hinge", "max_steps": 4},
    "simpo": {"loss": "simpo", "simpo_gamma": 0.4, "max_steps": 4},
    "length_normalised_dpo": {"loss": "length_normalised_dpo", "max_steps": 4},
    "dfpo": {"loss": "dfpo", "num_aspects": 4, "divergence": "pd", "max_steps": 4},
    "weighted_dfpo": {
        **{"loss": "weighted_dfpo", "aspect_weights": {"honesty": 1.0, "helpfulness": 3.0}, "divergence": "pd"},
        "max_steps": 4,
    },
}
REWARD = {**SHARED, "length_balance_tau": 1.0, "length_penalty_rho": 0.05, "holdout": 0.2}
REWARDS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "accumulated": {"micro_batch_pairs": 3, "token_budget": 96, "zero_stage": 2},
    "as they come": {"length_balance_tau": None, "length_penalty_rho": 0.0, "seed": 2},
    "as given": {"length_balance_tau": None, "order": "given", "length_unit": "characters"},
}
STEP = ("step", "epoch", "consumed_pairs", "num_pairs", "num_tokens", "lr", "loss", "grad_norm")
SCRATCH = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": 64, "batch_tokens": 256, "lr": 3e-3}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("starts")
    return {
        kind: tiny_llama.save_llama(home / kind, is_classifier=kind == "classifier")
        for kind in ("policy", "classifier")
    }


@pytest.fixture(scope="module")
def rel(golden: Callable[[str], Golden]) -> float:
    """How far numbers may be apart: rounding where torch and the processor are those that recorded, else what another
    order of fp32 sums makes of eight steps of Adam."""
    return 1e-6 if golden("trajectories").entry("machine", machine()) == machine() else 1e-4


def trajectory(history: list[dict[str, Any]], model: Path) -> dict[str, Any]:
    """The steps as columns, the evaluations, and the size of every trained weight."""
    steps = [record for record in history if record["event"] == "step"]
    # Their means are recorded; single margins have tests of their own.
    evaluations = [
        {key: value for key, value in record.items() if key != "margins"}
        for record in history
        if record["event"] == "eval"
    ]
    weights = load_file(model / "model.safetensors")
    return {
        **{key: [record[key] for record in steps] for key in STEP},
        "evaluations": evaluations,
        "weights": {name: weight.double().norm().item() for name, weight in sorted(weights.items())},
    }


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_takes_the_same_steps(
    name: str, starts: dict[str, Path], rel: float, tmp_path: Path, golden: Callable[[str], Golden]
) -> None:
    options = POLICY | POLICIES[name]
    tables = tiny_llama.pairs("train", 22), tiny_llama.pairs("held out", 6)
    found = trajectory(*train_policy(options, *tables, model=starts["policy"], output=tmp_path))
    golden("trajectories").check(f"policy, {name}", found, rel=rel)


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_model_takes_the_same_steps(
    name: str, starts: dict[str, Path], rel: float, tmp_path: Path, golden: Callable[[str], Golden]
) -> None:
    found = trajectory(
        *train_reward_model(
            REWARD | REWARDS[name], tiny_llama.pairs("train", 28), model=starts["classifier"], output=tmp_path
        )
    )
    golden("trajectories").check(f"reward model, {name}", found, rel=rel)


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_scratch_policy_takes_the_same_steps(loss_on: str, rel: float, golden: Callable[[str], Golden]) -> None:
    torch.set_num_threads(1)
    talks = [talk(corpora.text("question", n), corpora.text("answer", n)) for n in range(24)]
    texts = [message["content"] for one in talks for message in one]
    losses = train_scratch_policy(texts, talks, steps=8, seed=3, loss_on=loss_on, **SCRATCH)
    golden("trajectories").check(f"scratch policy, loss on {loss_on}", losses, rel=rel)


def test_a_scratch_reward_model_takes_the_same_steps(rel: float, golden: Callable[[str], Golden]) -> None:
    torch.set_num_threads(1)
    pairs = []
    for n in range(30):
        prompt, longer = corpora.text("question", n), corpora.text("answer", n)
        pairs.append((talk(prompt, f"red {longer}"), talk(prompt, f"blue {longer}"), ("colour", "length")[n % 2]))
    texts = [message["content"] for chosen, rejected, _ in pairs for message in (*chosen, *rejected)]
    losses, accuracy = train_scratch_reward(
        texts, pairs, ["colour", "length"], union_head="overall", steps=8, seed=3, holdout=0.2, **SCRATCH
    )
    golden("trajectories").check("scratch reward model", {"loss": losses, "accuracy": accuracy}, rel=rel)
