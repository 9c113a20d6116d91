"""A tiny policy and a table of pairs whose reference log-probs come from a naive oracle, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "user", "assistant"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@dataclass(frozen=True)
class TinyRun:
    """Where the tiny policy lies, 22 training pairs and 6 held-out ones."""

    model_dir: Path
    train: pa.Table
    held_out: pa.Table


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def make_tiny_run(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL + WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ).eval()
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rng = np.random.default_rng(1)
    return TinyRun(model_dir, _pairs(rng, 22, model, tokenizer), _pairs(rng, 6, model, tokenizer))


def _pairs(rng: np.random.Generator, num_pairs: int, model: Any, tokenizer: Any) -> pa.Table:
    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(2, longest)))

    rows = []
    for number in range(num_pairs):
        prompt = [{"role": "user", "content": text(12)}]
        chosen, rejected = ([{"role": "assistant", "content": text(16)}] for _ in range(2))
        rows.append(
            {
                "pair_id": f"{number:032x}",
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "reference_logps_chosen": naive_logps(model, tokenizer, prompt, chosen).item(),
                "reference_logps_rejected": naive_logps(model, tokenizer, prompt, rejected).item(),
            }
        )
    return pa.Table.from_pylist(rows)


def naive_logps(model: Any, tokenizer: Any, prompt: list[Any], completion: list[Any]) -> torch.Tensor:
    """Summed response log-probs of one conversation: one unpadded forward pass, log_softmax and gather."""
    template = {"tokenize": True, "return_dict": False}
    num_prompt = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **template))
    ids = torch.tensor([tokenizer.apply_chat_template(prompt + completion, **template)])
    logps_TV = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    return logps_TV[num_prompt - 1 : -1].gather(1, ids[0, num_prompt:, None]).double().sum()
