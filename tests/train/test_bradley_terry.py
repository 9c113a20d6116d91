"""What only the reward objective has: held-out prompts, length balance, fresh heads, padding."""

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
from safetensors.torch import load_file
from tiny_policy import TinyRun
from tiny_rewards import is_held_out, naive_reward, reward_table
from tiny_runs import Case, bradley_terry, losses, steps, weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from prefsel.errors import UserError
from prefsel.models.architecture import model_shape
from prefsel.models.chat import Encoder
from prefsel.models.layout import attention_area
from prefsel.models.loading import load_reward
from prefsel.models.packing import pack
from prefsel.models.reward import packed_rewards, reward_route
from prefsel.train.data import TrainingPairs
from prefsel.train.engine import start_worker

TABLE = reward_table(28)


# --------------------------------------------------------------------------------------------- what it returns


def test_records_and_result(rewards: Case, plain_rewards: dict[str, Any]) -> None:
    events = [(record["event"], record["step"]) for record in plain_rewards["history"]]
    assert events == [("sampling", 0), ("eval", 0), *(("step", step) for step in range(1, 9)), ("eval", 8)]
    assert [record["consumed_pairs"] for record in steps(plain_rewards)] == [8, 16, 24, 26, 34, 42, 50, 52]
    assert [record["num_pairs"] for record in steps(plain_rewards)] == [8, 8, 8, 2, 8, 8, 8, 2]
    assert [record["lr"] for record in steps(plain_rewards)[:2]] == pytest.approx([1.5e-3, 3e-3])
    assert (plain_rewards["num_steps"], plain_rewards["num_pairs"]) == (8, 26)
    assert plain_rewards["dropped"] == {"too_long": 0, "template_error": 0, "reward_holdout": 2}
    written = (Path(plain_rewards["model_dir"]).parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == plain_rewards["history"]
    json.dumps(plain_rewards, allow_nan=False)


def test_the_prompts_trained_on_or_held_out_lie_beside_the_weights(plain_rewards: dict[str, Any]) -> None:
    table = pq.read_table(Path(plain_rewards["model_dir"]) / "trained_on.parquet")
    assert table.schema.equals(pa.schema([("prompt_id", pa.binary(16))]))
    assert table["prompt_id"].to_pylist() == sorted({bytes.fromhex(one) for one in TABLE["prompt_id"].to_pylist()})


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_holdout_is_measured_on_debiased_margins(
    rewards: Case, tmp_path: Path, when: str, request: pytest.FixtureRequest
) -> None:
    result = rewards.run(tmp_path, holdout=0.6, max_steps=3)
    folder = rewards.model_dir if when == "before" else result["model_dir"]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(rewards.model_dir)
    margins, longer = [], []
    for row in TABLE.to_pylist():
        if is_held_out(row["prompt_id"], 0.6):
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


def test_without_held_out_pairs_there_is_no_evaluation(rewards: Case, tmp_path: Path) -> None:
    result = rewards.run(tmp_path, holdout=0.0, max_steps=1)
    assert result["holdout_before"] is None
    assert result["holdout_after"] is None
    assert [record["event"] for record in result["history"]] == ["sampling", "step"]
    assert result["num_pairs"] == 28


def test_flops_are_those_of_scoring_every_draw(rewards: Case, tmp_path: Path) -> None:
    result = rewards.run(tmp_path, num_epochs=1, length_balance_tau=None, holdout=0.0)
    model = load_reward(str(rewards.model_dir), dtype="fp32", device="cpu")
    encoder = Encoder(AutoTokenizer.from_pretrained(rewards.model_dir))
    groups = encoder.encode_groups([(r["prompt"], [r["chosen"], r["rejected"]]) for r in TABLE.to_pylist()])
    rows = pack(groups, 200)
    expected = sum(
        model_shape(model).flops(
            trunk_tokens=row.trunk_tokens, head_rows=0, attention_area=attention_area(row.segments)
        )
        for row in rows
    )
    assert result["flops_forward"] == pytest.approx(expected)
    sharded = rewards.run(tmp_path / "3", num_epochs=1, length_balance_tau=None, holdout=0.0, zero_stage=3)
    assert sharded["flops_forward"] == result["flops_forward"]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6])
def test_prompts_are_held_out_by_their_hash(tokenizer: Any, fraction: float) -> None:
    start_worker()
    table = reward_table(200)
    corpus = bradley_terry(holdout=fraction).prepare(TrainingPairs.from_table(table), None, Encoder(tokenizer))
    prompts = table["prompt_id"].to_pylist()
    assert corpus.prompt_ids == [bytes.fromhex(prompt) for prompt in prompts]
    expected = [number for number, prompt in enumerate(prompts) if is_held_out(prompt, fraction)]
    assert corpus.eval_indices.tolist() == expected
    assert not set(expected) & set(corpus.draws.of_epoch(0).tolist())
    assert corpus.dropped == {"too_long": 0, "template_error": 0, "reward_holdout": len(expected)}
    assert len(expected) == pytest.approx(200 * fraction, abs=25)


def test_what_it_cannot_be_trained_or_evaluated_on_is_refused(tokenizer: Any) -> None:
    pairs, encoder = TrainingPairs.from_table(reward_table(3)), Encoder(tokenizer)
    with pytest.raises(UserError, match=r"holdout: got 0\.999, which leaves none of 3 pairs"):
        bradley_terry(holdout=0.999).prepare(pairs, None, encoder)
    with pytest.raises(UserError, match=r"eval_pairs: .* set holdout instead"):
        bradley_terry().prepare(pairs, pairs, encoder)
    without = TrainingPairs.from_table(reward_table(3).drop_columns(["prompt_id"]))
    with pytest.raises(UserError, match="a reward model needs the column 'prompt_id'"):
        bradley_terry().prepare(without, None, encoder)


