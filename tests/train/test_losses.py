from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from prefsel.train.losses import dfpo_loss, dpo_loss, preference_stats

LN2 = math.log(2.0)


def _tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def _golden(shared: Path, method: str) -> list[dict]:
    examples = json.loads((shared / "golden" / "golden.json").read_text())
    return [example for example in examples if example["method"] == method]


def test_losses_of_hand_computed_margins() -> None:
    # policy − reference: chosen (1, 0, -2), rejected (-1, 0, 1); times beta 0.5 the margins are (1, 0, -1.5)
    policy_chosen = torch.tensor([-9.0, -5.0, -7.0], dtype=torch.float64)
    reference_chosen = torch.tensor([-10.0, -5.0, -5.0], dtype=torch.float64)
    policy_rejected = torch.tensor([-4.0, -6.0, -2.0], dtype=torch.float64)
    reference_rejected = torch.tensor([-3.0, -6.0, -3.0], dtype=torch.float64)
    expected = torch.tensor([math.log1p(math.exp(-1.0)), LN2, math.log1p(math.exp(1.5))], dtype=torch.float64)
    logps = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    torch.testing.assert_close(dpo_loss(*logps, beta=0.5), expected, rtol=0, atol=1e-12)
    stats = preference_stats(*logps, beta=0.5)
    assert stats["margin"].tolist() == [1.0, 0.0, -1.5]
    assert stats["reward_chosen"].tolist() == [0.5, 0.0, -1.0]
    assert stats["reward_rejected"].tolist() == [-0.5, 0.0, 0.5]
    assert stats["accuracy"].tolist() == [1.0, 0.0, 0.0]  # a tie is not a correct order


def test_extreme_margins_stay_finite_where_log_of_sigmoid_would_not() -> None:
    # beta 1: margins -2000 and 2000; sigmoid(-2000) is 0 in float64
    low = dpo_loss(*_tensors(-2000.0, 0.0, 0.0, 0.0), beta=1.0)
    high = dpo_loss(*_tensors(2000.0, 0.0, 0.0, 0.0), beta=1.0)
    assert (low.item(), high.item()) == (2000.0, 0.0)


def test_label_smoothing_mixes_both_labels() -> None:
    # margin 0.3, epsilon 0.1: 0.9 * log(1 + e^-0.3) + 0.1 * log(1 + e^0.3)
    loss = dpo_loss(*_tensors(-10.0, -15.0, -12.0, -14.0), beta=0.1, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * 0.5543552444685270 + 0.1 * 0.8543552444685272, abs=1e-12)


def test_gradient_is_minus_beta_sigmoid_of_minus_margin() -> None:
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = _tensors(-10.0, -15.0, -12.0, -14.0)
    policy_chosen.requires_grad_()
    policy_rejected.requires_grad_()
    dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1).sum().backward()
    weight = 0.1 / (1.0 + math.exp(0.3))
    assert policy_chosen.grad is not None
    assert policy_rejected.grad is not None
    assert policy_chosen.grad.item() == pytest.approx(-weight, abs=1e-12)
    assert policy_rejected.grad.item() == pytest.approx(weight, abs=1e-12)


def test_golden_dpo_losses(shared: Path) -> None:
    examples = _golden(shared, "lossdiff")
    assert examples
    for example in examples:
        inputs, beta = example["inputs"], example["params"]["beta"]
        for model in ("theta", "theta_val"):
            logps = _tensors(*inputs[f"logps_{model}"], *inputs["logps_reference"])
            assert dpo_loss(*logps, beta=beta).item() == pytest.approx(
                example["expected"][f"loss_{model}"], abs=example["atol"]
            ), example["id"]


def test_golden_dfpo_losses(shared: Path) -> None:
    examples = _golden(shared, "dfpo_loss")
    assert examples
    for example in examples:
        inputs, params, expected = example["inputs"], example["params"], example["expected"]
        chosen, rejected, zero, divergence = _tensors(
            inputs["logratio_chosen"], inputs["logratio_rejected"], 0.0, inputs["pd"]
        )
        chosen.requires_grad_()
        loss = dfpo_loss(chosen, rejected, zero, zero, preference_divergence=divergence, **params)
        loss.sum().backward()
        assert chosen.grad is not None
        assert loss.item() == pytest.approx(expected["loss"], abs=example["atol"]), example["id"]
        weight = -chosen.grad.item() / (params["num_aspects"] * params["beta"])
        assert weight == pytest.approx(expected["gradient_weight"], abs=example["atol"]), example["id"]
