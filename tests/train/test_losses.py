from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prefsel.config import DpoOptions
from prefsel.config.losses import LOSSES, Loss, losses_with, used_options
from prefsel.errors import UserError
from prefsel.plugins.contracts import LOSS_COLUMNS
from prefsel.train.losses import (
    dfpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    loss_function,
    preference_stats,
    robust_dpo_loss,
    simpo_loss,
    weighted_dfpo_loss,
)
from prefsel.train.preference import PairInputs, pair_losses, pair_stats

LN2 = math.log(2.0)


def _tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


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
    assert stats["accuracy"].tolist() == [1.0, 0.5, 0.0]  # a tie is half a correct order, as a coin would be


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


@pytest.mark.parametrize("name", ["lossdiff-agree", "lossdiff-conflict", "lossdiff-identical"])
def test_golden_dpo_losses(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    inputs, beta = example["inputs"], example["params"]["beta"]
    for model in ("theta", "theta_val"):
        logps = _tensors(*inputs[f"logps_{model}"], *inputs["logps_reference"])
        expected = example["expected"][f"loss_{model}"]
        assert dpo_loss(*logps, beta=beta).item() == pytest.approx(expected, abs=example["atol"])


@pytest.mark.parametrize("name", ["dfpo-loss-pd-0.6", "dfpo-loss-pd+0", "dfpo-loss-pd+0.6"])
def test_golden_dfpo_losses(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    inputs, params, expected = example["inputs"], example["params"], example["expected"]
    logratios = _tensors(inputs["logratio_chosen"], inputs["logratio_rejected"], 0.0, 0.0)
    margin = preference_stats(*logratios, beta=params["beta"])["margin"].item()
    assert margin == pytest.approx(expected["margin"], abs=example["atol"])
    logratios[0].requires_grad_()
    loss = dfpo_loss(*logratios, preference_divergence=_tensors(inputs["pd"])[0], **params)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=example["atol"])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-expected["logit"])), abs=example["atol"])
    assert logratios[0].grad is not None
    weight = -logratios[0].grad.item() / (params["num_aspects"] * params["beta"])
    assert weight == pytest.approx(expected["gradient_weight"], abs=example["atol"])


# ------------------------------------------------------------------------------------------ the other losses

# One pair: policy (-10, -15), reference (-12, -14), 4 and 5 response tokens.
#   summed: 2 and -1, h = 3        per token: 0.5 and -0.2, h̄ = 0.7        SimPO: -2.5 and -3, difference 0.5
LOGPS = (-10.0, -15.0, -12.0, -14.0)
TOKENS = {"num_tokens_chosen": torch.tensor([4.0]), "num_tokens_rejected": torch.tensor([5.0])}


def test_losses_of_one_pair_computed_by_hand() -> None:
    def softplus(x: float) -> float:
        return math.log(1.0 + math.exp(x))

    divergence = {"preference_divergence": torch.tensor([-0.6], dtype=torch.float64)}
    weight = {"aspect_weight": torch.tensor([0.2], dtype=torch.float64)}
    logps = _tensors(*LOGPS)
    got_and_expected = [
        # beta 0.1: m = 0.3; with flips of 0.2: (0.8 softplus(-0.3) - 0.2 softplus(0.3)) / 0.6
        (
            robust_dpo_loss(*logps, beta=0.1, label_smoothing=0.2),
            (0.8 * 0.5543552444685270 - 0.2 * 0.8543552444685272) / 0.6,
        ),
        (hinge_loss(*logps, beta=0.1), 0.7),
        (hinge_loss(*logps, beta=0.5), 0.0),  # m = 1.5
        (ipo_loss(*logps, beta=0.1, **TOKENS), 4.0),  # (3 - 5)²
        (ipo_loss(*logps, beta=0.5, reduction="mean", **TOKENS), 0.09),  # (0.7 - 1)²
        (simpo_loss(*logps[:2], beta=2.0, gamma=0.4, **TOKENS), softplus(0.4 - 1.0)),
        (length_normalised_dpo_loss(*logps, beta=2.0, **TOKENS), softplus(-1.4)),
        (dfpo_loss(*logps, beta=0.1, num_aspects=4, **divergence), softplus(-(1.2 - 0.6))),
        (weighted_dfpo_loss(*logps, beta=0.1, **divergence, **weight), softplus(-(1.5 - 0.6))),
    ]
    for got, expected in got_and_expected:
        assert got.shape == (1,)
        assert got.item() == pytest.approx(expected, abs=1e-12)


