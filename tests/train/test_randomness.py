"""Dropout and its like: off wherever an architecture keeps them, proven before the first step, on where asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_runs import Case, losses
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from prefsel.errors import UserError
from prefsel.train.randomness import declared, silence

SIZES = {"vocab_size": 45, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT as it comes": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "OPT, attention": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.3}),
    "OPT, whole layers": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.5}),
    "BLOOM": ("bloom", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "Falcon": ("falcon", {"hidden_dropout": 0.2}),
    "Falcon, attention": ("falcon", {"attention_dropout": 0.2, "alibi": True}),
    "GPT-2 as it comes": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "Llama, attention": ("llama", {"attention_dropout": 0.3, "intermediate_size": 48}),
    "Phi": ("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "intermediate_size": 48}),
    "StarCoder2": ("starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1, "intermediate_size": 48}),
    "BioGPT": ("biogpt", {"intermediate_size": 48}),
    "Mixtral, jitter": ("mixtral", {"router_jitter_noise": 0.3, "intermediate_size": 48, "num_key_value_heads": 4}),
}


def make(name: str, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    model_type, options = MODELS[name]
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 128} | TOKENS | options | more
    return auto.from_config(AutoConfig.for_model(model_type, initializer_range=0.2, **sizes)).train()


def differ(model: nn.Module, *, times: int = 6) -> bool:
    """Whether forward passes of plain transformers, in whatever mode the model is in, differ."""
    ids = torch.tensor([[5, 6, 7, 8, 30, 31, 9, 2]])
    with torch.no_grad():
        first, *rest = (model(input_ids=ids).logits for _ in range(times))
    return any(not torch.equal(first, other) for other in rest)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in MODELS for kind in ("eager", "sdpa") if (name, kind) != ("BLOOM", "sdpa")],
)
def test_forwards_in_training_mode_are_equal(name: str, attention: str) -> None:
    model = make(name, attn_implementation=attention)
    before = model.config.to_dict()
    assert differ(model)
    silence(model)
    assert model.training
    assert not differ(model)
    with declared(model, type(model.config).from_dict(before)):
        assert model.config.to_dict() == before  # what is exported says what it said
    assert not differ(model)


def test_a_classifiers_own_dropout_is_off() -> None:
    sizes = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64, "classifier_dropout": 0.4}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("roberta", num_labels=1, **sizes)
    ).train()
    assert differ(model)
    silence(model)
    assert not differ(model)


class TimmDropPath(nn.Module):
    """Stochastic depth as vision models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = 1 - self.drop_prob
        return x * torch.rand(1).lt(keep) / keep if self.training and self.drop_prob else x


def test_other_modules_that_drop_are_off() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = AutoConfig.for_model("llama")
            self.parts = nn.Sequential(
                TimmDropPath(), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)
            )

    model = Held().train()
    silence(model)
    rows = torch.randn(3, 4, 5)
    assert all(torch.equal(model.parts(rows), rows) for _ in range(8))


def test_the_dropout_of_adapters_stays_on() -> None:
    model = make("GPT-2 as it comes")
    silence(model)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.5, init_lora_weights=False)
    assert differ(peft.get_peft_model(model, config).train())


@pytest.mark.parametrize("name", ["OPT as it comes", "Falcon", "BLOOM", "Llama, attention"])
def test_a_training_does_not_depend_on_how_its_batches_are_cut(
    name: str, policy: Case, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "start"
    make(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    runs = [
        policy.run(
            tmp_path / str(size), model_dir=folder, micro_batch_pairs=size, policy_is_reference=False, max_steps=3
        )
        for size in (1, 8)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    told = json.loads((folder / "config.json").read_text())
    written = json.loads((Path(runs[0]["model_dir"]) / "config.json").read_text())
    drops = {key for key in told if "drop" in key}
    assert drops
    assert {key: written[key] for key in drops} == {key: told[key] for key in drops}


NOISY = """
import torch
from transformers import LlamaForCausalLM

class NoisyNorm(torch.nn.Module):
    def forward(self, x):
        return x + 0.05 * torch.randn_like(x) if self.training else x

class NoisyForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp.noise = NoisyNorm()
        inner = self.model.layers[1].mlp.forward
        self.model.layers[1].mlp.forward = lambda x: self.model.layers[1].mlp.noise(inner(x))
"""


def test_a_model_that_stays_random_is_refused_before_the_first_step(
    policy: Case, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "noisy"
    make("Llama, attention").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_noisy.NoisyForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "modeling_noisy.py").write_text(NOISY)
    with pytest.raises(UserError, match=r"differ by .*, first in model.model.layers.1.mlp.noise \(NoisyNorm\)"):
        policy.run(tmp_path / "out", model_dir=folder, policy_is_reference=False, trust_remote_code=True)
    assert not (tmp_path / "out" / "history.jsonl").exists()
