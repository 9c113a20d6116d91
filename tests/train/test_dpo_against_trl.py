"""Loss and gradients of one batch against TRL's own trainer: other packing, other head, other loss code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import TinyRun
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.models.chat import Encoder
from prefsel.models.loading import load_causal
from prefsel.models.tree import pack
from prefsel.train.data import EncodedPairs, TrainingPairs, encode_pairs
from prefsel.train.export import Policy
from prefsel.train.losses import dpo_loss, preference_stats

trl = pytest.importorskip("trl")

BETA = 0.3


def trl_step(tiny_run: TinyRun, encoded: EncodedPairs, tmp_path: Path) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Loss, logged metrics and gradients of TRL's `DPOTrainer` on all pairs as one padded batch."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            loss_type=["sigmoid"],
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to=[],
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(tiny_run.train.select(["prompt", "chosen", "rejected"]).to_pylist()),
        processing_class=AutoTokenizer.from_pretrained(tiny_run.model_dir),
    )
    move_policy(trainer.model)
    pieces = [encoded.pieces(i) for i in range(len(encoded))]
    examples = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pieces]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(examples))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, {name: p.grad for name, p in trainer.model.named_parameters()}


def move_policy(model: torch.nn.Module) -> None:
    """The same step away from the reference on both sides, so that the margins are not all zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_loss_rewards_and_gradients_are_trls(tiny_run: TinyRun, tmp_path: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_run.model_dir), "auto", 128, "drop")
    encoded = encode_pairs(TrainingPairs.from_table(tiny_run.train), encoder)
    trl_loss, trl_metrics, trl_gradients = trl_step(tiny_run, encoded, tmp_path)

    model = load_causal(str(tiny_run.model_dir), dtype=torch.float32, device=torch.device("cpu"))
    move_policy(model)
    rows = pack([encoded.group(i) for i in range(len(encoded))], 200)
    logps_C = torch.cat([Policy(model)(row) for row in rows])
    order = [key for row in rows for key in row.completion_index]
    policy_N2 = logps_C[[order.index((i, k)) for i in range(len(encoded)) for k in (0, 1)]].view(-1, 2)
    reference_N2 = torch.from_numpy(encoded.reference_logps_N2)
    logps = (*policy_N2.unbind(1), *reference_N2.unbind(1))
    loss = dpo_loss(*logps, beta=BETA).mean()
    loss.backward()

    assert loss.item() == pytest.approx(trl_loss, abs=1e-5)
    assert abs(loss.item() - np.log(2)) > 1e-2
    stats = preference_stats(*logps, beta=BETA)
    assert stats["reward_chosen"].mean().item() == pytest.approx(trl_metrics["rewards/chosen"], abs=1e-4)
    assert stats["reward_rejected"].mean().item() == pytest.approx(trl_metrics["rewards/rejected"], abs=1e-4)
    assert stats["margin"].mean().item() == pytest.approx(trl_metrics["rewards/margins"], abs=1e-4)
    assert stats["accuracy"].mean().item() == pytest.approx(trl_metrics["rewards/accuracies"], abs=1e-6)
    for name, parameter in model.named_parameters():
        largest = trl_gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, trl_gradients[name], rtol=0, atol=1e-5 * max(1.0, largest), msg=name)
