from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_policy import TinyRun
from tiny_rewards import naive_reward, reward_table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.models.attention import attention_area
from prefsel.models.chat import Encoder
from prefsel.models.loading import load_reward, model_shape
from prefsel.models.reward import packed_rewards, reward_route
from prefsel.models.tree import pack
from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.deepspeed_config import lr_factor
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_data import encode_reward_pairs, epoch_draws, plan_sampling
from prefsel.train.reward_loop import train_reward_model

# 26 of 28 pairs are trained on in batches of 8: 8 + 8 + 8 + 2 per epoch, so every run has an incomplete batch.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "max_length": 64,
    "dtype": "fp32",
    "num_epochs": 2,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "token_budget": 96,
    "zero_stage": 0,
    "warmup_ratio": 0.2,
    "length_balance_tau": 1.0,
    "length_penalty_rho": 0.05,
    "holdout": 0.1,
}
TABLE = reward_table(28)


def run(
    model_dir: Path,
    output_dir: Path,
    *,
    table: pa.Table = TABLE,
    resume_dir: Path | None = None,
    report: Any = None,
    **options: Any,
) -> dict[str, Any]:
    return train_reward_model(
        RewardConfig.model_validate({**DEFAULTS, **options}),
        table,
        model_dir=model_dir,
        output_dir=output_dir,
        report=report or (lambda record, checkpoint_dir: None),
        resume_dir=resume_dir,
    )


def steps(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in result["history"] if record["event"] == "step"]


def losses(result: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in steps(result)]


