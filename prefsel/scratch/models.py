r"""Small models made from text on the spot, for a demo or a trial without weights at hand.

    texts ─► train_tokenizer ─┬► train_policy   next-token loss on the responses of conversations
                              └► train_reward   Bradley–Terry loss of labelled pairs, one head per aspect
                                                └► save: a Hugging Face folder that the Auto classes load

Plain loops on one thread; the same seed, texts and torch build give the same weights.

Shapes: P pairs, H heads, B sequences, T tokens of the longest, d hidden size, R predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.models.loading import no_bars
from prefsel.numbers.agreement import agreement
from prefsel.scratch.tokenizer import Indices, Messages, batches, encode, padded, train_tokenizer

__all__ = ["OnStep", "RewardPair", "one_thread", "save", "train_policy", "train_reward", "train_tokenizer"]

OnStep = Callable[[int, int, float], None]
"""Called after every step with (step, total steps, loss)."""


def train_policy(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Messages],
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    steps: int,
    batch_tokens: int,
    lr: float,
    seed: int,
    max_length: int,
    loss_on: Literal["response", "all"] = "response",
    on_step: OnStep | None = None,
) -> LlamaForCausalLM:
    """A causal language model tuned on the last turn of each conversation.

    Args:
        tokenizer: With a chat template and a pad token.
        conversations: Messages, the last one the assistant's.
        hidden_size: Width d, a multiple of 2 x `num_heads`.
        num_layers: Decoder layers.
        num_heads: Attention heads.
        steps: Optimizer steps; conversations repeat in a new order when there are too few.
        batch_tokens: At most this many tokens per step, padding included (a longer conversation goes alone).
        lr: Peak learning rate of AdamW: 5 % linear warm-up, then a cosine to 0.
        seed: Decides the initial weights and the order.
        max_length: In tokens; a longer conversation loses its beginning, so that the response stays.
        loss_on: Which tokens are predicted: the response with its end token, or all.
        on_step: Told about every step.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: There is no conversation, or the sizes do not fit together.
        TemplateError: The generation prompt is no token prefix of the whole conversation.
        NonFiniteError: The loss became NaN or infinite.
    """
    data = encode(tokenizer, conversations, max_length)
    shape = _llama(tokenizer, hidden_size, num_layers, num_heads, max_length)
    model = _seeded(lambda: LlamaForCausalLM(shape), seed)

    def loss_of(batch: Indices) -> Tensor:
        rows = [data[index] for index in batch]
        input_BT = padded([row.tokens for row in rows], tokenizer.pad_token_id)
        is_target_BT = torch.zeros_like(input_BT, dtype=torch.bool)
        for number, row in enumerate(rows):
            is_target_BT[number, (row.response_start if loss_on == "response" else 1) : len(row.tokens)] = True
        hidden_BTd = model.model(input_ids=input_BT, use_cache=False).last_hidden_state
        # The head, the widest layer, runs where a token is predicted.
        logits_RV = model.lm_head(hidden_BTd[:, :-1][is_target_BT[:, 1:]])
        return F.cross_entropy(logits_RV, input_BT[is_target_BT])

    length_N = np.array([len(row.tokens) for row in data])
    _optimise(model, loss_of, batches(length_N, batch_tokens, seed), steps=steps, lr=lr, on_step=on_step)
    return model


@dataclass(frozen=True)
class RewardPair:
    """Two whole conversations, each ending with an assistant turn, of which a label prefers `chosen`."""

    chosen: Messages
    rejected: Messages
    head: str | None = None
    """The aspect that was labelled; None trains the union head only."""


def train_reward(
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[RewardPair],
    *,
    heads: Sequence[str],
    union_head: str | None = None,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    steps: int,
    batch_tokens: int,
    lr: float,
    seed: int,
    max_length: int,
    holdout: float = 0.1,
    on_step: OnStep | None = None,
) -> tuple[LlamaForSequenceClassification, dict[str, float]]:
    r"""A reward model: one trunk, one head per aspect, read at the last token of a conversation.

    A pair adds \(-\log\sigma(r_h(chosen) - r_h(rejected))\) for the head h of its aspect and for the union head
    (Bradley–Terry; the loss is the mean over these terms).

    Args:
        tokenizer: With a chat template that ends an assistant turn with a fixed token, and a pad token.
        pairs: Labelled pairs.
        heads: Names of the aspect heads, in the order of the model's outputs.
        union_head: Name of one more head, the last one, which every pair trains.
        hidden_size: This and the following as in `train_policy`.
        num_layers: Decoder layers.
        num_heads: Attention heads.
        steps: Optimizer steps.
        batch_tokens: At most this many tokens per step, both sides of a pair and padding included.
        lr: Peak learning rate.
        seed: Decides the initial weights, the order and which prompts are held out.
        max_length: In tokens; a longer conversation loses its beginning: the score is read at its end.
        holdout: Share of the prompts that are not trained on, with all their pairs.
        on_step: Told about every step.

    Returns:
        The model in evaluation mode, its `id2label` naming the heads; and by head the accuracy on its held-out pairs (a
        tie counts half; NaN for a head that has none).

    Raises:
        UserError: No head, no pair to train on, a pair that names an unknown head or none, or sizes that do not fit.
        TemplateError: As in `train_policy`.
        NonFiniteError: As in `train_policy`.
    """
    names = [*heads, *([union_head] if union_head is not None else [])]
    is_label_PH = _labels(pairs, names, has_union=union_head is not None)
    train, held_out = _split(pairs, holdout, seed)
    chosen = encode(tokenizer, [pair.chosen for pair in pairs], max_length)
    rejected = encode(tokenizer, [pair.rejected for pair in pairs], max_length)
    shape = _llama(tokenizer, hidden_size, num_layers, num_heads, max_length, id2label=dict(enumerate(names)))
    model = _seeded(lambda: LlamaForSequenceClassification(shape), seed)

    def margins_of(batch: Indices) -> Tensor:
        rows = [side[index].tokens for side in (chosen, rejected) for index in batch]
        hidden_BTd = model.model(input_ids=padded(rows, tokenizer.pad_token_id), use_cache=False).last_hidden_state
        last_B = torch.tensor([len(row) - 1 for row in rows])
        reward_BH = model.score(hidden_BTd[torch.arange(len(rows)), last_B])
        return reward_BH[: len(batch)] - reward_BH[len(batch) :]

    def loss_of(batch: Indices) -> Tensor:
        return F.softplus(-margins_of(batch)[is_label_PH[batch]]).mean()

    length_P = np.array([2 * max(len(a.tokens), len(b.tokens)) for a, b in zip(chosen, rejected)])
    order = (train[batch] for batch in batches(length_P[train], batch_tokens, seed))
    _optimise(model, loss_of, order, steps=steps, lr=lr, on_step=on_step)
    return model, _accuracy(margins_of, held_out, is_label_PH, names)


def save(model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write weights (safetensors), configuration and tokenizer into one Hugging Face folder."""
    with no_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's matrix products on one thread.

    Matrices this small lose time to a second thread (6 x slower when cores are shared), and a fixed number of threads
    fixes the order of sums.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _labels(pairs: Sequence[RewardPair], names: list[str], *, has_union: bool) -> Tensor:
    """Which heads a pair trains, bool [P, H]: its aspect's, and the last one if that is the union head."""
    if not names:
        raise UserError("heads: got none; name at least one, or a union_head")
    unknown = sorted({pair.head for pair in pairs if pair.head is not None} - set(names))
    if unknown:
        raise invalid("head of a pair", unknown[0], names)
    is_label_PH = torch.zeros(len(pairs), len(names), dtype=torch.bool)
    for row, pair in enumerate(pairs):
        if pair.head is not None:
            is_label_PH[row, names.index(pair.head)] = True
    is_label_PH[:, -1] |= has_union
    if not is_label_PH.any(dim=1).all():
        raise UserError("pairs: some name no head, and there is no union_head for them to train")
    return is_label_PH


