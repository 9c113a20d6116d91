"""Loss and gradients of one batch against TRL's own trainers: other packing, other head, other loss code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import TinyRun
from tiny_runs import preference
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config import DpoOptions
from prefsel.models.chat import Encoder
from prefsel.models.loading import load_causal
from prefsel.models.packing import pack
from prefsel.models.pair_batch import by_pair
from prefsel.train.data import EncodedPairs, TrainingPairs, encode_pairs
from prefsel.train.preference import PairInputs, pair_losses, pair_stats

trl = pytest.importorskip("trl")

BETA = 0.3
Gradients = dict[str, torch.Tensor]

# ours, TRL's
REFERENCE_LOSSES: list[tuple[dict[str, Any], str, float]] = [
    ({"loss": "dpo"}, "sigmoid", 0.0),
    ({"loss": "robust_dpo", "label_smoothing": 0.2}, "robust", 0.2),
    ({"loss": "hinge"}, "hinge", 0.0),
    ({"loss": "ipo", "ipo_reduction": "mean"}, "ipo", 0.0),
    ({"loss": "length_normalised_dpo"}, "sigmoid_norm", 0.0),
]


def move_policy(model: torch.nn.Module) -> None:
    """The same step away from the reference on both sides, so that the margins are not all zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def encoded(tiny_run: TinyRun) -> EncodedPairs:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_run.model_dir), "auto", 128, "drop")
    return encode_pairs(TrainingPairs.from_table(tiny_run.train), encoder)


def trainer_options(tiny_run: TinyRun, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both of TRL's trainers are made with, and what their configurations are."""
    from datasets import Dataset

    made_with = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32),
        "train_dataset": Dataset.from_list(tiny_run.train.select(["prompt", "chosen", "rejected"]).to_pylist()),
        "processing_class": AutoTokenizer.from_pretrained(tiny_run.model_dir),
    }
    arguments = {"output_dir": str(folder), "beta": BETA, "bf16": False, "use_cpu": True, "report_to": []}
    return made_with, {**arguments, "gradient_checkpointing": False, "disable_tqdm": True}


@pytest.fixture(scope="module")
def dpo_trainer(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made_with, arguments = trainer_options(tiny_run, tmp_path_factory.mktemp("dpo"))
    trainer = trl.DPOTrainer(
        **made_with,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32),
        args=trl.DPOConfig(**arguments, max_length=None, per_device_train_batch_size=4),
    )
    move_policy(trainer.model)
    return trainer


