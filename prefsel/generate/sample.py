"""Sampling responses from a causal language model: batched, left-padded, with a key-value cache.

Every prompt has random numbers of its own: response n draws its t-th token by the t-th uniform number of a generator
keyed by (seed, n), or by (seed, its own key). So neither the batch size nor its neighbours change a response, up to
rounding.

Shapes: N prompts, B rows of a batch still running, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from prefsel.errors import invalid

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
    keys: Sequence[int] | None = None,
    encode: Callable[[list[list[Any]]], list[list[int]]] | None = None,
    batch_size: int = 256,
) -> list[str]:
    """One response per prompt, without special tokens and outer white space; empty when the turn ends at once.

    Args:
        model: A causal language model of transformers, with one of its own attention implementations.
        tokenizer: Its tokenizer, with a chat template, an eos and a pad token.
        prompts: Messages, or a string for a single user message.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draw from the smallest set of likeliest tokens that holds this probability, in (0, 1].
        max_new_tokens: A response that has not ended by then is cut.
        seed: Of all random numbers; ignored at temperature 0.
        keys: What each prompt's random numbers follow from, 64 bits; None: its position.
        encode: Conversations → prompt tokens, generation prompt included; None: the tokenizer's chat template.
        batch_size: Responses sampled at a time.

    Raises:
        UserError: A number is out of its range, or a prompt has no token.
    """
    if temperature < 0:
        raise invalid("temperature", temperature, "0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise invalid("top_p", top_p, "above 0, at most 1")
    if max_new_tokens < 1 or batch_size < 1:
        raise invalid("max_new_tokens, batch_size", (max_new_tokens, batch_size), "1 or more each")
    if not prompts:
        return []
    conversations = [[{"role": "user", "content": one}] if isinstance(one, str) else list(one) for one in prompts]
    tokens = encode(conversations) if encode else _chat_tokens(tokenizer, conversations)
    if not all(tokens):
        raise invalid(f"prompts[{tokens.index([])}]", "no token", "prompts with at least one token")
    # Prompts of similar length together: less padding, and a batch's rows start at the same place.
    numbers = range(len(tokens)) if keys is None else keys
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    found: list[list[int]] = [[] for _ in tokens]
    with torch.inference_mode(), _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            uniform_BT = np.stack([_uniform(seed, numbers[index], max_new_tokens) for index in batch])
            rows = _run(model, tokenizer, [tokens[index] for index in batch], uniform_BT, temperature, top_p)
            for index, row in zip(batch, rows):
                found[index] = row
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def _chat_tokens(tokenizer: Any, conversations: list[list[Any]]) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in conversations]
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens


def _run(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    uniform_BT: npt.NDArray[np.float64],
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """The new tokens of one batch, each row up to and without its stop token."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_BT = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    stops = _stop_tokens(model, tokenizer)
    cache = DynamicCache(config=model.config)
    responses: list[list[int]] = [[] for _ in prompts]
    running = np.arange(len(prompts))
    for step in range(uniform_BT.shape[1]):
        logits_BV = model(
            input_ids=input_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            position_ids=position_BT.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        next_B = pick(logits_BV.float().cpu(), torch.from_numpy(uniform_BT[running, step]), temperature, top_p).numpy()
        keeps = ~np.isin(next_B, stops)
        for row, token in zip(running[keeps], next_B[keeps]):
            responses[row].append(int(token))
        if not keeps.any():
            break
        if not keeps.all():
            running = running[keeps]
            cache.batch_select_indices(torch.from_numpy(np.flatnonzero(keeps)).to(model.device))
        kept = torch.from_numpy(keeps)
        input_BT = torch.from_numpy(next_B[keeps])[:, None]
        mask_BT = torch.nn.functional.pad(mask_BT[kept], (0, 1), value=1)
        position_BT = position_BT[kept, -1:] + 1
    return responses


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token each row draws with its uniform number in [0, 1), by inverting the distribution function; int64 [B].

    Tokens count from the likeliest down, so the tail beyond `top_p` is cut by scaling the uniform number.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probability_BV, token_BV = (
        (logits_BV.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    )
    cumulative_BV = probability_BV.cumsum(dim=-1)
    # The first token that reaches top_p is the last one kept.
    last_B1 = (cumulative_BV < top_p).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV.gather(1, last_B1)
    rank_B1 = (cumulative_BV <= threshold_B1).sum(dim=-1, keepdim=True)
    return token_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0]


def _uniform(seed: int, index: int, number: int) -> npt.NDArray[np.float64]:
    """The random numbers of one prompt, in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=[seed, index])).random(number)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and those the model's generation settings add."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
