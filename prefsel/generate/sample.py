"""Prompts as text → one response each, as text: the engine for callers that think in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.generate.engine import Generator, Sampling

Prompt = str | Sequence[Mapping[str, str]]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    token_budget: int | None = None,
) -> list[str]:
    """One response per prompt, without special tokens and outer white space; empty when the turn ends at once.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a chat template and an eos token.
        prompts: Messages, or a string for a single user message; the n-th has the random numbers of key n.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draw from the smallest set of likeliest tokens that holds this probability, in (0, 1].
        max_new_tokens: A response that has not ended by then is cut.
        seed: Of all random numbers; ignored at temperature 0.
        token_budget: As `Generator`.

    Raises:
        UserError: A number is out of its range, or a prompt has no token.
    """
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    if not prompts:
        return []
    conversations = [[{"role": "user", "content": one}] if isinstance(one, str) else list(one) for one in prompts]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in conversations]
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    generator = Generator(model, tokenizer, token_budget=token_budget)
    return [responses[0].text for responses in generator.generate(tokens, range(len(tokens)), 1, sampling)]