def options_of(loss: str, **more: Any) -> DpoOptions:
    """Options with the parameters that the loss needs."""
    needed: dict[str, dict[str, Any]] = {
        "robust_dpo": {"label_smoothing": 0.2},
        "simpo": {"simpo_gamma": 0.5},
        "dfpo": {"num_aspects": 4, "divergence": "pd"},
        "weighted_dfpo": {"aspect_weights": {"a": 1.0, "b": 3.0}, "divergence": "pd"},
    }
    return DpoOptions.model_validate({"learning_rate": 1.0, "beta": 0.3, "loss": loss, **needed.get(loss, {}), **more})


ALL_OPTIONS = [
    *map(options_of, LOSSES),
    options_of("dpo", label_smoothing=0.1),
    options_of("ipo", ipo_reduction="mean"),
]


def random_inputs(num_pairs: int, scale: float = 3.0) -> tuple[torch.Tensor, PairInputs]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    reference_N2 = normal(num_pairs, 2) - 40.0
    columns = {
        "preference_divergence": normal(num_pairs),
        "aspect_weight": torch.rand(num_pairs, generator=generator, dtype=torch.float64) * 0.9 + 0.1,
    }
    tokens_N2 = torch.randint(1, 30, (num_pairs, 2), generator=generator).double()
    return reference_N2 + normal(num_pairs, 2), PairInputs(reference_N2, tokens_N2, columns)


def naive_loss(options: DpoOptions, policy: list[float], inputs: PairInputs, number: int) -> float:
    """The loss of one pair in plain arithmetic: log and exp as the papers print them."""
    assert inputs.reference_N2 is not None
    (c, r), (ref_c, ref_r) = policy, inputs.reference_N2[number].tolist()
    len_c, len_r = inputs.num_tokens_N2[number].tolist()
    divergence, weight = (inputs.columns[name][number].item() for name in ("preference_divergence", "aspect_weight"))

    def log_sigmoid(x: float) -> float:
        return math.log(1.0 / (1.0 + math.exp(-x)))

    beta, flips, h = options.beta, options.label_smoothing, (c - ref_c) - (r - ref_r)
    per_token = (c - ref_c) / len_c - (r - ref_r) / len_r
    match options.loss:
        case "dpo":
            return -(1 - flips) * log_sigmoid(beta * h) - flips * log_sigmoid(-beta * h)
        case "robust_dpo":
            return -((1 - flips) * log_sigmoid(beta * h) - flips * log_sigmoid(-beta * h)) / (1 - 2 * flips)
        case "ipo":
            return ((h if options.ipo_reduction == "sum" else per_token) - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - beta * h)
        case "simpo":
            return -log_sigmoid(beta * c / len_c - beta * r / len_r - (options.simpo_gamma or 0.0))
        case "length_normalised_dpo":
            return -log_sigmoid(beta * per_token)
        case "dfpo":
            return -log_sigmoid((options.num_aspects or 0) * beta * h + divergence)
        case "weighted_dfpo":
            return -log_sigmoid(beta * h / weight + divergence)
    raise AssertionError(options.loss)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=lambda o: f"{o.loss}-{o.label_smoothing}-{o.ipo_reduction}")