# ---------------------------------------------------------------------------------------------------- learning


def test_it_learns_a_planted_preference(tiny_run: TinyRun, rewards: Case, tmp_path: Path) -> None:
    options = {"learning_rate": 5e-3, "num_epochs": 3, "global_batch_pairs": 16, "micro_batch_pairs": 16}
    more = {"token_budget": 8192, "length_penalty_rho": 0.0, "holdout": 0.2, "zero_stage": 2}
    result = rewards.run(tmp_path, model_dir=tiny_run.model_dir, table=reward_table(400), **options, **more)
    before, after = result["holdout_before"], result["holdout_after"]
    assert before["accuracy"] < 0.7
    assert after["accuracy"] > 0.9
    assert after["loss"] < 0.2 < before["loss"]


def test_balanced_sampling_evens_out_a_length_biased_corpus(rewards: Case, tmp_path: Path) -> None:
    table = reward_table(60)
    lengths = [[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in table.to_pylist()]
    longer = [number for number, (chosen, rejected) in enumerate(lengths) if chosen >= rejected]
    shorter = [number for number, (chosen, rejected) in enumerate(lengths) if chosen < rejected]
    biased = table.take(pa.array(longer[:27] + shorter[:3]))  # the longer one is chosen in 27 of 30
    options = {"table": biased, "holdout": 0.0, "num_epochs": 2, "learning_rate": 1e-5}

    def drawn(result: dict[str, Any]) -> int:
        return round(sum(record["longer_chosen"] * record["num_pairs"] for record in steps(result)))

    as_they_come = rewards.run(tmp_path / "none", length_balance_tau=None, **options)
    assert drawn(as_they_come) == 54
    balanced = rewards.run(tmp_path / "balanced", length_balance_tau=1e6, **options)
    assert drawn(balanced) == 30
    assert balanced["sampling"] == {"longer_chosen_share": 0.9, "longer_chosen_frequency": 0.5, "warnings": []}


def test_a_temperature_that_makes_it_worse_is_warned_of(
    rewards: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="prefsel"):
        result = rewards.run(tmp_path, length_balance_tau=0.2, max_steps=1)
    assert "0.2 is below 0.5" in caplog.text
    assert result["sampling"]["warnings"] == result["history"][0]["warnings"] != []


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("stage", [0, 3])
def test_a_causal_model_lends_its_trunk_to_a_seeded_head(
    tiny_run: TinyRun, rewards: Case, tmp_path: Path, stage: int
) -> None:
    results = [
        rewards.run(
            tmp_path / str(seed),
            model_dir=tiny_run.model_dir,
            zero_stage=stage,
            seed=seed,
            max_steps=1,
            learning_rate=1e-12,
        )
        for seed in (0, 0, 1)
    ]
    untrained = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir).state_dict()
    found = [weights(result) for result in results]
    assert set(found[0]) == {name for name in untrained if name != "lm_head.weight"} | {"score.weight"}
    for name in set(found[0]) - {"score.weight"}:
        torch.testing.assert_close(found[0][name], untrained[name], rtol=0, atol=1e-9)
    heads = [weight["score.weight"] for weight in found]
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


def test_the_exported_folder_gives_our_numbers_to_transformers(plain_rewards: dict[str, Any]) -> None:
    assert plain_rewards["max_output_difference"] < 1e-5
    assert_loads_to_the_same_numbers(Path(plain_rewards["model_dir"]))


def test_a_model_with_dropout_and_without_a_pad_token(tokenizer: Any, rewards: Case, tmp_path: Path) -> None:
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
    result = rewards.run(tmp_path / "out", model_dir=tmp_path / "gpt2", zero_stage=2)
    assert losses(result)[-1] < losses(result)[0]
    one_by_one = rewards.run(tmp_path / "one", model_dir=tmp_path / "gpt2", zero_stage=2, micro_batch_pairs=1)
    assert losses(one_by_one) == pytest.approx(losses(result), abs=2e-5)  # its dropout of 0.1 is off
    exported = AutoTokenizer.from_pretrained(result["model_dir"])
    assert exported.pad_token_id == exported.eos_token_id == 2
    # With learnt positions, padding on the left moves every token: there transformers itself gives other numbers.
    assert_loads_to_the_same_numbers(Path(result["model_dir"]), sides=("right",))


def test_a_model_that_cannot_be_packed_is_padded_and_the_run_says_so(
    tiny_run: TinyRun, rewards: Case, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "initializer_range": 0.3}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=45, **sizes, **more, attn_implementation="eager"))
    model.save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(tmp_path / "gemma")
    results = [
        rewards.run(tmp_path / str(pairs), model_dir=tmp_path / "gemma", zero_stage=2, micro_batch_pairs=pairs)
        for pairs in (1, 5)
    ]
    assert "gemma2" in results[0]["history"][0]["padding_reason"]
    assert losses(results[0]) == pytest.approx(losses(results[1]), abs=2e-5)
    assert losses(results[0])[-1] < losses(results[0])[0]
    assert results[0]["max_output_difference"] < 1e-5


def test_what_cannot_become_a_reward_model_is_refused(tiny_run: TinyRun, rewards: Case, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run.model_dir, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match=r"num_labels of model .*three: got 3; valid: 1, or a causal"):
        rewards.run(tmp_path / "out", model_dir=tmp_path / "three")
    untrained = load_file(tiny_run.model_dir / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_run.model_dir / name).read_bytes())
    from safetensors.torch import save_file

    del untrained["model.layers.1.mlp.down_proj.weight"]
    save_file(untrained, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"must lack score\.weight and nothing else.*down_proj"):
        rewards.run(tmp_path / "out", model_dir=tmp_path)