def assert_same_history(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for got_record, want_record in zip(got, want, strict=True):
        assert got_record["event"] == want_record["event"]
        numbers = [
            {k: v for k, v in record.items() if isinstance(v, int | float)} for record in (got_record, want_record)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-5)


@pytest.fixture(scope="module")
def classifier(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy's trunk under a random head: a start that both loops read from the same file."""
    folder = tmp_path_factory.mktemp("start") / "classifier"
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run.model_dir, num_labels=1, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(classifier, tmp_path_factory.mktemp("plain"))


# -------------------------------------------------------------------------------------------------- trajectory


def naive_training(classifier: Path) -> tuple[list[float], list[float], Any]:
    """Textbook Bradley–Terry: no packing, no DeepSpeed, one sequence at a time, the whole batch in one graph."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=DEFAULTS["learning_rate"], weight_decay=0.0)
    config = RewardConfig.model_validate(DEFAULTS)
    pairs = encode_reward_pairs(TABLE, Encoder(tokenizer), config)
    members = np.flatnonzero(~pairs.is_held_out_N)
    assert len(members) == 26
    sampling = plan_sampling(members, pairs.length_difference_N, 1.0)
    draws = [epoch_draws(sampling, epoch, seed=0, order="shuffled") for epoch in (0, 1)]
    batches = [epoch[start : start + 8] for epoch in draws for start in (0, 8, 16, 24)]
    rows, history, norms = TABLE.to_pylist(), [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = DEFAULTS["learning_rate"] * lr_factor(step, num_steps=8, num_warmup_steps=2, min_ratio=0.0)
        logits = []
        for row in (rows[i] for i in batch):
            chosen, rejected = (naive_reward(model, tokenizer, row["prompt"], row[s]) for s in ("chosen", "rejected"))
            # One token a word, and an end-of-turn each.
            words = [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")]
            logits.append(chosen - rejected - DEFAULTS["length_penalty_rho"] * (words[0] - words[1]))
        loss = -F.logsigmoid(torch.stack(logits)).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        history.append(loss.item())
    return history, norms, model


def test_trajectory_and_weights_are_those_of_a_textbook_loop(classifier: Path, plain: dict[str, Any]) -> None:
    expected, norms, model = naive_training(classifier)
    assert losses(plain) == pytest.approx(expected, abs=1e-5)
    # Clipping and Adam forgive a wrongly scaled gradient; its norm before clipping does not.
    assert [record["grad_norm"] for record in steps(plain)] == pytest.approx(norms, rel=1e-4)
    assert np.ptp(expected) > 0.2  # the weights move, so the comparison is about something
    exported = AutoModelForSequenceClassification.from_pretrained(plain["model_dir"], dtype=torch.float32)
    for (name, got), want in zip(exported.named_parameters(), model.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_pairs": 1},
        {"micro_batch_pairs": 8, "token_budget": 8192},
        {"gradient_checkpointing": True},
        {"zero_stage": 1},
        {"zero_stage": 2, "micro_batch_pairs": 1},
        {"zero_stage": 3},
        {"zero_stage": 3, "gradient_checkpointing": True, "offload": "optimizer_and_weights"},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(
    classifier: Path, plain: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    result = run(classifier, tmp_path, **options)
    assert_same_history(result["history"], plain["history"])
    assert result["flops_forward"] == pytest.approx(plain["flops_forward"], rel=1e-12)
    assert result["flops_train"] == (4 if options.get("gradient_checkpointing") else 3) * result["flops_forward"]


# --------------------------------------------------------------------------------------------- what it returns


def test_records_and_result(classifier: Path, plain: dict[str, Any]) -> None:
    events = [(record["event"], record["step"]) for record in plain["history"]]
    assert events == [("sampling", 0), ("eval", 0), *(("step", step) for step in range(1, 9)), ("eval", 8)]
    assert [record["consumed_pairs"] for record in steps(plain)] == [8, 16, 24, 26, 34, 42, 50, 52]
    assert [record["num_pairs"] for record in steps(plain)] == [8, 8, 8, 2, 8, 8, 8, 2]
    assert [record["lr"] for record in steps(plain)[:2]] == pytest.approx([1.5e-3, 3e-3])
    assert (plain["num_steps"], plain["num_pairs"]) == (8, 26)
    assert plain["dropped"] == {"too_long": 0, "template_error": 0, "reward_holdout": 2}
    written = (Path(plain["model_dir"]).parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == plain["history"]
    json.dumps(plain, allow_nan=False)


def test_the_prompts_trained_on_or_held_out_lie_beside_the_weights(plain: dict[str, Any]) -> None:
    table = pq.read_table(Path(plain["model_dir"]) / "trained_on.parquet")
    assert table.schema.equals(pa.schema([("prompt_id", pa.binary(16))]))
    assert table["prompt_id"].to_pylist() == sorted({bytes.fromhex(one) for one in TABLE["prompt_id"].to_pylist()})


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_holdout_is_measured_on_debiased_margins(
    classifier: Path, tmp_path: Path, when: str, request: pytest.FixtureRequest
) -> None:
    result = run(classifier, tmp_path, holdout=0.6, max_steps=3)
    folder = classifier if when == "before" else result["model_dir"]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    config = RewardConfig.model_validate({**DEFAULTS, "holdout": 0.6})
    held_out = encode_reward_pairs(TABLE, Encoder(tokenizer), config).is_held_out_N
    margins, longer = [], []
    for row, is_held_out in zip(TABLE.to_pylist(), held_out):
        if is_held_out:
            with torch.no_grad():
                rewards = [naive_reward(model, tokenizer, row["prompt"], row[s]).item() for s in ("chosen", "rejected")]
            words = [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")]
            margins.append(rewards[0] - rewards[1] - 0.05 * (words[0] - words[1]))
            longer.append(words[0] >= words[1])
    got = result[f"holdout_{when}"]
    assert got["num_pairs"] == len(margins) == result["dropped"]["reward_holdout"]
    assert got["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-5)
    agrees = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert got["accuracy"] == pytest.approx(np.mean(agrees))
    assert got["accuracy_longer_chosen"] == pytest.approx(np.mean([a for a, long in zip(agrees, longer) if long]))
    assert sum(entry["num_pairs"] for entry in got["calibration"]["bins"]) == len(margins)


def test_without_held_out_pairs_there_is_no_evaluation(classifier: Path, tmp_path: Path) -> None:
    result = run(classifier, tmp_path, holdout=0.0, max_steps=1)
    assert result["holdout_before"] is None
    assert result["holdout_after"] is None
    assert [record["event"] for record in result["history"]] == ["sampling", "step"]
    assert result["num_pairs"] == 28


def test_flops_are_those_of_scoring_every_draw(classifier: Path, tmp_path: Path) -> None:
    result = run(classifier, tmp_path, num_epochs=1, length_balance_tau=None, holdout=0.0)
    model = load_reward(str(classifier), dtype="fp32", device="cpu")
    encoder = Encoder(AutoTokenizer.from_pretrained(classifier))
    groups = encoder.encode_groups([(r["prompt"], [r["chosen"], r["rejected"]]) for r in TABLE.to_pylist()])
    rows = pack(groups, 200)
    expected = sum(
        model_shape(model).flops(trunk_tokens=row.trunk_tokens, head_rows=0, attention_area=attention_area(row.runs))
        for row in rows
    )
    assert result["flops_forward"] == pytest.approx(expected)
    sharded = run(classifier, tmp_path / "3", num_epochs=1, length_balance_tau=None, holdout=0.0, zero_stage=3)
    assert sharded["flops_forward"] == result["flops_forward"]


# ---------------------------------------------------------------------------------------------------- learning


def test_it_learns_a_planted_preference(tiny_run: TinyRun, tmp_path: Path) -> None:
    options = {"learning_rate": 5e-3, "num_epochs": 3, "global_batch_pairs": 16, "micro_batch_pairs": 16}
    more = {"token_budget": 8192, "length_penalty_rho": 0.0, "holdout": 0.2, "zero_stage": 2}
    result = run(tiny_run.model_dir, tmp_path, table=reward_table(400), **options, **more)
    before, after = result["holdout_before"], result["holdout_after"]
    assert before["accuracy"] < 0.7
    assert after["accuracy"] > 0.9
    assert after["loss"] < 0.2 < before["loss"]


def test_bf16_follows_fp32_and_exports_bf16(classifier: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    result = run(classifier, tmp_path, dtype="bf16", zero_stage=2)
    assert losses(result) == pytest.approx(losses(plain), abs=0.05)
    weights = load_file(Path(result["model_dir"]) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_balanced_sampling_evens_out_a_length_biased_corpus(classifier: Path, tmp_path: Path) -> None:
    table = reward_table(60)
    lengths = [[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in table.to_pylist()]
    longer = [number for number, (chosen, rejected) in enumerate(lengths) if chosen >= rejected]
    shorter = [number for number, (chosen, rejected) in enumerate(lengths) if chosen < rejected]
    biased = table.take(pa.array(longer[:27] + shorter[:3]))  # the longer one is chosen in 27 of 30
    options = {"table": biased, "holdout": 0.0, "num_epochs": 2, "learning_rate": 1e-5}

    def drawn(result: dict[str, Any]) -> int:
        return round(sum(record["longer_chosen"] * record["num_pairs"] for record in steps(result)))

    as_they_come = run(classifier, tmp_path / "none", length_balance_tau=None, **options)
    assert drawn(as_they_come) == 54
    balanced = run(classifier, tmp_path / "balanced", length_balance_tau=1e6, **options)
    assert drawn(balanced) == 30
    assert balanced["sampling"] == {"longer_chosen_share": 0.9, "longer_chosen_frequency": 0.5, "warnings": []}


def test_a_temperature_that_makes_it_worse_is_warned_of(
    classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="prefsel"):
        result = run(classifier, tmp_path, length_balance_tau=0.2, max_steps=1)
    assert "0.2 is below 0.5" in caplog.text
    assert result["sampling"]["warnings"] == result["history"][0]["warnings"] != []


# ------------------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    """Stands for a worker that dies."""


@pytest.mark.parametrize("stage", [0, 3])
def test_kill_and_resume_is_a_clean_run(classifier: Path, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage, "checkpoint_every_steps": 3, "eval_every_steps": 4}
    clean = run(classifier, tmp_path / "clean", **options)

    def dies_in_step_5(record: dict[str, Any], checkpoint_dir: Path | None) -> None:
        if record["event"] == "step" and record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run(classifier, tmp_path / "killed", report=dies_in_step_5, **options)
    checkpoint = latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000003"
    reported: list[dict[str, Any]] = []
    resumed = run(
        classifier,
        tmp_path / "killed",
        resume_dir=checkpoint,
        report=lambda record, checkpoint_dir: reported.append(record),
        **options,
    )
    assert [record["step"] for record in reported] == [4, 4, 5, 6, 7, 8, 8]
    same = {key for key in clean if key not in ("model_dir", "max_output_difference")}
    assert {key: resumed[key] for key in same} == {key: clean[key] for key in same}
    weights = [load_file(Path(result["model_dir"]) / "model.safetensors") for result in (clean, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_with_other_options_or_data_is_refused(classifier: Path, tmp_path: Path) -> None:
    run(classifier, tmp_path, checkpoint_every_steps=2, max_steps=2)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"length_balance_tau: got 2\.0, saved with 1\.0"):
        run(classifier, tmp_path, resume_dir=checkpoint, max_steps=2, length_balance_tau=2.0)
    with pytest.raises(UserError, match="pairs: got"):
        run(classifier, tmp_path, resume_dir=checkpoint, max_steps=2, table=TABLE.slice(1))


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("stage", [0, 3])
def test_a_causal_model_lends_its_trunk_to_a_seeded_head(tiny_run: TinyRun, tmp_path: Path, stage: int) -> None:
    results = [
        run(tiny_run.model_dir, tmp_path / str(seed), zero_stage=stage, seed=seed, max_steps=1, learning_rate=1e-12)
        for seed in (0, 0, 1)
    ]
    untrained = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir).state_dict()
    weights = [load_file(Path(result["model_dir"]) / "model.safetensors") for result in results]
    assert set(weights[0]) == {name for name in untrained if name != "lm_head.weight"} | {"score.weight"}
    for name in set(weights[0]) - {"score.weight"}:
        torch.testing.assert_close(weights[0][name], untrained[name], rtol=0, atol=1e-9)
    heads = [weight["score.weight"] for weight in weights]
    assert heads[0].shape == (1, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2], atol=1e-3)
    expected = 0.3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))  # the model's initializer_range
    torch.testing.assert_close(heads[0], expected, rtol=0, atol=1e-9)


def assert_loads_to_the_same_numbers(model_dir: Path, *, sides: tuple[str, ...] = ("left", "right")) -> None:
    """The exported folder: our packed rows, transformers one by one, and transformers padded on either side."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    theirs = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == tokenizer.pad_token_id
    ours = load_reward(str(model_dir), dtype="fp32", device="cpu")
    assert reward_route(ours).is_packed
    rows = TABLE.to_pylist()[:5]
    groups = Encoder(tokenizer).encode_groups([(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
    (batch,) = pack(groups, 10_000)
    with torch.no_grad():
        packed = dict(zip(batch.completion_index, packed_rewards(ours, batch)[:, 0].tolist()))
        single = {
            (number, side): naive_reward(theirs, tokenizer, row["prompt"], row[name]).item()
            for number, row in enumerate(rows)
            for side, name in enumerate(("chosen", "rejected"))
        }
        for side in sides:
            texts = [groups[number].prompt_tokens + groups[number].completion_tokens[c] for number, c in single]
            padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt", padding_side=side)
            together = theirs(**padded).logits[:, 0].tolist()
            assert together == pytest.approx(list(single.values()), abs=1e-4)
    assert packed == pytest.approx(single, abs=1e-5)
    assert np.ptp(list(single.values())) > 0.1


def test_the_exported_folder_gives_our_numbers_to_transformers(plain: dict[str, Any]) -> None:
    assert plain["max_output_difference"] < 1e-5
    assert_loads_to_the_same_numbers(Path(plain["model_dir"]))


def test_a_model_with_dropout_and_without_a_pad_token(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 45, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=None))
    assert model.config.attn_pdrop == 0.1
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    written = tmp_path / "gpt2" / "tokenizer_config.json"
    settings = json.loads(written.read_text())
    del settings["pad_token"]
    written.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt2").pad_token_id is None
    result = run(tmp_path / "gpt2", tmp_path / "out", zero_stage=2)
    assert losses(result)[-1] < losses(result)[0]
    one_by_one = run(tmp_path / "gpt2", tmp_path / "one", zero_stage=2, micro_batch_pairs=1)
    assert losses(one_by_one) == pytest.approx(losses(result), abs=2e-5)  # its dropout of 0.1 is off
    exported = AutoTokenizer.from_pretrained(result["model_dir"])
    assert exported.pad_token_id == exported.eos_token_id == 2
    # With learnt positions, padding on the left moves every token: there transformers itself gives other numbers.
    assert_loads_to_the_same_numbers(Path(result["model_dir"]), sides=("right",))


def test_a_model_that_cannot_be_packed_is_padded_and_the_run_says_so(tiny_run: TinyRun, tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "initializer_range": 0.3}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=45, **sizes, **more, attn_implementation="eager"))
    model.save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(tmp_path / "gemma")
    results = [
        run(tmp_path / "gemma", tmp_path / str(pairs), zero_stage=2, micro_batch_pairs=pairs) for pairs in (1, 5)
    ]
    assert "gemma2" in results[0]["history"][0]["padding_reason"]
    assert losses(results[0]) == pytest.approx(losses(results[1]), abs=2e-5)
    assert losses(results[0])[-1] < losses(results[0])[0]
    assert results[0]["max_output_difference"] < 1e-5


def test_what_cannot_become_a_reward_model_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run.model_dir, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match=r"num_labels of model .*three: got 3; valid: 1, or a causal"):
        run(tmp_path / "three", tmp_path / "out")
    weights = load_file(tiny_run.model_dir / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_run.model_dir / name).read_bytes())
    from safetensors.torch import save_file

    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"must lack score\.weight and nothing else.*down_proj"):
        run(tmp_path, tmp_path / "out")


def test_a_reward_that_is_not_finite_names_its_pair(classifier: Path, tmp_path: Path) -> None:
    poisoned = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    words = [set(row["prompt"][0]["content"].split()) for row in TABLE.to_pylist()]
    word = sorted(words[3])[0]
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = math.nan
    poisoned.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    with pytest.raises(NonFiniteError, match=f"{3:032x}; no weight was changed"):
        run(tmp_path / "poisoned", tmp_path / "out", table=TABLE.slice(3, 1), holdout=0.0)
    assert not (tmp_path / "out" / "model").exists()


def test_an_export_that_does_not_reload_to_the_same_rewards_fails(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefsel.train import reward_export

    def forgets_a_layer(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        weights["model.layers.1.mlp.down_proj.weight"].zero_()
        return weights

    monkeypatch.setattr(reward_export, "gather_weights", forgets_a_layer)
    with pytest.raises(IntegrityError, match="rewards of the reloaded model differ"):
        run(classifier, tmp_path, max_steps=1)
    assert not (tmp_path / "model").exists()