def test_every_loss_and_its_derivative_are_those_of_plain_arithmetic(options: DpoOptions) -> None:
    policy_N2, inputs = random_inputs(25)
    policy_N2.requires_grad_()
    losses_N = pair_losses(options, policy_N2, inputs)
    (slope_N2,) = torch.autograd.grad(losses_N.sum(), policy_N2)
    step = 1e-5
    for number, policy in enumerate(policy_N2.tolist()):
        assert losses_N[number].item() == pytest.approx(naive_loss(options, policy, inputs, number), rel=1e-10)
        for side in (0, 1):
            up, down = ([value + sign * step * (k == side) for k, value in enumerate(policy)] for sign in (1, -1))
            difference = naive_loss(options, up, inputs, number) - naive_loss(options, down, inputs, number)
            assert slope_N2[number, side].item() == pytest.approx(difference / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=lambda o: f"{o.loss}-{o.label_smoothing}-{o.ipo_reduction}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margins_of_ten_thousand_stay_finite(options: DpoOptions, dtype: torch.dtype) -> None:
    logps_N2 = torch.tensor([[-1e4, 0.0], [0.0, -1e4], [-1e4, -1e4]], dtype=dtype, requires_grad=True)
    columns = {"preference_divergence": torch.tensor([3.0, -3.0, 0.0]), "aspect_weight": torch.full((3,), 0.1)}
    inputs = PairInputs(torch.zeros(3, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype), columns)
    losses_N = pair_losses(options, logps_N2, inputs)
    (slope_N2,) = torch.autograd.grad(losses_N.sum(), logps_N2)
    assert torch.isfinite(losses_N).all()
    assert torch.isfinite(slope_N2).all()
    assert slope_N2[0, 0] < 0 < slope_N2[0, 1]  # the wrong order by far is still pulled right


def test_robust_dpo_under_flips_is_dpo_of_the_true_labels() -> None:
    policy_N2, inputs = random_inputs(20)
    assert inputs.reference_N2 is not None
    logps = (*policy_N2.unbind(1), *inputs.reference_N2.unbind(1))
    flipped = (logps[1], logps[0], logps[3], logps[2])
    robust = {"beta": 0.3, "label_smoothing": 0.3}
    expectation = 0.7 * robust_dpo_loss(*logps, **robust) + 0.3 * robust_dpo_loss(*flipped, **robust)
    torch.testing.assert_close(expectation, dpo_loss(*logps, beta=0.3), rtol=0, atol=1e-12)


def test_dfpo_with_equal_weights_is_dfpo() -> None:
    policy_N2, inputs = random_inputs(20)
    quarter = {**inputs.columns, "aspect_weight": torch.full((20,), 0.25, dtype=torch.float64)}
    weighted = pair_losses(
        options_of("weighted_dfpo"), policy_N2, PairInputs(inputs.reference_N2, inputs.num_tokens_N2, quarter)
    )
    torch.testing.assert_close(weighted, pair_losses(options_of("dfpo"), policy_N2, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # beta 0.3 times (2, -1); per token (0.5, -0.2); per token without reference (-2.5, -3)
        (options_of("hinge"), (0.6, -0.3)),
        (options_of("ipo"), (0.6, -0.3)),
        (options_of("ipo", ipo_reduction="mean"), (0.15, -0.06)),
        (options_of("length_normalised_dpo"), (0.15, -0.06)),
        (options_of("simpo"), (-0.75, -0.9)),
    ],
    ids=lambda value: f"{value.loss}-{value.ipo_reduction}" if isinstance(value, DpoOptions) else "",
)
def test_rewards_are_those_that_the_loss_compares(options: DpoOptions, expected: tuple[float, float]) -> None:
    policy, reference, tokens = (torch.tensor([pair], dtype=torch.float64) for pair in (LOGPS[:2], LOGPS[2:], (4, 5)))
    stats = pair_stats(options, policy, PairInputs(reference, tokens, {}))
    assert (stats["reward_chosen"].item(), stats["reward_rejected"].item()) == pytest.approx(expected, abs=1e-12)
    assert stats["accuracy"].item() == 1.0


# --------------------------------------------------------------------------------------------- configuration


def test_a_line_says_what_its_function_takes() -> None:
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss_function(name)).parameters.values()
        logps = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert len(logps) == (4 if loss.uses_reference else 2), name
        keywords = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        lengths = {"num_tokens_chosen", "num_tokens_rejected"} if loss.uses_lengths else set()
        assert keywords == {"beta", *loss.options, *loss.params, *loss.columns, *lengths}, name
        assert used_options(loss) <= set(DpoOptions.model_fields)
        assert set(loss.columns) <= set(LOSS_COLUMNS)


def test_every_option_belongs_to_the_losses_that_need_it() -> None:
    assert {
        option: losses_with(option) for option in sorted({o for x in LOSSES.values() for o in used_options(x)})
    } == {
        "aspect_weights": ["weighted_dfpo"],
        "divergence": ["dfpo", "weighted_dfpo"],
        "ipo_reduction": ["ipo"],
        "label_smoothing": ["dpo", "robust_dpo"],
        "num_aspects": ["dfpo"],
        "simpo_gamma": ["simpo"],
    }
    assert DpoOptions.model_json_schema()["properties"]["loss"]["anyOf"][0]["enum"] == list(LOSSES)


