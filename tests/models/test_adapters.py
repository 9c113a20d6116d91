"""Adapters given as models: the numbers of peft's own model, the identity of both, and what cannot be merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bpe_tokenizer, tiny_causal, tiny_reward
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefsel.errors import UserError
from prefsel.models.adapters import find_adapter
from prefsel.models.architecture import supports_packing
from prefsel.models.declared import head_names, max_positions
from prefsel.models.directory import check_directory, model_identity, pinned_revision
from prefsel.models.loading import context_length, load_causal, load_reward, load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 30, 31]])
KINDS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "scaled LoRA of all layers": peft.LoraConfig(
        r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True, lora_dropout=0.5, init_lora_weights=False
    ),
    "DoRA": peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "LoKr": peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "with whole layers": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], init_lora_weights=False
    ),
}


def save_adapter(base: Any, config: Any, folder: Path, *, task: str | None = "CAUSAL_LM", **options: Any) -> Path:
    """An adapter with random weights in `folder`, over the model that was loaded from `base`."""
    torch.manual_seed(1)
    config.task_type = task
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    model = peft.get_peft_model(auto.from_pretrained(base, **options), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tiny_causal().save_pretrained(folder)
    bpe_tokenizer(chat_template="base {{ messages[0].content }}").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), tmp_path / "a")


def change(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def merged_as_by_peft(base: Path, folder: Path) -> tuple[Any, torch.Tensor]:
    """The model of an adapter and its logits, which are those of peft's own forward and not those of the base."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        without = plain(IDS).logits
        expected = peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
        model = load_causal(str(folder), dtype="fp32", device="cpu")
        found = model(IDS).logits
    assert (expected - without).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    return model, found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_adapter_on_its_base(kind: str, base: Path, tmp_path: Path) -> None:
    model, _ = merged_as_by_peft(base, save_adapter(base, KINDS[kind], tmp_path / "adapter"))
    assert supports_packing(model) == (True, "")
    assert not any("lora" in name for name, _ in model.named_parameters())


SHARED: dict[str, Any] = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings and the head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embeddings, and with them the head": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "repeated layers": {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("what", SHARED)
def test_what_layers_share_is_taken_apart_before_an_update_is_merged(what: str, tmp_path: Path) -> None:
    tiny_causal(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, **SHARED[what])
    model, found = merged_as_by_peft(tmp_path / "base", save_adapter(tmp_path / "base", config, tmp_path / "adapter"))
    if what != "repeated layers":  # whose other weights stay shared, which safetensors does not hold
        model.save_pretrained(tmp_path / "merged")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(saved(IDS).logits, found)


def test_weights_are_merged_in_fp32_and_rounded_once(base: Path, adapter: Path) -> None:
    half = load_causal(str(adapter), dtype="bf16", device="cpu")
    whole = load_causal(str(adapter), dtype="fp32", device="cpu")
    weights = load_file(base / "model.safetensors")
    update = whole.model.layers[0].self_attn.q_proj.weight - weights["model.layers.0.self_attn.q_proj.weight"]
    rounded = weights["model.layers.0.self_attn.q_proj.weight"].bfloat16().float() + update
    torch.testing.assert_close(half.model.layers[0].self_attn.q_proj.weight, rounded.bfloat16(), rtol=8e-3, atol=0)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32  # as transformers keeps it


def test_a_reward_adapter_brings_its_head(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    folder = save_adapter(base, config, tmp_path / "reward", task="SEQ_CLS")
    plain = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=2)
    expected = peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
    torch.testing.assert_close(load_reward(str(folder), dtype="fp32", device="cpu")(IDS).logits, expected)
    assert head_names(str(folder)) == ["LABEL_0", "LABEL_1"]
    with pytest.raises(UserError, match=r"adapter of .*base', trained for the task SEQ_CLS; as a policy it needs"):
        load_causal(str(folder), dtype="fp32", device="cpu")