@pytest.fixture(scope="module")
def cpo_trainer(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer of losses without a reference."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    made_with, arguments = trainer_options(tiny_run, tmp_path_factory.mktemp("cpo"))
    trainer = CPOTrainer(
        **made_with,
        args=CPOConfig(**arguments, loss_type="simpo", simpo_gamma=0.5, cpo_alpha=0.0, max_length=128),
    )
    move_policy(trainer.model)
    return trainer


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def dpo_step(
    trainer: Any, encoded: EncodedPairs, loss_type: str, label_smoothing: float
) -> tuple[float, Gradients, dict[str, Any]]:
    """Loss, gradients and logged metrics of TRL's `DPOTrainer` on all pairs as one padded batch."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer.loss_types, trainer.label_smoothing = [loss_type], label_smoothing
    pieces = [encoded.pieces(i) for i in range(len(encoded))]
    examples = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pieces]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(examples))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients(trainer.model, loss), metrics


def cpo_step(trainer: Any, loss_type: str, label_smoothing: float) -> tuple[float, Gradients, dict[str, Any]]:
    """The same of `CPOTrainer`, which encodes the conversations itself."""
    trainer.loss_type, trainer.label_smoothing = loss_type, label_smoothing
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    trainer.model.train()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return loss.item(), gradients(trainer.model, loss), metrics


def our_step(
    tiny_run: TinyRun, encoded: EncodedPairs, *, without_reference: bool = False, **options: Any
) -> tuple[float, Gradients, dict[str, float]]:
    """The same of ours, through packed rows."""
    config = DpoOptions.model_validate({"learning_rate": 1.0, "beta": BETA, **options})
    model = load_causal(str(tiny_run.model_dir), dtype=torch.float32, device=torch.device("cpu"))
    move_policy(model)
    inputs = PairInputs.of(encoded, np.arange(len(encoded)))
    if without_reference:
        inputs = replace(inputs, reference_N2=torch.zeros(len(encoded), 2, dtype=torch.float64))
    (row,) = pack([encoded.group(i) for i in range(len(encoded))], 10_000)
    policy_N2 = by_pair(preference().outputs(model, row), row)
    loss = pair_losses(config, policy_N2, inputs).mean()
    stats = {name: values.mean().item() for name, values in pair_stats(config, policy_N2, inputs).items()}
    return loss.item(), gradients(model, loss), stats


def assert_same_gradients(got: Gradients, want: Gradients) -> None:
    assert max(gradient.abs().max() for gradient in want.values()) > 1e-3
    for name, gradient in want.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-5 * max(1.0, largest), msg=name)


def assert_same_rewards(stats: dict[str, float], metrics: dict[str, Any]) -> None:
    assert stats["reward_chosen"] == pytest.approx(metrics["rewards/chosen"], abs=1e-4)
    assert stats["reward_rejected"] == pytest.approx(metrics["rewards/rejected"], abs=1e-4)
    assert stats["margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-4)
    assert stats["accuracy"] == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)


@pytest.mark.parametrize(("options", "loss_type", "label_smoothing"), REFERENCE_LOSSES, ids=lambda value: str(value))
def test_losses_with_a_reference_are_trls(
    tiny_run: TinyRun,
    encoded: EncodedPairs,
    dpo_trainer: Any,
    options: dict[str, Any],
    loss_type: str,
    label_smoothing: float,
) -> None:
    trl_loss, trl_gradients, trl_metrics = dpo_step(dpo_trainer, encoded, loss_type, label_smoothing)
    loss, our_gradients, stats = our_step(tiny_run, encoded, **options)
    assert loss == pytest.approx(trl_loss, abs=1e-5)
    assert_same_gradients(our_gradients, trl_gradients)
    if options == {"loss": "dpo"}:
        assert abs(loss - np.log(2)) > 1e-2
    if options.get("loss") in ("dpo", "robust_dpo", "hinge"):  # the others' rewards are per token here, summed there
        assert_same_rewards(stats, trl_metrics)


def test_simpo_is_trls(tiny_run: TinyRun, encoded: EncodedPairs, cpo_trainer: Any) -> None:
    trl_loss, trl_gradients, trl_metrics = cpo_step(cpo_trainer, "simpo", 0.0)
    without = replace(encoded, reference_logps_N2=None)
    loss, our_gradients, stats = our_step(tiny_run, without, loss="simpo", simpo_gamma=0.5)
    assert loss == pytest.approx(trl_loss, abs=1e-5)
    assert_same_gradients(our_gradients, trl_gradients)
    assert_same_rewards(stats, trl_metrics)


def test_conservative_dpo_is_trls(tiny_run: TinyRun, encoded: EncodedPairs, cpo_trainer: Any) -> None:
    # TRL's `DPOTrainer` has lost it; its `CPOTrainer` has the same formula on a reference of zero.
    trl_loss, trl_gradients, trl_metrics = cpo_step(cpo_trainer, "sigmoid", 0.1)
    loss, our_gradients, stats = our_step(tiny_run, encoded, without_reference=True, loss="dpo", label_smoothing=0.1)
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert_same_gradients(our_gradients, trl_gradients)
    assert_same_rewards(stats, trl_metrics)


def test_ipo_of_summed_log_probs_is_trls_without_the_division(
    tiny_run: TinyRun, encoded: EncodedPairs, cpo_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cpo_trainer.get_batch_logps
    monkeypatch.setattr(
        cpo_trainer, "get_batch_logps", lambda *args, **options: whole(*args, **{**options, "average_log_prob": False})
    )
    trl_loss, trl_gradients, _ = cpo_step(cpo_trainer, "ipo", 0.0)
    loss, our_gradients, _ = our_step(tiny_run, encoded, without_reference=True, loss="ipo")
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert_same_gradients(our_gradients, trl_gradients)
