"""Whole trainings with every loss, its columns and its self-checks, against a textbook loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from naive_loop import NaiveRun, naive_training
from tiny_policy import naive_logps
from tiny_runs import Case, first_epoch, losses, policy_case, replaced, steps
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.train import loop
from prefsel.train.batch import evaluate
from prefsel.train.checkpoint import latest_checkpoint

BETA = 0.5
THREE_STEPS = {"num_epochs": 1, "warmup_ratio": 0.3}
"""Of 8, 8 and 6 pairs."""
NUM_ASPECTS = 4
WEIGHTS = {"honesty": 1.0, "helpfulness": 3.0}
LossOfPair = Callable[[dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor]
REFERENCE = ["reference_logps_chosen", "reference_logps_rejected"]
DFPO = {"loss": "dfpo", "num_aspects": NUM_ASPECTS, "divergence": "pd"}
WEIGHTED = {"loss": "weighted_dfpo", "aspect_weights": WEIGHTS, "divergence": "pd"}


def run(
    policy: Case, output_dir: Path, train: pa.Table, held_out: pa.Table | None = None, **options: Any
) -> dict[str, Any]:
    return replace(policy, held_out=held_out).run(output_dir, table=train, **{**THREE_STEPS, **options})


def textbook(policy: Case, table: pa.Table, loss: LossOfPair, batches: list[Any], *, num_warmup_steps: int) -> NaiveRun:
    model = AutoModelForCausalLM.from_pretrained(policy.model_dir, dtype=torch.float32)
    tokenizer, options = AutoTokenizer.from_pretrained(policy.model_dir), {"learning_rate": 3e-3, "output": naive_logps}
    rows = table.to_pylist()
    return naive_training(model, tokenizer, rows, batches, loss=loss, num_warmup_steps=num_warmup_steps, **options)


def with_columns(table: pa.Table) -> pa.Table:
    """PD, aspect, score, and the numbers of response tokens (for the naive loop only)."""
    rng = np.random.default_rng(3)
    table = table.append_column("preference_divergence", pa.array(rng.uniform(-3, 3, len(table))))
    table = table.append_column("aspect", pa.array(rng.choice(list(WEIGHTS), len(table))))
    table = table.append_column("score", pa.array(np.round(rng.normal(size=len(table)), 1)))
    for side in ("chosen", "rejected"):
        words = [len(row[0]["content"].split()) + 1 for row in table[side].to_pylist()]  # and the end of turn
        table = table.append_column(f"num_tokens_{side}", pa.array(words))
    return table


@pytest.fixture(scope="module")
def train(policy: Case) -> pa.Table:
    return with_columns(policy.table)


# -------------------------------------------------------------------------------------------------- trajectories


def ratios(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen - row["reference_logps_chosen"], rejected - row["reference_logps_rejected"]


def margin(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    of_chosen, of_rejected = ratios(row, chosen, rejected)
    return BETA * (of_chosen - of_rejected)


def per_token(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return chosen / row["num_tokens_chosen"] - rejected / row["num_tokens_rejected"]


def robust(row: dict[str, Any], *logps: torch.Tensor) -> torch.Tensor:
    m = margin(row, *logps)
    return -(0.8 * F.logsigmoid(m) - 0.2 * F.logsigmoid(-m)) / 0.6


RUNS: list[tuple[dict[str, Any], LossOfPair, float | None]] = [
    ({"loss": "robust_dpo", "label_smoothing": 0.2}, robust, math.log(2.0)),
    ({"loss": "hinge"}, lambda row, *y: torch.relu(1 - margin(row, *y)), 1.0),
    ({"loss": "ipo"}, lambda row, *y: (margin(row, *y) / BETA - 1 / (2 * BETA)) ** 2, 1 / (4 * BETA**2)),
    (
        {"loss": "ipo", "ipo_reduction": "mean"},
        lambda row, *y: (per_token(row, *ratios(row, *y)) - 1 / (2 * BETA)) ** 2,
        1 / (4 * BETA**2),
    ),
    (
        {"loss": "length_normalised_dpo", "beta": 5.0},
        lambda row, *y: -F.logsigmoid(5.0 * per_token(row, *ratios(row, *y))),
        math.log(2.0),
    ),
    ({"loss": "simpo", "simpo_gamma": 0.3}, lambda row, *y: -F.logsigmoid(BETA * per_token(row, *y) - 0.3), None),
    (
        DFPO,
        lambda row, *y: -F.logsigmoid(NUM_ASPECTS * margin(row, *y) + row["preference_divergence"]),
        math.nan,  # mean softplus(-PD) of the first batch
    ),
    (
        WEIGHTED,
        lambda row, *y: -F.logsigmoid(margin(row, *y) * 4 / WEIGHTS[row["aspect"]] + row["preference_divergence"]),
        math.nan,
    ),
]


@pytest.mark.parametrize(("options", "loss_of", "at_start"), RUNS, ids=[str(run[0])[:50] for run in RUNS])
def test_a_training_follows_the_textbook(
    policy: Case,
    train: pa.Table,
    tmp_path: Path,
    options: dict[str, Any],
    loss_of: LossOfPair,
    at_start: float | None,
) -> None:
    batches = first_epoch()
    if at_start is not None and math.isnan(at_start):
        first = train["preference_divergence"].to_numpy()[batches[0]]
        at_start = np.logaddexp(0.0, -first).mean()
    table = train.drop_columns(REFERENCE) if at_start is None else train
    naive = textbook(policy, train, loss_of, batches, num_warmup_steps=1)
    result = run(policy, tmp_path, table, **options)
    assert losses(result) == pytest.approx(naive.losses, rel=2e-5, abs=1e-5)
    norms = [record["grad_norm"] for record in steps(result)]
    assert norms == pytest.approx(naive.norms, rel=1e-3)
    check = result["history"][0]
    assert check["uses_reference"] is (at_start is not None)
    if at_start is None:
        assert check["step0_loss"] is check["step0_expected"] is check["reference_relative_error"] is None
    else:
        assert check["step0_expected"] == pytest.approx(at_start, abs=1e-12)
        assert check["step0_loss"] == pytest.approx(at_start, abs=1e-3)
        assert check["reference_relative_error"] < 1e-5


def test_dfpo_learns_more_from_consensus_than_from_conflict(policy: Case, tmp_path: Path) -> None:
    # PD 4 on the first half (the other aspects contradict the label), -4 on the second.
    divergence = pa.array([4.0] * 11 + [-4.0] * 11)
    train = policy.table.append_column("preference_divergence", divergence)
    result = run(policy, tmp_path / "a", train, **DFPO, num_epochs=6)
    trained = policy_case(Path(result["model_dir"]), policy.table, policy.held_out)
    assert losses(result)[-1] < losses(result)[0] - 0.3

    def margin_of(rows: pa.Table) -> float:
        options = {"policy_is_reference": False, "max_steps": 1, "learning_rate": 1e-12}
        return run(trained, tmp_path / "b", rows, rows, **options)["history"][1]["margin"]

    assert margin_of(policy.table.slice(11)) > margin_of(policy.table.slice(0, 11)) + 0.1


# -------------------------------------------------------------------------------------------------------- order


def test_easy_to_hard_follows_the_score_in_every_epoch(policy: Case, train: pa.Table, tmp_path: Path) -> None:
    order = sorted(range(22), key=lambda i: (-train["score"][i].as_py(), train["pair_id"][i].as_py()))
    assert order != list(range(22))
    assert len(set(train["score"].to_pylist())) < 22  # there are ties
    batches = [order[start : start + 8] for start in (0, 8, 16)] * 2
    naive = textbook(policy, train, lambda row, *y: -F.logsigmoid(margin(row, *y)), batches, num_warmup_steps=2)
    result = run(policy, tmp_path / "score", train, order="score", num_epochs=2)
    assert losses(result) == pytest.approx(naive.losses, abs=2e-5)
    backwards = train.take(list(reversed(range(22))))
    again = run(policy, tmp_path / "reversed", backwards, order="score", num_epochs=2)
    assert losses(again) == pytest.approx(losses(result), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ columns


def test_held_out_pairs_without_divergence_have_an_accuracy_but_no_loss(
    policy: Case, train: pa.Table, tmp_path: Path
) -> None:
    without = run(policy, tmp_path / "without", train, policy.held_out, **DFPO, max_steps=1)
    scored = with_columns(policy.held_out)
    with_loss = run(policy, tmp_path / "with", train, scored, **DFPO, max_steps=1)
    for index in (1, 3):
        bare, full = without["history"][index], with_loss["history"][index]
        assert bare["event"] == full["event"] == "eval"
        assert bare["loss"] is None
        assert bare["margin"] == full["margin"]
    assert with_loss["history"][1]["loss"] == pytest.approx(
        np.logaddexp(0.0, -scored["preference_divergence"].to_numpy()).mean(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        (
            DFPO,
            lambda t: t.drop_columns(["preference_divergence"]),
            UserError,
            "'dfpo' needs the column 'preference_div",
        ),
        (
            DFPO,
            lambda t: replaced(t, "preference_divergence", [None] * 2 + [0.0] * 20),
            UserError,
            f"preference_divergence is null in 2 rows, first: {0:032x}",
        ),
        (
            DFPO,
            lambda t: replaced(t, "preference_divergence", [0.0] * 21 + [math.inf]),
            NonFiniteError,
            f"preference_divergence: not finite for pair_ids {21:032x}",
        ),
        (WEIGHTED, lambda t: t.drop_columns(["aspect"]), UserError, "aspect_weights needs the column 'aspect'"),
        (
            WEIGHTED,
            lambda t: replaced(t, "aspect", ["truth"] * 22),
            UserError,
            r"aspect_weights: got \['helpfulness', 'honesty'\].*'truth'",
        ),
        ({"order": "score"}, lambda t: t.drop_columns(["score"]), UserError, "order 'score' needs the column 'score'"),
        ({}, lambda t: t.drop_columns(REFERENCE), UserError, "loss 'dpo' needs the columns.*reference_logps_chosen"),
    ],
    ids=str,
)
def test_a_table_without_what_the_loss_needs_is_refused(
    policy: Case, train: pa.Table, tmp_path: Path, options: Any, change: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(policy, tmp_path, change(train), **options)


def test_what_a_loss_does_not_need_may_be_anything(policy: Case, train: pa.Table, tmp_path: Path) -> None:
    odd = replaced(replaced(train, "score", [None] * 22), "preference_divergence", [math.nan] * 22)
    assert losses(run(policy, tmp_path / "odd", odd, max_steps=1)) == losses(
        run(policy, tmp_path / "plain", policy.table, max_steps=1)
    )


def test_a_checkpoint_belongs_to_its_divergences(policy: Case, train: pa.Table, tmp_path: Path) -> None:
    first = run(policy, tmp_path, train, **DFPO, checkpoint_every_steps=1)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    again = run(policy, tmp_path / "again", train, **DFPO, checkpoint_every_steps=1, resume_dir=checkpoint)
    assert again["history"] == first["history"]
    assert again["flops_forward"] == first["flops_forward"]
    other = replaced(train, "preference_divergence", [0.0] * 22)
    with pytest.raises(UserError, match="pairs: got"):
        run(policy, tmp_path, other, **DFPO, resume_dir=checkpoint)


def test_step_0_finds_a_wrong_reference_whatever_the_loss(policy: Case, train: pa.Table, tmp_path: Path) -> None:
    wrong = replaced(train, "reference_logps_chosen", [x - 0.05 for x in train["reference_logps_chosen"].to_pylist()])
    for options in (DFPO, WEIGHTED, {"loss": "ipo"}, {"loss": "hinge"}):
        with pytest.raises(IntegrityError, match=f"step-0 loss: got .*the loss '{options['loss']}' of zero margins"):
            run(policy, tmp_path, wrong, **options)


# -------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("options", [{"zero_stage": 0}, {"zero_stage": 3}, {"gradient_checkpointing": True}], ids=str)
def test_flops_are_those_that_torch_counts(
    policy: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    counted: dict[str, int] = {"train": 0, "forward": 0}
    step = loop.train_step

    def counting_step(run_: Any, pairs: Any, batch_B: Any) -> dict[str, Any]:
        with FlopCounterMode(display=False) as of_forward:
            evaluate(run_, pairs, batch_B)
        with FlopCounterMode(display=False) as of_step:
            record = step(run_, pairs, batch_B)
        counted["forward"] += of_forward.get_total_flops()
        counted["train"] += of_step.get_total_flops()
        return record

    monkeypatch.setattr(loop, "train_step", counting_step)
    result = run(policy, tmp_path, policy.table, **options)
    assert result["flops_forward"] == counted["forward"]
    assert result["flops_forward"] == sum(record["flops_forward"] for record in steps(result))
    if options.get("gradient_checkpointing"):  # the head, a fifth of this policy, is not computed again
        assert 3.5 * counted["forward"] < counted["train"] < result["flops_train"] == 4 * counted["forward"]
    else:
        assert result["flops_train"] == counted["train"]
