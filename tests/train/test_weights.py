"""A weight per pair: losses and gradients against naive sums, and what a whole training makes of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from naive_loop import naive_training
from tiny_policy import naive_logps
from tiny_runs import POLICY, Case, assert_same_history, assert_same_weights, first_epoch, losses, preference, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config import DpoOptions
from prefsel.errors import NonFiniteError, UserError
from prefsel.train.data import TrainingPairs
from prefsel.train.losses import loss_function
from prefsel.train.preference import PairInputs, pair_losses

EXCHANGEABLE: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ipo": {},
    "ipo-mean": {"loss": "ipo", "ipo_reduction": "mean", "beta": 2.0},
    "hinge": {},
    "simpo": {"simpo_gamma": 0.5, "beta": 2.0},
    "length_normalised_dpo": {"beta": 3.0},
}


def options_of(name: str, **more: Any) -> DpoOptions:
    return DpoOptions.model_validate({"learning_rate": 1e-3, "loss": name.split("-")[0], **EXCHANGEABLE[name], **more})


def drawn(num_pairs: int = 9) -> tuple[torch.Tensor, PairInputs]:
    """Log-probs of a policy and a reference, lengths and weights, some of them 0 and 1; float64."""
    made = torch.Generator().manual_seed(3)
    policy_N2, reference_N2 = -40 * torch.rand((2, num_pairs, 2), generator=made, dtype=torch.float64)
    weight_N = torch.rand(num_pairs, generator=made, dtype=torch.float64)
    weight_N[:2] = torch.tensor([0.0, 1.0])
    tokens_N2 = torch.randint(3, 30, (num_pairs, 2), generator=made).double()
    return policy_N2, PairInputs(reference_N2, tokens_N2, {"weight": weight_N})


def naive_loss(name: str, options: DpoOptions, logps: list[float], reference: list[float], tokens: list[float]) -> Any:
    """The equations of one pair, written down again; the two log-probs of the policy may carry gradients."""
    rewards = [own - other for own, other in zip(logps, reference)]
    beta = options.beta
    margin = beta * (rewards[0] - rewards[1])
    per_token = [one / many for one, many in zip(rewards, tokens)]
    mean = [one / many for one, many in zip(logps, tokens)]
    return {
        "dpo": lambda: -F.logsigmoid(margin),
        "ipo": lambda: (rewards[0] - rewards[1] - 1 / (2 * beta)) ** 2,
        "ipo-mean": lambda: (per_token[0] - per_token[1] - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.clamp(1 - margin, min=0),
        "simpo": lambda: -F.logsigmoid(beta * (mean[0] - mean[1]) - 0.5),
        "length_normalised_dpo": lambda: -F.logsigmoid(beta * (per_token[0] - per_token[1])),
    }[name]()


@pytest.mark.parametrize("weighting", ["loss", "label"])
@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_loss_and_gradient_equal_a_naive_sum(name: str, weighting: str) -> None:
    """Σ w ℓ(+) / N, and Σ [w ℓ(+) + (1 − w) ℓ(−)] / N with ℓ(−) that of the pair as if the other had been chosen."""
    options = options_of(name, weight="w", weighting=weighting)
    policy_N2, inputs = drawn()
    ours_N2, theirs_N2 = policy_N2.clone().requires_grad_(), policy_N2.clone().requires_grad_()
    pair_losses(options, ours_N2, inputs).mean().backward()
    total: Any = 0.0
    for row, weight in enumerate(inputs.columns["weight"].tolist()):
        logps, reference, tokens = (
            list(one[row].unbind()) for one in (theirs_N2, inputs.reference_N2, inputs.num_tokens_N2)
        )
        total = total + weight * naive_loss(name, options, logps, reference, tokens)
        if weighting == "label":
            turned = [one[::-1] for one in (logps, reference, tokens)]
            total = total + (1 - weight) * naive_loss(name, options, *turned)
    (total / len(policy_N2)).backward()
    torch.testing.assert_close(pair_losses(options, policy_N2, inputs).mean(), total.detach() / 9, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours_N2.grad, theirs_N2.grad, rtol=1e-12, atol=1e-15)
    if weighting == "loss":
        assert ours_N2.grad[0].abs().max() == 0  # of weight 0


def test_a_label_that_is_right_with_certainty_is_the_plain_loss() -> None:
    options, plain = options_of("dpo", weight="w", weighting="label"), options_of("dpo")
    policy_N2, inputs = drawn()
    bare = PairInputs(inputs.reference_N2, inputs.num_tokens_N2, {})
    for weight, turned in ((1.0, False), (0.0, True)):
        inputs.columns["weight"][:] = weight
        sides = (policy_N2.flip(1), bare.exchanged()) if turned else (policy_N2, bare)
        assert pair_losses(options, policy_N2, inputs).tolist() == pair_losses(plain, *sides).tolist()


def test_half_a_weight_is_label_smoothing_of_one_half() -> None:
    """An oracle that is a loss of its own: (1 − ε) ℓ(+) + ε ℓ(−) is conservative DPO."""
    policy_N2, inputs = drawn()
    inputs.columns["weight"][:] = 0.7
    found = pair_losses(options_of("dpo", weight="w", weighting="label"), policy_N2, inputs)
    smoothed = loss_function("dpo")(*policy_N2.unbind(1), *inputs.reference_N2.unbind(1), beta=0.1, label_smoothing=0.3)
    torch.testing.assert_close(found, smoothed, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------- whole trainings


def weighted(policy: Case, weight_N: Any) -> pa.Table:
    return policy.table.append_column("weight", pa.array(np.asarray(weight_N, np.float64)))


def some_weights(num_pairs: int = 22) -> np.ndarray:
    weight_N = np.random.default_rng(7).random(num_pairs)
    weight_N[[0, 5, 9]] = 0.0
    return weight_N


@pytest.mark.parametrize("weighting", ["loss", "label"])
def test_a_training_is_the_textbook_one(policy: Case, tmp_path: Path, weighting: str) -> None:
    """One epoch, micro-batches of 3 in batches of 8, 8 and 6, against whole batches one sequence at a time."""
    table = weighted(policy, some_weights())

    def loss(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        ratios = chosen - row["reference_logps_chosen"], rejected - row["reference_logps_rejected"]
        margin, w = POLICY["beta"] * (ratios[0] - ratios[1]), row["weight"]
        turned = (1 - w) * -F.logsigmoid(-margin) if weighting == "label" else 0.0
        return w * -F.logsigmoid(margin) + turned

    result = policy.run(tmp_path, table=table, weight="w", weighting=weighting, num_epochs=1)
    expected = naive_training(
        AutoModelForCausalLM.from_pretrained(policy.model_dir, dtype=torch.float32),
        AutoTokenizer.from_pretrained(policy.model_dir),
        table.to_pylist(),
        first_epoch(),
        output=naive_logps,
        loss=loss,
        learning_rate=POLICY["learning_rate"],
        num_warmup_steps=1,
    )
    assert losses(result) == pytest.approx(expected.losses, abs=1e-5)
    steps = [record["grad_norm"] for record in result["history"] if record["event"] == "step"]
    assert steps == pytest.approx(expected.norms, rel=1e-3)
    named = dict(expected.model.named_parameters())
    for name, tensor in weights(result).items():
        torch.testing.assert_close(tensor, named[name].detach(), rtol=0, atol=2e-4, msg=name)


def test_weights_of_one_change_no_byte(policy: Case, plain_policy: dict[str, Any], tmp_path: Path) -> None:
    for weighting in ("loss", "label"):
        result = policy.run(tmp_path / weighting, table=weighted(policy, np.ones(22)), weight="w", weighting=weighting)
        assert_same_weights(result, plain_policy)
        assert losses(result) == losses(plain_policy)


@pytest.mark.parametrize("weighting", ["loss", "label"])
def test_eight_by_one_is_one_by_eight(policy: Case, tmp_path: Path, weighting: str) -> None:
    table, common = weighted(policy, some_weights()), {"weight": "w", "weighting": weighting}
    single = policy.run(tmp_path / "1x8", table=table, micro_batch_pairs=1, **common)
    whole = policy.run(tmp_path / "8x1", table=table, micro_batch_pairs=8, token_budget=4096, **common)
    assert_same_weights(single, whole, atol=2e-5)
    assert_same_history(single["history"], whole["history"])
    assert losses(single) != pytest.approx(losses(policy.run(tmp_path / "plain")), rel=1e-3)


def test_pairs_of_weight_zero_move_nothing(policy: Case, tmp_path: Path) -> None:
    """Their text is exchanged for another one: no byte of the model changes, and other pairs' changes it."""
    weight_N, rows = some_weights(), policy.table.to_pylist()
    word = rows[0]["chosen"][0]["content"].split()[0]

    def told(places: list[int]) -> dict[str, Any]:
        changed = [dict(row) for row in rows]
        for place in places:  # as long as before, so that batches are packed alike
            words = len(rows[place]["chosen"][0]["content"].split())
            changed[place]["chosen"] = [{"role": "assistant", "content": " ".join([word] * words)}]
        table = pa.Table.from_pylist(changed, schema=policy.table.schema)
        given = {"weight": "w", "reference_check_pairs": 0, "policy_is_reference": False}
        return policy.run(tmp_path / str(places), table=table.append_column("weight", pa.array(weight_N)), **given)

    assert (weight_N == 0).nonzero()[0].tolist() == [0, 5, 9]
    plain = told([])
    assert_same_weights(told([0, 5, 9]), plain)
    moved = weights(told([1]))
    assert any(not torch.equal(moved[name], tensor) for name, tensor in weights(plain).items())