def shifted_loss(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, *, beta: float, shift: float):
    """A loss of another package: one function."""
    return torch.nn.functional.softplus(shift - beta * (policy_chosen - policy_rejected))


def test_a_loss_of_another_package_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (shifted_loss, f"{__name__}:shifted_loss"):  # itself, or where it lies
        monkeypatch.setitem(LOSSES.builtin, "shifted", Loss(function, uses_reference=False, params={"shift": 0.5}))
        assert loss_function("shifted") is shifted_loss
    policy = torch.tensor([LOGPS[:2]], dtype=torch.float64)  # -10 and -15
    inputs = PairInputs(None, torch.ones(1, 2), {})
    for given, shift in (({}, 0.5), ({"shift": 2.0}, 2.0)):
        options = options_of("shifted", loss_params=given)
        expected = math.log1p(math.exp(shift - 0.3 * 5))
        assert pair_losses(options, policy, inputs).item() == pytest.approx(expected, abs=1e-12)
        assert ("loss_params" in options.model_dump()) is bool(given)  # no recipe of another loss is another one
    with pytest.raises(ValidationError, match="loss_params: got gamma with loss 'shifted'; valid: shift"):
        options_of("shifted", loss_params={"gamma": 1.0})
    assert "shifted" in DpoOptions.model_json_schema()["properties"]["loss"]["anyOf"][0]["enum"]
    monkeypatch.setitem(LOSSES.builtin, "lost", Loss("no_such_package:loss"))
    with pytest.raises(UserError, match="loss 'lost': its function no_such_package:loss cannot be imported"):
        loss_function("lost")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo", "simpo_gamma": 1.0}, "simpo_gamma: got 1.0 with loss 'dpo'; only used by simpo"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            "label_smoothing: got 0.1 with loss 'hinge'; only used by dpo, robust",
        ),
        ({"loss": "length_normalised_dpo", "ipo_reduction": "mean"}, "ipo_reduction: got 'mean'.*only used by ipo"),
        ({"loss": "dpo", "divergence": "pd"}, "divergence: got 'pd' with loss 'dpo'; only used by dfpo, weighted_dfpo"),
        ({"loss": "simpo"}, "simpo_gamma: got None; loss 'simpo' needs it"),
        ({"loss": "dfpo", "num_aspects": 4}, "divergence: got None; loss 'dfpo' needs it"),
        ({"loss": "dfpo", "divergence": "pd"}, "num_aspects: got None; loss 'dfpo' needs it"),
        ({"loss": "weighted_dfpo", "divergence": "pd"}, "aspect_weights: got None; loss 'weighted_dfpo' needs it"),
        ({"loss": "weighted_dfpo", "divergence": "pd", "aspect_weights": {"a": 0.0}}, "greater than 0"),
        ({"loss": "robust_dpo"}, "label_smoothing: got 0.0 with loss 'robust_dpo'; valid: above 0, below 0.5"),
        ({"loss": "robust_dpo", "label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "orpo"}, "valid: dpo, robust_dpo, ipo, .*weighted_dfpo"),
        ({"loss_params": {"shift": 1.0}}, "loss_params: got shift with loss 'dpo'; valid: none"),
        ({"keep_optimizer_state": True, "lora": {}}, "keep_optimizer_state: got True with lora"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_do_not_fit_the_loss_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DpoOptions.model_validate({"learning_rate": 1.0, **options})


@pytest.mark.parametrize("wrong", [torch.zeros(()), torch.zeros(1), torch.zeros(3, 1), None])
def test_a_loss_gives_one_value_per_pair(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefsel.train.preference.loss_function", lambda name: lambda *logps, **more: wrong)
    inputs = PairInputs(torch.zeros(3, 2), torch.ones(3, 2), {})
    with pytest.raises(UserError, match=r"loss 'dpo': gave .*; valid: \(3,\), one per pair"):
        pair_losses(options_of("dpo"), torch.zeros(3, 2), inputs)
