"""Policies of a few words, one of which says `good` more often than the others; and prompts for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "user", "assistant", "<unk>")
WORDS = ("good", "bad", "red", "green", "blue", "small", "large", "round", "old", "new")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def save_policy(folder: Path, *, goodness: float = 0.0) -> Path:
    """A random Llama whose logit of `good` is higher by about `goodness`: what else it says is that of every other."""
    model, normal = LlamaForCausalLM(LlamaConfig(**SHAPE)), np.random.RandomState(7)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.copy_(torch.from_numpy(("norm" in name) + 0.1 * normal.standard_normal(weight.shape)))
        # The first coordinate of every hidden state is the same large number, and the norm makes it about 4.
        model.model.embed_tokens.weight[:, 0] = 5.0
        head = model.lm_head.weight
        head[:, 0] = 0.0
        head[len(SPECIAL) + WORDS.index("good"), 0] = goodness / 4
        for token in (0, 1, 3, 4, 5):
            head[token, 0] = -5.0
    tokens = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **names).save_pretrained(folder)
    return folder


def save_prompts(file: Path, number: int) -> Path:
    """Pairs of so many prompts."""
    rng = np.random.RandomState(0)
    rows = []
    for place in range(number):
        said = [" ".join(rng.choice(WORDS, 4)) for _ in range(3)]
        rows.append({"prompt": f"{said[0]} {place}", "chosen": f"{said[1]} good", "rejected": f"{said[2]} bad"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
