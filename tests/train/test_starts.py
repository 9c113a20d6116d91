"""What a training may start from besides full weights of transformers: adapters, and models with code of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Case, losses, steps, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefsel.errors import UserError
from prefsel.models.loading import load_causal, load_reward


@pytest.fixture(scope="module")
def adapter(policy: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("starts") / "adapter"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(policy.model_dir), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(policy: Case, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same start as full weights, merged by peft alone."""
    folder = shutil.copytree(policy.model_dir, tmp_path_factory.mktemp("merged") / "model")
    base = AutoModelForCausalLM.from_pretrained(policy.model_dir, dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
    return folder


LORA = {"lora": {"r": 4, "alpha": 8, "target_modules": ["v_proj"]}}


@pytest.mark.parametrize("options", [{}, LORA, {"zero_stage": 3}], ids=["all weights", "lora", "zero 3"])
def test_a_policy_starts_from_an_adapter_as_from_its_merged_weights(
    options: dict[str, Any], policy: Case, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    options = options | policy.unchecked | {"max_steps": 3}
    found = policy.run(tmp_path / "adapter", model_dir=adapter, **options)
    expected = policy.run(tmp_path / "merged", model_dir=merged, **options)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    start, plain = load_file(merged / "model.safetensors"), load_file(policy.model_dir / "model.safetensors")
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert (start[changed] - plain[changed]).abs().max() > 0.01
    for name, weight in weights(found).items():
        torch.testing.assert_close(weight, weights(expected)[name], rtol=0, atol=2e-3, msg=name)
    model = load_causal(found["model_dir"], dtype="fp32", device="cpu")  # no adapter is left to be found
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_reward_model_starts_from_the_trunk_of_a_policys_adapter(
    zero_stage: int, rewards: Case, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    found = rewards.run(tmp_path / "adapter", model_dir=adapter, max_steps=3, zero_stage=zero_stage)
    expected = rewards.run(tmp_path / "merged", model_dir=merged, max_steps=3, zero_stage=zero_stage)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    assert losses(found)[0] != losses(found)[1]


def test_a_reward_model_starts_from_an_adapter_with_its_head(
    policy: Case, rewards: Case, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(policy.model_dir, num_labels=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    result = rewards.run(tmp_path / "out", model_dir=tmp_path / "adapter", max_steps=2, learning_rate=1e-9)
    trained = load_reward(result["model_dir"], dtype="fp32", device="cpu")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(trained(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)


OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def own(policy: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny policy under code of its own, whose logits are larger."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(policy.model_dir, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    names["AutoModelForSequenceClassification"] = "OwnForSequenceClassification"
    own = {"model_type": "own_llama", "auto_map": {auto: f"modeling_own.{name}" for auto, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "modeling_own.py").write_text(OWN)
    return folder


def test_a_policy_with_code_of_its_own_is_trained_and_exported_with_it(policy: Case, own: Path, tmp_path: Path) -> None:
    options = policy.unchecked | {"max_steps": 2, "trust_remote_code": True}
    result = policy.run(tmp_path / "out", model_dir=own, **options)
    assert steps(result)[0]["loss"] != pytest.approx(losses(policy.run(tmp_path / "plain", **policy.unchecked))[0])
    assert (Path(result["model_dir"]) / "modeling_own.py").is_file()
    again = load_causal(result["model_dir"], dtype="fp32", device="cpu", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    with pytest.raises(UserError, match="set the model's trust_remote_code: true"):
        load_causal(result["model_dir"], dtype="fp32", device="cpu")
    adapted = policy.run(tmp_path / "lora", model_dir=own, **options, **LORA)
    assert (Path(adapted["model_dir"]) / "modeling_own.py").is_file()


def test_a_reward_model_with_code_of_its_own(rewards: Case, own: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text()) | {"model_type": "llama"}
    del config["auto_map"]["AutoConfig"]
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_own.py").write_text(OWN.replace("    config_class = OwnConfig\n", "    is_own = True\n"))
    result = rewards.run(tmp_path / "out", model_dir=own, max_steps=2, trust_remote_code=True)
    model = load_reward(result["model_dir"], dtype="fp32", device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification"


@pytest.mark.parametrize("case_name", ["policy", "rewards"])
def test_code_that_is_not_trusted_is_not_run(
    case_name: str, own: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (own / "modeling_own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="set the model's trust_remote_code: true"):
        request.getfixturevalue(case_name).run(tmp_path / "out", model_dir=own)
