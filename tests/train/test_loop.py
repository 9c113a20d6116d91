from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from naive_loop import NaiveRun, naive_training
from safetensors.torch import load_file
from tiny_policy import TinyRun, naive_logps
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.data import TrainingPairs, epoch_order
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.loop import train_dpo

# 22 pairs in batches of 8: 8 + 8 + 6 per epoch, so every run here has an incomplete batch.
DEFAULTS: dict[str, Any] = {
    "policy_is_reference": True,
    "learning_rate": 3e-3,
    "max_length": 128,
    "dtype": "fp32",
    "beta": 0.5,
    "num_epochs": 2,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "token_budget": 128,
    "zero_stage": 0,
    "warmup_ratio": 0.2,
}


def run(
    tiny_run: TinyRun,
    output_dir: Path,
    *,
    train: pa.Table | None = None,
    resume_dir: Path | None = None,
    report: Any = None,
    **options: Any,
) -> dict[str, Any]:
    return train_dpo(
        DpoConfig.model_validate({**DEFAULTS, **options}),
        TrainingPairs.from_table(tiny_run.train if train is None else train),
        TrainingPairs.from_table(tiny_run.held_out),
        model_dir=tiny_run.model_dir,
        output_dir=output_dir,
        report=report or (lambda record, checkpoint_dir: None),
        resume_dir=resume_dir,
    )


def losses(result: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in result["history"] if record["event"] == "step"]


