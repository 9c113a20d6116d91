"""Labelled pairs with a planted preference, and a reward model's textbook oracle: one sequence at a time."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tiny_policy import WORDS

from prefsel.ingest.identity import prompt_id

GOOD, BAD, NEUTRAL = WORDS[:3], WORDS[3:6], WORDS[6:]
"""A chosen answer has one good word, a rejected one a bad word, among neutral ones."""


def reward_table(num_pairs: int, *, seed: int = 0, longest: int = 8) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_pairs):
        prompt = [{"role": "user", "content": text(rng, 6)}]
        rows.append(row(number, prompt, text(rng, longest, GOOD), text(rng, longest, BAD)))
    return pa.Table.from_pylist(rows)


def row(number: int, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "pair_id": f"{number:032x}",
        "prompt_id": prompt_id(prompt).hex(),
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def text(rng: np.random.Generator, longest: int, one_of: list[str] | None = None) -> str:
    """Up to `longest` neutral words, and one of the others somewhere among them."""
    words = rng.choice(NEUTRAL, size=rng.integers(1, longest)).tolist()
    if one_of is not None:
        words.insert(rng.integers(len(words) + 1), str(rng.choice(one_of)))
    return " ".join(words)


def naive_reward(model: Any, tokenizer: Any, prompt: list[Any], completion: list[Any]) -> torch.Tensor:
    """A classifier's output for one whole conversation, unpadded and unpacked."""
    ids = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=False)
    return model(input_ids=torch.tensor([ids])).logits[0, 0].double()


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a reward model's training holds the prompt of this id (hex) out."""
    digest = hashlib.blake2b(b"reward-holdout" + bytes.fromhex(prompt), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction
