"""A two-layer Llama with weights from numpy's frozen generator, and pairs to train it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(corpora.WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def save_llama(folder: Path, *, is_classifier: bool) -> Path:
    """Weights, configuration and tokenizer; a classifier has one output."""
    config = LlamaConfig(**SHAPE, **({"num_labels": 1} if is_classifier else {}))
    model = (LlamaForSequenceClassification if is_classifier else LlamaForCausalLM)(config)
    normal = np.random.RandomState(7)  # its streams are frozen, torch's are not
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = ("norm" in name) + 0.1 * normal.standard_normal(weight.shape)
            weight.copy_(torch.from_numpy(drawn))
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate((*SPECIAL, *corpora.WORDS))}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT_TEMPLATE, **names).save_pretrained(folder)
    return folder


def pairs(name: str, number: int) -> pa.Table:
    """Pairs with everything that a loss or an order may ask for; the reference log-probs are invented."""
    return pa.Table.from_pylist(list(_rows(name, number)))


def _rows(name: str, number: int) -> Iterator[dict[str, Any]]:
    for n in range(number):
        prompt, better, worse = (corpora.text(name, what, n, longest=12) for what in ("prompt", "better", "worse"))
        # What is learned: the better answer begins with one of the first words.
        chosen, rejected = f"{corpora.WORDS[n % 3]} {better}", f"{corpora.WORDS[9 + n % 3]} {worse}"
        yield {
            "pair_id": f"{corpora.draw(name, 'id', n, below=2**60):032x}",
            "prompt_id": f"{corpora.draw(prompt, below=2**60):032x}",
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "reference_logps_chosen": _reference(chosen),
            "reference_logps_rejected": _reference(rejected),
            "preference_divergence": corpora.draw(name, "divergence", n, below=384) / 64 - 3,
            "aspect": ("honesty", "helpfulness")[n % 2],
            "score": corpora.draw(name, "score", n, below=8) / 4,
        }


def _reference(answer: str) -> float:
    """A log-prob of 2.5 to 3.5 nats a word and end token: near what the model gives, so that no loss saturates."""
    return -(2.5 + corpora.draw("reference", answer, below=64) / 64) * (1 + len(answer.split()))