def test_a_reward_adapter_of_an_encoder_brings_as_many_outputs_as_its_head_has(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_causal("roberta").save_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["value"], init_lora_weights=False)
    folder = save_adapter(base, config, tmp_path / "reward", task="SEQ_CLS", num_labels=1)
    plain = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    expected = peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
    torch.testing.assert_close(load_reward(str(folder), dtype="fp32", device="cpu")(IDS).logits, expected)
    assert head_names(str(folder)) == ["LABEL_0"]


def test_a_reward_adapter_of_a_reward_model_keeps_the_names_of_its_heads(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_reward(num_labels=2, id2label={0: "style", 1: "truth"}).save_pretrained(base)
    bpe_tokenizer().save_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["score"], init_lora_weights=False)
    folder = save_adapter(base, config, tmp_path / "reward", task="SEQ_CLS")
    plain = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
    torch.testing.assert_close(load_reward(str(folder), dtype="fp32", device="cpu")(IDS).logits, expected)
    assert head_names(str(folder)) == ["style", "truth"]


def test_a_language_models_adapter_is_no_reward_model(base: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="trained for the task CAUSAL_LM; as a reward model it needs SEQ_CLS"):
        load_reward(str(adapter), dtype="fp32", device="cpu")
    change(adapter, task_type=None)
    with pytest.raises(UserError, match=r"adapter of .*base', and its weights lack 1 tensors.*score.weight"):
        load_reward(str(adapter), dtype="fp32", device="cpu")


def test_new_tokens_come_with_their_embeddings(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(410)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    grown = peft.get_peft_model(model, config).eval()
    grown.save_pretrained(tmp_path / "grown")
    ids = torch.tensor([[5, 405, 409, 7]])
    with torch.no_grad():
        found = load_causal(str(tmp_path / "grown"), dtype="fp32", device="cpu")(ids).logits
        torch.testing.assert_close(found, grown(ids).logits)
    file = tmp_path / "grown" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="trained with 410 tokens where the base has 400"):
        load_causal(str(tmp_path / "grown"), dtype="fp32", device="cpu")


def test_the_tokenizer_is_its_own_or_its_bases(base: Path, adapter: Path) -> None:
    assert load_tokenizer(str(adapter)).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    bpe_tokenizer(chat_template="own").save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == "own"
    assert context_length(str(adapter)) == 256
    assert max_positions(str(adapter)) == 256