def _split(pairs: Sequence[RewardPair], holdout: float, seed: int) -> tuple[Indices, Indices]:
    """Training and held-out pairs; those of one prompt stay together."""
    numbers: dict[str, int] = {}
    prompt_P = [numbers.setdefault(repr(pair.chosen[:-1]), len(numbers)) for pair in pairs]
    is_held_out_P = (np.random.default_rng([seed, 2]).random(len(numbers)) < holdout)[np.array(prompt_P, dtype=int)]
    if is_held_out_P.all():
        raise UserError(f"pairs: none of {len(pairs)} is left to train on with holdout {holdout}")
    return np.flatnonzero(~is_held_out_P), np.flatnonzero(is_held_out_P)


@torch.no_grad()
def _accuracy(
    margins_of: Callable[[Indices], Tensor], held_out: Indices, is_label_PH: Tensor, names: list[str]
) -> dict[str, float]:
    if not len(held_out):
        return dict.fromkeys(names, math.nan)
    with one_thread():
        margin_PH = torch.cat([margins_of(held_out[start : start + 64]) for start in range(0, len(held_out), 64)])
    is_counted_PH = is_label_PH[held_out]
    right_H = (agreement(margin_PH) * is_counted_PH).sum(dim=0).tolist()
    counted_H = is_counted_PH.sum(dim=0).tolist()
    return {name: right / total if total else math.nan for name, right, total in zip(names, right_H, counted_H)}


def _llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_length: int,
    id2label: dict[int, str] | None = None,
) -> LlamaConfig:
    if hidden_size % (2 * num_heads):
        raise invalid("hidden_size", hidden_size, f"multiples of 2 x num_heads = {2 * num_heads}")
    heads = {} if id2label is None else {"id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        # The usual 0.02 is for widths of thousands: it leaves small models without a signal at first.
        initializer_range=0.5 / math.sqrt(hidden_size),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **heads,
    )


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    """What `build` makes from a seeded generator; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _optimise(
    model: nn.Module,
    loss_of: Callable[[Indices], Tensor],
    order: Iterator[Indices],
    *,
    steps: int,
    lr: float,
    on_step: OnStep | None,
) -> None:
    """AdamW with a linear warm-up over 5 % of the steps and a cosine to 0; the gradient norm is clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    model.train()
    with one_thread():
        for step, batch in zip(range(steps), order):
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, cosine)
            loss = loss_of(batch)
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"loss: got {loss.item()} at step {step + 1} of {steps}; lower lr, {lr}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, steps, loss.item())
    model.eval()
