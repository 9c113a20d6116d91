from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prefsel.errors import UserError
from prefsel.train.reward_losses import debiased_margins, length_balanced_frequency, length_penalised_loss


def test_golden_length_penalty(golden: dict[str, dict]) -> None:
    example = golden["rm-length-penalty"]
    margins, lengths = (torch.tensor([float(example["inputs"][n])]) for n in ("reward_margin", "length_difference"))
    rho, expected, atol = example["params"]["rho"], example["expected"], example["atol"]
    assert debiased_margins(margins, lengths, rho=rho).item() == pytest.approx(expected["logit"], abs=atol)
    assert expected["logit"] == expected["debiased_margin"]
    assert length_penalised_loss(margins, lengths, rho=rho).item() == pytest.approx(expected["loss"], abs=atol)


LENGTH_BALANCE = ["length-balance-tau0.1", "length-balance-tau0.5", "length-balance-tau1", "length-balance-tau10"]


@pytest.mark.parametrize("name", LENGTH_BALANCE)
def test_golden_length_balance(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    got = length_balanced_frequency(example["inputs"]["longer_chosen_share"], example["params"]["tau"])
    assert got == pytest.approx(example["expected"]["frequency"], abs=example["atol"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("tau", [0.2, 1.0, 30.0])
def test_frequency_is_the_printed_quotient(share: float, tau: float) -> None:
    plus, minus = math.exp(share / tau), math.exp((1 - share) / tau)
    assert length_balanced_frequency(share, tau) == pytest.approx(plus / (plus + minus), rel=1e-14)


def test_frequency_at_the_ends_of_tau() -> None:
    assert length_balanced_frequency(0.9, 1e12) == pytest.approx(0.5)
    assert [length_balanced_frequency(share, 1e-5) for share in (0.2, 0.5, 0.8)] == [0.0, 0.5, 1.0]
    # Where the temperature starts to help: f^ is nearer to one half than f for tau = 0.6, farther for tau = 0.4.
    assert abs(length_balanced_frequency(0.6, 0.6) - 0.5) < 0.1 < abs(length_balanced_frequency(0.6, 0.4) - 0.5)


def test_what_is_no_share_or_temperature_is_refused() -> None:
    with pytest.raises(UserError, match=r"share: got 1\.5; valid: 0 to 1"):
        length_balanced_frequency(1.5, 1.0)
    with pytest.raises(UserError, match=r"length_balance_tau: got 0\.0; valid: above 0"):
        length_balanced_frequency(0.5, 0.0)


def test_the_gradient_is_minus_the_probability_of_being_wrong() -> None:
    margins = torch.tensor([-2.0, 0.0, 1.5, 0.3], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([10.0, -5.0, 0.0, 40.0], dtype=torch.float64)
    length_penalised_loss(margins, lengths, rho=0.05).sum().backward()
    logits = margins.detach().numpy() - 0.05 * lengths.numpy()
    np.testing.assert_allclose(margins.grad, -1 / (1 + np.exp(logits)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(dtype: torch.dtype) -> None:
    margins = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    losses = length_penalised_loss(margins, torch.zeros(2, dtype=dtype), rho=0.0)
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0.0]
    assert margins.grad.tolist() == [-1.0, 0.0]