def test_its_identity_follows_both(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    change(adapter, base_model_name_or_path=str(own))
    found = [model_identity(str(adapter))]
    assert found[0] not in (model_identity(str(own)), model_identity(str(base)))
    bpe_tokenizer(chat_template="own").save_pretrained(own)
    found.append(model_identity(str(adapter)))
    tiny_causal(scale=0.2).save_pretrained(own)
    found.append(model_identity(str(adapter)))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    found.append(model_identity(str(adapter)))
    assert len(set(found)) == 4


@pytest.mark.parametrize("named", ["base", "./base", "../base"])
def test_a_relative_base_is_found_from_here_or_beside_the_adapter(
    named: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    change(adapter, base_model_name_or_path=named)
    monkeypatch.chdir(tmp_path / "a")
    revision = pinned_revision(str(adapter), None)
    assert revision == f"+{tmp_path / 'base'}@"
    monkeypatch.chdir("/")  # where a worker runs
    model = load_causal(str(adapter), dtype="fp32", device="cpu", revision=revision)
    assert model.config.vocab_size == 400
    assert load_tokenizer(str(adapter), revision=revision).eos_token == "</s>"


def test_a_directory_of_full_weights_is_none(base: Path) -> None:
    assert find_adapter(str(base)) is None
    assert pinned_revision(str(base), None) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base_model_name_or_path": None}, "names no base model; write its directory or hub id"),
        ({"base_model_name_or_path": "/no/such/base"}, "adapter of '/no/such/base', and there is no such directory"),
        ({"base_model_name_or_path": "./nowhere"}, "adapter of './nowhere', and there is no such directory"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adapter of '.*base', of a kind that is not merged"),
        ({"peft_type": "XLORA"}, "XLORA adapter of '.*base', of a kind that is not merged"),
        ({"peft_type": "NEWEST"}, "NEWEST adapter of '.*base', of a kind that is not merged"),
        ({"alora_invocation_tokens": [1, 2]}, "active on part of the tokens only"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(
    settings: dict[str, Any], told: str, adapter: Path
) -> None:
    change(adapter, **settings)
    for call in (check_directory, model_identity, load_tokenizer):
        with pytest.raises(UserError, match=told):
            call(str(adapter))


def test_a_base_that_does_not_fit_is_named(adapter: Path, tmp_path: Path) -> None:
    def told(**sizes: Any) -> str:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        tiny_causal(**sizes).save_pretrained(tmp_path / "other")
        change(adapter, base_model_name_or_path=str(tmp_path / "other"))
        with pytest.raises(UserError) as caught:
            load_causal(str(adapter), dtype="fp32", device="cpu")
        assert f"LORA adapter of '{tmp_path / 'other'}'" in str(caught.value)
        return str(caught.value)

    assert "size mismatch" in told(hidden_size=16)
    assert "lacks 2 tensors" in told(num_hidden_layers=3)
    assert "has, unknown to the base, 2 tensors" in told(num_hidden_layers=1)
    assert "Target modules" in told(model_type="gpt2")


def test_files_that_are_missing_or_too_many_are_named(base: Path, adapter: Path) -> None:
    shutil.copy(base / "model.safetensors", adapter)
    with pytest.raises(UserError, match=r"its directory holds full weights too \(model.safetensors\)"):
        check_directory(str(adapter))
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; found \['adapter_model.bin'\], which is not"):
        check_directory(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"its adapter_config.json is not a JSON table"):
        check_directory(str(adapter))


def test_an_adapter_of_an_adapter_or_of_half_a_model_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = change(shutil.copytree(adapter, tmp_path / "second"), base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match=f"LORA adapter of '{adapter}', which is an adapter itself"):
        load_causal(str(second), dtype="fp32", device="cpu")
    (tmp_path / "half").mkdir()
    shutil.copy(base / "config.json", tmp_path / "half")
    change(adapter, base_model_name_or_path=str(tmp_path / "half"))
    with pytest.raises(UserError, match=f"adapter of '{tmp_path}/half', which cannot be used: .*no ..safetensors"):
        model_identity(str(adapter))


def test_a_quantised_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    config = json.loads((own / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (own / "config.json").write_text(json.dumps(config | quantised))
    change(adapter, base_model_name_or_path=str(own))
    with pytest.raises(UserError, match="whose weights are quantised"):
        check_directory(str(adapter))


HUB = """
import torch
from prefsel.models.directory import model_identity, pinned_revision
from prefsel.models.loading import load_causal, load_tokenizer

pinned = pinned_revision("someone/adapter", None)
print(pinned)
print(model_identity("someone/adapter") == model_identity("someone/adapter", revision=pinned))
model = load_causal("someone/adapter", dtype="fp32", device="cpu", revision=pinned)
print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())
print(load_tokenizer("someone/adapter", revision=pinned).eos_token)
print(pinned_revision("someone/base", None))
"""


def test_an_adapter_of_a_hub_on_a_base_of_a_hub_is_pinned_with_both_commits(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    commits = {"adapter": "a" * 40, "base": "b" * 40}
    for name, folder in (("adapter", change(adapter, base_model_name_or_path="someone/base")), ("base", base)):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / commits[name])
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commits[name])
    local = change(adapter, base_model_name_or_path=str(base))
    expected = load_causal(str(local), dtype="fp32", device="cpu")(torch.tensor([[5, 6, 7]])).logits.sum().item()
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment)
    pinned, is_same, logits, eos, plain = done.stdout.splitlines() or [done.stderr]
    assert pinned == f"{'a' * 40}+someone/base@{'b' * 40}"
    assert (is_same, eos, plain) == ("True", "</s>", "b" * 40)
    assert float(logits) == pytest.approx(expected, rel=1e-5)


def test_a_config_json_beside_it_changes_nothing(base: Path, adapter: Path) -> None:
    expected = load_causal(str(adapter), dtype="fp32", device="cpu")(IDS).logits
    (adapter / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    torch.testing.assert_close(load_causal(str(adapter), dtype="fp32", device="cpu")(IDS).logits, expected)