def test_held_out_pairs_are_not_weighed(policy: Case, tmp_path: Path) -> None:
    result = policy.run(tmp_path, table=weighted(policy, some_weights()), weight="w")
    first = next(record for record in result["history"] if record["event"] == "eval")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    check = result["history"][0]
    assert check["step0_expected"] == pytest.approx(np.log(2) * some_weights()[first_epoch()[0]].mean(), abs=1e-12)
    assert check["step0_loss"] == pytest.approx(check["step0_expected"], abs=1e-5)


@pytest.mark.parametrize(
    ("weight_N", "weighting", "error", "message"),
    [
        ([0.5, -0.1] + [0.0] * 20, "loss", UserError, r"weight: got -0\.1 .* 1 of 22 pairs, first .*; valid: from 0$"),
        ([0.5, 1.5] + [0.0] * 20, "label", UserError, r"weight: got 1\.5 .*; valid: from 0 to 1, as weighting 'label'"),
        ([0.5, float("nan")] + [0.0] * 20, "loss", NonFiniteError, "weight: not finite for pair_ids"),
        ([0.5, float("inf")] + [0.0] * 20, "label", NonFiniteError, "weight: not finite for pair_ids"),
        ([0.0] * 22, "loss", UserError, "weight: got 0 for all 22 pairs"),
    ],
)
def test_weights_that_are_none_are_refused(
    policy: Case, tmp_path: Path, weight_N: list[float], weighting: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        policy.run(tmp_path, table=weighted(policy, weight_N), weight="w", weighting=weighting)


def test_a_table_without_weights_is_refused(policy: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weighting 'loss' needs the column 'weight'"):
        policy.run(tmp_path, weight="w")
    gap = policy.table.append_column("weight", pa.array([None] + [1.0] * 21))
    with pytest.raises(UserError, match="weight is null in 1 rows"):
        policy.run(tmp_path, table=gap, weight="w")
    # Weights that nobody asked for weigh nothing.
    assert (
        TrainingPairs.from_table(weighted(policy, some_weights())).weights("loss").tolist() == some_weights().tolist()
    )
    assert preference().config.weight is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weighting": "label"}, "weighting: got 'label' without weight; valid: the name of a metric"),
        (
            {"loss": "robust_dpo", "label_smoothing": 0.1},
            "weighting: got 'label' with loss 'robust_dpo', which assumes already that a share of 0.1",
        ),
        ({"label_smoothing": 0.2}, "weighting: got 'label' with loss 'dpo', which assumes already that a share of 0.2"),
        (
            {"loss": "dfpo", "num_aspects": 2, "divergence": "pd"},
            "weighting: got 'label' with loss 'dfpo', which takes preference_divergence of the pair as labelled",
        ),
        (
            {"loss": "weighted_dfpo", "aspect_weights": {"a": 1, "b": 2}, "divergence": "pd"},
            "weighting: got 'label' with loss 'weighted_dfpo', which takes preference_divergence, aspect_weight",
        ),
    ],
)
def test_a_loss_that_cannot_be_turned_is_refused(given: dict[str, Any], message: str) -> None:
    more = {} if given == {"weighting": "label"} else {"weight": "w", "weighting": "label"}
    with pytest.raises(ValueError, match=message):
        DpoOptions.model_validate({"learning_rate": 1e-3, **more, **given})
    if "loss" in given:  # its own weight multiplies any loss
        assert DpoOptions.model_validate({"learning_rate": 1e-3, "weight": "w", **given}).weighting == "loss"


def test_options_without_weights_are_written_as_before() -> None:
    plain = DpoOptions(learning_rate=1e-3).model_dump()
    assert not {"weight", "weighting"} & plain.keys()
    assert DpoOptions.model_validate(plain) == DpoOptions(learning_rate=1e-3)
    given = DpoOptions(learning_rate=1e-3, weight="w", weighting="label")
    assert DpoOptions.model_validate(given.model_dump()) == given


def test_every_exchangeable_loss_is_tried() -> None:
    from prefsel.config.losses import LOSSES

    refused = {"robust_dpo", "dfpo", "weighted_dfpo"}
    assert {name.split("-")[0] for name in EXCHANGEABLE} | refused == set(LOSSES.builtin)
