"""Influence against its definition, and against gradients of a small policy that automatic differentiation takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import score_table

SIDES = ("chosen", "rejected")
TANGENTS = ["v-honesty", "v-truthfulness", "v-help"]
NAMES = [f"{prefix}_{side}" for prefix in ["logps_p", "logps_r", *(f"dlogps_{t}" for t in TANGENTS)] for side in SIDES]
PARAMS = {"policy": "p", "reference": "r"}


def naive(row: dict, beta: float, tangents: list[str], combine: str) -> float:
    """-β σ(-IRM) (D lp_w - D lp_l) along each tangent."""
    if any(row[f"{p}_{s}"] is None for p in ["logps_p", "logps_r", *(f"dlogps_{t}" for t in tangents)] for s in SIDES):
        return math.nan
    irm = beta * (row["logps_p_chosen"] - row["logps_r_chosen"] - row["logps_p_rejected"] + row["logps_r_rejected"])
    weight = -beta / (1 + math.exp(irm))
    along = [weight * (row[f"dlogps_{t}_chosen"] - row[f"dlogps_{t}_rejected"]) for t in tangents]
    return max(along) if combine == "max" else sum(along) / len(along)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 50),
    st.sampled_from([1, 3, 60]),
    st.sampled_from([0.1, 1.0]),
    st.integers(1, 3),
    st.sampled_from(["mean", "max"]),
)
def test_equals_the_definition_for_any_sharding(
    num_rows: int, num_shards: int, beta: float, num_tangents: int, combine: str
) -> None:
    columns, tangents = random_columns(NAMES, num_rows), TANGENTS[:num_tangents]
    params = {**PARAMS, "beta": beta, "tangent": tangents, "combine": combine}
    found, _ = score_shards(float_table(columns), "influence", num_shards, **params)
    expected = [naive(row, beta, tangents, combine) for row in rows_of(columns)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(found, score_table(float_table(columns), "influence", **params))


def test_one_tangent_may_be_given_as_text_and_any_beta_changes_nothing() -> None:
    table = float_table(random_columns(NAMES, 20))
    alone = score_table(table, "influence", tangent="v-help", **PARAMS)
    np.testing.assert_array_equal(alone, score_table(table, "influence", tangent=["v-help"], **PARAMS))
    np.testing.assert_array_equal(alone, score_table(table, "influence", tangent="v-help", any_beta=True, **PARAMS))


def test_extreme_margins_stay_finite() -> None:
    table = sided(logps_p=[(1e5, 0), (-1e5, 0)], logps_r=[(0, 0)] * 2, dlogps_v=[(2, 1)] * 2)
    assert score_table(table, "influence", tangent="v", beta=1, **PARAMS).tolist() == [0.0, -1.0]


class Policy:
    """Log-probs of completions of three tokens, each drawn from a softmax over features of the prompt."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.theta = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        self.reference = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        self.prompts = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.tokens = torch.randint(0, 5, (12, 2, 3), generator=generator)

    def logps(self, theta: torch.Tensor) -> torch.Tensor:
        """Summed log-probs, [pairs, 2]."""
        return torch.log_softmax(self.prompts @ theta, -1)[:, None, :].expand(-1, 2, -1).gather(2, self.tokens).sum(2)

    def losses(self, theta: torch.Tensor, beta: float) -> torch.Tensor:
        """DPO losses, [pairs]."""
        ratio = self.logps(theta) - self.logps(self.reference)
        return -torch.nn.functional.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))


def test_is_the_inner_product_of_loss_gradients_and_the_slope_of_lossdiff() -> None:
    policy, beta, eta = Policy(), 0.1, 1e-6
    gradients = torch.autograd.functional.jacobian(lambda theta: policy.losses(theta, beta), policy.theta)
    validation, train = range(4), range(4, 12)
    v = gradients[validation].mean(0)
    logps = policy.logps(policy.theta)
    moved = policy.logps(policy.theta - eta * v)
    derivative = torch.autograd.functional.jacobian(
        lambda s: policy.logps(policy.theta + s * v), torch.zeros((), dtype=torch.float64)
    )
    table = sided(
        logps_p=logps[train].tolist(),
        logps_pv=moved[train].tolist(),
        logps_r=policy.logps(policy.reference)[train].tolist(),
        dlogps_v=derivative[train].tolist(),
    )
    found = score_table(table, "influence", tangent="v", beta=beta, **PARAMS)
    expected = (gradients[train] * v).sum((1, 2)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9 * abs(expected).max())
    # A step down the validation loss lowers the loss of exactly the pairs with positive influence.
    lossdiff = score_table(table, "lossdiff", validation_policy="pv", beta=beta, **PARAMS)
    np.testing.assert_allclose(lossdiff / eta, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tangent": []}, "tangent"),
        ({"tangent": "v", "combine": "sum"}, "combine: got 'sum'; input should be 'mean' or 'max'"),
        ({"tangent": "v", "beta": -1}, "beta: got -1"),
        ({}, "tangent: required, but missing"),
        ({"tangent": "w"}, "dlogps_w_chosen (made by a scorer of kind directional_logps)"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(sided(logps_p=[(0, 0)], logps_r=[(0, 0)]), "influence", **PARAMS, **params)
    assert message in str(error.value)
