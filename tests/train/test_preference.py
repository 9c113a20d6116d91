"""What only the preference objective has: its records and self-checks, padding, adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny_policy import naive_logps
from tiny_rewards import reward_table
from tiny_runs import POLICY, Case, losses, policy_case, replaced, reward_case
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from prefsel.errors import IntegrityError, UserError


def test_records(policy: Case, plain_policy: dict[str, Any]) -> None:
    events = [(record["event"], record["step"]) for record in plain_policy["history"]]
    assert events == [("self_check", 0), ("eval", 0), *(("step", step) for step in range(1, 7)), ("eval", 6)]
    check, steps = plain_policy["history"][0], plain_policy["history"][2:8]
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
    written = (Path(plain_policy["model_dir"]).parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == plain_policy["history"]


def naive_margins(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[float]:
    """β times how much more than the reference a model prefers what was chosen, one sequence at a time."""
    with torch.no_grad():
        return [
            POLICY["beta"]
            * (
                naive_logps(model, tokenizer, row["prompt"], row["chosen"]).item()
                - row["reference_logps_chosen"]
                - naive_logps(model, tokenizer, row["prompt"], row["rejected"]).item()
                + row["reference_logps_rejected"]
            )
            for row in rows
        ]


def test_the_first_and_the_last_evaluation_keep_the_margin_of_every_pair(policy: Case, tmp_path: Path) -> None:
    result = policy.run(tmp_path, eval_every_steps=2, micro_batch_pairs=2)
    evaluations = [record for record in result["history"] if record["event"] == "eval"]
    assert [(record["step"], "margins" in record) for record in evaluations] == [
        (0, True), (2, False), (4, False), (6, True)
    ]  # fmt: skip
    assert policy.held_out is not None
    rows = policy.held_out.to_pylist()
    assert result["held_out_ids"] == [row["pair_id"] for row in rows]
    # One sequence at a time, under the exported weights and under those it started from.
    for record, folder in ((evaluations[0], policy.model_dir), (evaluations[-1], result["model_dir"])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(policy.model_dir)
        expected = naive_margins(model, tokenizer, rows)
        assert record["margins"] == pytest.approx(expected, abs=1e-4)
        assert record["margin"] == pytest.approx(sum(record["margins"]) / len(rows), abs=1e-12)
        agrees = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in record["margins"]]
        assert record["accuracy"] == sum(agrees) / len(rows)


def test_a_model_that_cannot_be_packed_is_padded_and_the_run_says_so(policy: Case, tmp_path: Path) -> None:
    torch.manual_seed(3)
    vocabulary = AutoModelForCausalLM.from_pretrained(policy.model_dir).config.vocab_size
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
    tokenizer = AutoTokenizer.from_pretrained(policy.model_dir)
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    table = policy.table
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            logps = [naive_logps(model, tokenizer, row["prompt"], row[side]).item() for row in table.to_pylist()]
        table = with_logps(table, f"reference_logps_{side}", lambda i, value, logps=logps: logps[i])
    gemma = policy_case(tmp_path / "gemma", table, policy.held_out)
    result = gemma.run(tmp_path / "out", zero_stage=2)
    assert "gemma2" in result["history"][0]["padding_reason"]
    assert result["history"][0]["reference_relative_error"] < 1e-5
    assert losses(result)[-1] < losses(result)[0] - 0.1


# ------------------------------------------------------------------------------------------------- self-checks


def with_logps(table: pa.Table, name: str, change: Any) -> pa.Table:
    values = [change(number, value) for number, value in enumerate(table[name].to_pylist())]
    return replaced(table, name, values)


def test_one_wrong_stored_log_prob_fails_the_run_and_is_named(policy: Case, tmp_path: Path) -> None:
    # Batches of one, the wrong pair not first: the step-0 loss is right and only the recomputation can see it.
    wrong = with_logps(policy.table, "reference_logps_rejected", lambda i, value: value * 1.01 if i == 5 else value)
    with pytest.raises(IntegrityError, match=f"1 of 22 recomputed pairs.*{5:032x}.*chat template"):
        policy.run(tmp_path, table=wrong, global_batch_pairs=1, reference_check_pairs=22)
    assert not (tmp_path / "model").exists()


def test_reference_of_another_model_fails_at_step_0(policy: Case, tmp_path: Path) -> None:
    wrong = with_logps(policy.table, "reference_logps_chosen", lambda i, value: value - 0.01)
    with pytest.raises(IntegrityError, match=r"step-0 loss: got 0\.69.*must be 0\.693147.*chat template"):
        policy.run(tmp_path, table=wrong)


def test_a_policy_that_is_not_the_reference_is_checked_against_the_reference_folder(
    policy: Case, plain_policy: dict[str, Any], tmp_path: Path
) -> None:
    trained = policy_case(Path(plain_policy["model_dir"]), policy.table, policy.held_out)
    options = {"policy_is_reference": False, "max_steps": 1}
    unchecked = trained.run(tmp_path / "unchecked", **options)
    assert unchecked["history"][0]["step0_loss"] is None
    assert unchecked["history"][0]["reference_relative_error"] is None
    checked = trained.run(tmp_path / "checked", reference_dir=str(policy.model_dir), **options)
    assert checked["history"][0]["reference_relative_error"] < 1e-5
    assert losses(checked) == losses(unchecked)
    with pytest.raises(IntegrityError, match="reference log-probs: 16 of 16"):
        trained.run(tmp_path / "wrong", reference_dir=str(trained.model_dir), **options)


# ------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_exports_adapter_and_merged_model(policy: Case, tmp_path: Path, stage: int) -> None:
    from peft import PeftModel

    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    options = {"lora": lora, "learning_rate": 3e-2, "zero_stage": stage}
    result = policy.run(tmp_path, checkpoint_every_steps=3, **options)
    assert losses(result)[-1] < losses(result)[0] - 0.05
    base = AutoModelForCausalLM.from_pretrained(policy.model_dir, dtype=torch.float32).eval()
    tokens = torch.tensor([[1, 3, 9, 2, 4, 11, 12, 2]])
    with torch.no_grad():
        untrained = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(result["model_dir"], dtype=torch.float32).eval()(tokens).logits
        adapted = PeftModel.from_pretrained(base, result["adapter_dir"]).eval()(tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (merged - untrained).abs().max() > 0.1
    resumed = policy.run(
        tmp_path / "resumed",
        resume_dir=tmp_path / "checkpoints" / "step-00000003",
        checkpoint_every_steps=3,
        **options,
    )
    assert resumed["history"] == result["history"]


def test_dropout_of_adapters_is_on_in_steps_and_off_in_evaluations(policy: Case, tmp_path: Path) -> None:
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "dropout": 0.5}
    without, with_dropout = (
        policy.run(tmp_path / name, learning_rate=3e-2, lora=lora | {"dropout": share})
        for name, share in (("without", 0.0), ("with", 0.5))
    )
    assert losses(with_dropout)[0] == pytest.approx(losses(without)[0], abs=1e-6)  # an adapter begins as nothing
    assert abs(losses(with_dropout)[1] - losses(without)[1]) > 1e-4
    assert policy.held_out is not None
    model = AutoModelForCausalLM.from_pretrained(with_dropout["model_dir"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy.model_dir)
    last = next(record for record in reversed(with_dropout["history"]) if record["event"] == "eval")
    assert last["margins"] == pytest.approx(naive_margins(model, tokenizer, policy.held_out.to_pylist()), abs=1e-3)


def test_lora_names_the_layers_there_are(policy: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: got \['qkv'\]; valid: all-linear, down_proj"):
        policy.run(tmp_path, lora={"r": 4, "alpha": 8, "target_modules": ["qkv"]})


@pytest.mark.parametrize("micro_batch_pairs", [1, 5])
def test_a_rotary_embedding_that_follows_the_length_trains_on_every_sequences_own(
    policy: Case, tmp_path: Path, micro_batch_pairs: int
) -> None:
    """Half of the conversations are beyond the length where Phi-3's factors change; each meets its own, as alone."""
    torch.manual_seed(3)
    vocabulary = AutoModelForCausalLM.from_pretrained(policy.model_dir).config.vocab_size
    tokenizer, table = AutoTokenizer.from_pretrained(policy.model_dir), policy.table
    lengths = [
        len(tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], return_dict=True)["input_ids"])
        for row in table.to_pylist()
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    assert min(lengths) < limit < max(lengths)
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 9.0]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        vocab_size=vocabulary,
        **sizes,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=limit,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    model = Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            logps = [naive_logps(model, tokenizer, row["prompt"], row[side]).item() for row in table.to_pylist()]
        table = with_logps(table, f"reference_logps_{side}", lambda i, value, logps=logps: logps[i])
    phi = policy_case(tmp_path / "phi", table, policy.held_out)
    result = phi.run(tmp_path / "out", micro_batch_pairs=micro_batch_pairs, reference_check_pairs=22)
    start = result["history"][0]
    assert "'longrope'" in start["padding_reason"]
    assert start["reference_relative_error"] < 1e-5
    assert start["step0_loss"] == pytest.approx(start["step0_expected"], abs=1e-6)
    assert losses(result)[-1] < losses(result)[0] - 0.05


def test_a_model_whose_padding_counts_is_refused_before_the_first_step(policy: Case, tmp_path: Path) -> None:
    vocabulary = AutoModelForCausalLM.from_pretrained(policy.model_dir).config.vocab_size
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    XLNetForSequenceClassification(
        XLNetConfig(vocab_size=vocabulary, num_labels=1, pad_token_id=0, initializer_range=0.3, **sizes)
    ).save_pretrained(tmp_path / "xlnet")
    AutoTokenizer.from_pretrained(policy.model_dir).save_pretrained(tmp_path / "xlnet")
    with pytest.raises(UserError, match="training takes two completions or more at once, and of this model what pads"):
        reward_case(tmp_path / "xlnet", reward_table(8)).run(tmp_path / "out", holdout=0.0)


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_the_first_step(policy: Case, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(policy.model_dir).save_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(policy.model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|more {n}|>" for n in range(400)]})
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match=r"small: its tokenizer has .* tokens and its embedding .* rows, none for token"
    ):
        policy.run(tmp_path / "out", model_dir=tmp_path / "small")