def assert_same_history(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for got_record, want_record in zip(got, want, strict=True):
        assert got_record["event"] == want_record["event"]
        numbers = [
            {k: v for k, v in record.items() if isinstance(v, int | float)} for record in (got_record, want_record)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-5)


@pytest.fixture(scope="module")
def plain(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tiny_run, tmp_path_factory.mktemp("plain"))


# -------------------------------------------------------------------------------------------------- trajectory


def naive_dpo(tiny_run: TinyRun) -> NaiveRun:
    def loss_of(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        ratios = chosen - row["reference_logps_chosen"], rejected - row["reference_logps_rejected"]
        return -F.logsigmoid(DEFAULTS["beta"] * (ratios[0] - ratios[1]))

    batches = [epoch_order(22, seed=0, epoch=epoch)[s : s + 8] for epoch in (0, 1) for s in (0, 8, 16)]
    options = {"learning_rate": DEFAULTS["learning_rate"], "num_warmup_steps": 2}
    return naive_training(tiny_run, tiny_run.train, loss_of, batches, **options)


def test_trajectory_and_weights_are_those_of_a_textbook_loop(tiny_run: TinyRun, plain: dict[str, Any]) -> None:
    naive = naive_dpo(tiny_run)
    expected = naive.losses
    assert losses(plain) == pytest.approx(expected, abs=1e-5)
    # Clipping and Adam forgive a wrongly scaled gradient; its norm before clipping does not.
    got_norms = [record["grad_norm"] for record in plain["history"] if record["event"] == "step"]
    assert got_norms == pytest.approx(naive.norms, rel=1e-4)
    assert expected[-1] < expected[0] - 0.1  # it learns, so the comparison is about something
    exported = AutoModelForCausalLM.from_pretrained(plain["model_dir"], dtype=torch.float32)
    for (name, got), want in zip(exported.named_parameters(), naive.model.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=name)


def test_records(tiny_run: TinyRun, plain: dict[str, Any]) -> None:
    events = [(record["event"], record["step"]) for record in plain["history"]]
    assert events == [("self_check", 0), ("eval", 0), *(("step", step) for step in range(1, 7)), ("eval", 6)]
    check, steps = plain["history"][0], plain["history"][2:8]
    assert check["step0_loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert check["step0_expected"] == pytest.approx(math.log(2.0), abs=1e-12)
    assert check["step0_tolerance"] == 1e-4
    assert check["uses_reference"] is True
    assert check["reference_relative_error"] < 1e-5
    assert [record["consumed_pairs"] for record in steps] == [8, 16, 22, 30, 38, 44]
    assert [record["num_pairs"] for record in steps] == [8, 8, 6, 8, 8, 6]
    assert steps[2]["epoch"] == 1.0
    assert [record["lr"] for record in steps[:2]] == pytest.approx([1.5e-3, 3e-3])
    assert sum(record["num_tokens"] for record in steps[:3]) == sum(record["num_tokens"] for record in steps[3:])
    for record in steps:
        assert record["margin"] == pytest.approx(record["reward_chosen"] - record["reward_rejected"], abs=1e-9)
        assert record["grad_norm"] > 0
    written = (Path(plain["model_dir"]).parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == plain["history"]


def test_the_first_and_the_last_evaluation_keep_the_margin_of_every_pair(tiny_run: TinyRun, tmp_path: Path) -> None:
    result = run(tiny_run, tmp_path, eval_every_steps=2, micro_batch_pairs=2)
    evaluations = [record for record in result["history"] if record["event"] == "eval"]
    assert [(record["step"], "margins" in record) for record in evaluations] == [
        (0, True), (2, False), (4, False), (6, True)
    ]  # fmt: skip
    rows = tiny_run.held_out.to_pylist()
    assert result["held_out_ids"] == [row["pair_id"] for row in rows]
    # One sequence at a time, under the exported weights and under those it started from.
    for record, folder in ((evaluations[0], tiny_run.model_dir), (evaluations[-1], result["model_dir"])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_run.model_dir)
        with torch.no_grad():
            expected = [
                DEFAULTS["beta"]
                * (
                    naive_logps(model, tokenizer, row["prompt"], row["chosen"]).item()
                    - row["reference_logps_chosen"]
                    - naive_logps(model, tokenizer, row["prompt"], row["rejected"]).item()
                    + row["reference_logps_rejected"]
                )
                for row in rows
            ]
        assert record["margins"] == pytest.approx(expected, abs=1e-4)
        assert record["margin"] == pytest.approx(sum(record["margins"]) / len(rows), abs=1e-12)
        agrees = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in record["margins"]]
        assert record["accuracy"] == sum(agrees) / len(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_pairs": 1},
        {"micro_batch_pairs": 8, "token_budget": 8192},
        {"gradient_checkpointing": True},
        {"zero_stage": 1},
        {"zero_stage": 2, "micro_batch_pairs": 1},
        {"zero_stage": 3, "micro_batch_pairs": 1},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 3, "offload": "optimizer_and_weights"},
        {"zero_stage": 2, "offload": "optimizer", "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500}}},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(
    tiny_run: TinyRun, plain: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    result = run(tiny_run, tmp_path, **options)
    assert_same_history(result["history"], plain["history"])


def test_a_model_that_cannot_be_packed_is_padded_and_the_run_says_so(tiny_run: TinyRun, tmp_path: Path) -> None:
    torch.manual_seed(3)
    vocabulary = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir).config.vocab_size
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            initializer_range=0.3,
            attn_implementation="eager",
        )
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model_dir)
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    table = tiny_run.train
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            logps = [naive_logps(model, tokenizer, row["prompt"], row[side]).item() for row in table.to_pylist()]
        table = with_logps(table, f"reference_logps_{side}", lambda i, value, logps=logps: logps[i])
    gemma = TinyRun(tmp_path / "gemma", table, tiny_run.held_out)
    result = run(gemma, tmp_path / "out", zero_stage=2)
    assert "gemma2" in result["history"][0]["padding_reason"]
    assert result["history"][0]["reference_relative_error"] < 1e-5
    assert losses(result)[-1] < losses(result)[0] - 0.1


def test_bf16_learns_and_exports_bf16(tiny_run: TinyRun, tmp_path: Path) -> None:
    result = run(tiny_run, tmp_path, dtype="bf16", zero_stage=2)
    assert losses(result)[0] == pytest.approx(math.log(2.0), abs=5e-2)
    assert losses(result)[-1] < losses(result)[0] - 0.1
    weights = load_file(Path(result["model_dir"]) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------- self-checks


def with_logps(table: pa.Table, name: str, change: Any) -> pa.Table:
    values = [change(number, value) for number, value in enumerate(table[name].to_pylist())]
    return table.set_column(table.column_names.index(name), name, pa.array(values, pa.float64()))


def test_one_wrong_stored_log_prob_fails_the_run_and_is_named(tiny_run: TinyRun, tmp_path: Path) -> None:
    # Batches of one, the wrong pair not first: the step-0 loss is right and only the recomputation can see it.
    wrong = with_logps(tiny_run.train, "reference_logps_rejected", lambda i, value: value * 1.01 if i == 5 else value)
    with pytest.raises(IntegrityError, match=f"1 of 22 recomputed pairs.*{5:032x}.*chat template"):
        run(tiny_run, tmp_path, train=wrong, global_batch_pairs=1, reference_check_pairs=22)
    assert not (tmp_path / "model").exists()


def test_reference_of_another_model_fails_at_step_0(tiny_run: TinyRun, tmp_path: Path) -> None:
    wrong = with_logps(tiny_run.train, "reference_logps_chosen", lambda i, value: value - 0.01)
    with pytest.raises(IntegrityError, match=r"step-0 loss: got 0\.69.*must be 0\.693147.*chat template"):
        run(tiny_run, tmp_path, train=wrong)


def test_a_policy_that_is_not_the_reference_is_checked_against_the_reference_folder(
    tiny_run: TinyRun, plain: dict[str, Any], tmp_path: Path
) -> None:
    trained = TinyRun(Path(plain["model_dir"]), tiny_run.train, tiny_run.held_out)
    options = {"policy_is_reference": False, "max_steps": 1}
    unchecked = run(trained, tmp_path / "unchecked", **options)
    assert unchecked["history"][0]["step0_loss"] is None
    assert unchecked["history"][0]["reference_relative_error"] is None
    checked = run(trained, tmp_path / "checked", reference_dir=str(tiny_run.model_dir), **options)
    assert checked["history"][0]["reference_relative_error"] < 1e-5
    assert losses(checked) == losses(unchecked)
    with pytest.raises(IntegrityError, match="reference log-probs: 16 of 16"):
        run(trained, tmp_path / "wrong", reference_dir=str(trained.model_dir), **options)


def test_a_loss_that_is_not_finite_names_its_pair(tiny_run: TinyRun, tmp_path: Path) -> None:
    poisoned = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model_dir)
    word = tiny_run.train["chosen"][3].as_py()[0]["content"].split()[0]
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = math.nan
    poisoned.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    alone = tiny_run.train.slice(3, 1)
    options = {"policy_is_reference": False, "max_steps": 1}
    with pytest.raises(NonFiniteError, match=f"{3:032x}; no weight was changed"):
        run(TinyRun(tmp_path / "poisoned", alone, tiny_run.held_out.slice(0, 0)), tmp_path / "out", **options)


# ------------------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    """Stands for a worker that dies."""


@pytest.mark.parametrize("stage", [0, 3])
def test_kill_and_resume_is_a_clean_run(tiny_run: TinyRun, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage, "checkpoint_every_steps": 2, "eval_every_steps": 3}
    clean = run(tiny_run, tmp_path / "clean", **options)

    def dies_in_step_5(record: dict[str, Any], checkpoint_dir: Path | None) -> None:
        if record["event"] == "step" and record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_run, tmp_path / "killed", report=dies_in_step_5, **options)
    checkpoint = latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000004"
    reported: list[dict[str, Any]] = []
    resumed = run(
        tiny_run,
        tmp_path / "killed",
        resume_dir=checkpoint,
        report=lambda record, checkpoint_dir: reported.append(record),
        **options,
    )
    assert [record["step"] for record in reported] == [5, 6, 6]
    assert resumed["history"] == clean["history"]
    assert (tmp_path / "killed" / "history.jsonl").read_text() == (tmp_path / "clean" / "history.jsonl").read_text()
    weights = [load_file(Path(result["model_dir"]) / "model.safetensors") for result in (clean, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_with_other_options_or_data_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run(tiny_run, tmp_path, checkpoint_every_steps=6)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"beta: got 0\.1, saved with 0\.5"):
        run(tiny_run, tmp_path, resume_dir=checkpoint, beta=0.1)
    with pytest.raises(UserError, match="pairs: got"):
        run(tiny_run, tmp_path, resume_dir=checkpoint, train=tiny_run.train.slice(1))


# ------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_exports_adapter_and_merged_model(tiny_run: TinyRun, tmp_path: Path, stage: int) -> None:
    from peft import PeftModel

    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    options = {"lora": lora, "learning_rate": 3e-2, "zero_stage": stage}
    result = run(tiny_run, tmp_path, checkpoint_every_steps=3, **options)
    assert losses(result)[-1] < losses(result)[0] - 0.05
    base = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir, dtype=torch.float32).eval()
    tokens = torch.tensor([[1, 3, 9, 2, 4, 11, 12, 2]])
    with torch.no_grad():
        untrained = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(result["model_dir"], dtype=torch.float32).eval()(tokens).logits
        adapted = PeftModel.from_pretrained(base, result["adapter_dir"]).eval()(tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (merged - untrained).abs().max() > 0.1
    resumed = run(
        tiny_run,
        tmp_path / "resumed",
        resume_dir=tmp_path / "checkpoints" / "step-00000003",
        checkpoint_every_steps=3,
        **options,
    )
    assert resumed["history"] == result["history"]


def test_lora_names_the_layers_there_are(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: got \['qkv'\]; valid: all-linear, down_proj"):
        run(tiny_run, tmp_path, lora={"r": 4, "alpha": 8, "target_modules": ["qkv"]})


def test_an_export_that_does_not_reload_to_the_same_logits_fails(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefsel.train import export

    def forgets_a_layer(model: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        weights["model.layers.1.mlp.down_proj.weight"].zero_()
        return weights

    monkeypatch.setattr(export, "gather_weights", forgets_a_layer)
    with pytest.raises(IntegrityError, match="logits of the reloaded model differ"):
        run(tiny_run, tmp_path, max_steps=1)
    assert not (tmp_path / "model").exists()
