r"""Text for models made on the spot: a trained tokenizer, its chat template, and conversations as tokens.

    <|bos|> <|user|> tell me about apple and lamp <|end|> <|assistant|> the apple is sweet . <|end|>
    └──────────────────── prompt with its generation prompt ──────────┘ └──── response ────────┘

Shapes: B sequences, T tokens of the longest, N sequences in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prefsel.errors import TemplateError, UserError, invalid

Messages = Sequence[Mapping[str, str]]
Indices = npt.NDArray[np.int64]

BOS, END, PAD, UNKNOWN = "<|bos|>", "<|end|>", "<|pad|>", "<|unknown|>"
SPECIAL_TOKENS: Final = (PAD, BOS, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>")

# Special tokens are cut out before any split or merge, and each turn begins and ends with one: the tokens of a prompt
# with its generation prompt are a prefix of the tokens of the whole conversation.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], *, kind: Literal["word", "bpe"], vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with bos, eos (which also ends every turn), pad and a chat template; the same texts, the same tokens.

    Args:
        texts: What it is trained on.
        kind: `word`: the most frequent words between white space, all others unknown; decoding joins by one space.
            `bpe`: byte-level pair merges; every text round-trips.
        vocab_size: Tokens at most, the special ones included.
        chat_template: A Jinja template instead of the default one.

    Raises:
        UserError: `kind` is unknown, or `vocab_size` cannot hold the special tokens (and, for `bpe`, the 256 bytes).
    """
    if kind not in ("word", "bpe"):
        raise invalid("kind", kind, ["word", "bpe"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bpe" else []
    smallest = len(SPECIAL_TOKENS) + len(alphabet) + 1
    if vocab_size < smallest:
        raise invalid("vocab_size", vocab_size, f"at least {smallest} for kind {kind!r}")
    trained = _words(texts, vocab_size) if kind == "word" else _byte_pairs(texts, vocab_size, alphabet)
    trained.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN if kind == "word" else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template or CHAT_TEMPLATE,
    )


def _words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    counts = Counter(word for text in texts for word in text.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(SPECIAL_TOKENS)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _byte_pairs(texts: Iterable[str], vocab_size: int, alphabet: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    tokens: list[int]
    response_start: int
    """Position of the first token of the last turn's content, at least 1."""


def encode(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Messages], max_length: int) -> list[Encoded]:
    """Tokens of whole conversations; a longer one loses its beginning, so that the response and its end stay.

    Raises:
        UserError: There is no conversation.
        TemplateError: The prompt with its generation prompt is no proper token prefix of the conversation.
    """
    if not conversations:
        raise UserError("conversations: got none to train on")
    render = tokenizer.apply_chat_template
    texts = [render(list(messages), tokenize=False) for messages in conversations]
    prompts = [render(list(messages[:-1]), tokenize=False, add_generation_prompt=True) for messages in conversations]
    tokens_N, prompt_N = (tokenizer(some, add_special_tokens=False)["input_ids"] for some in (texts, prompts))
    encoded = []
    for text, tokens, prompt in zip(texts, tokens_N, prompt_N):
        if len(tokens) <= len(prompt) or tokens[: len(prompt)] != prompt:
            raise TemplateError(f"chat template: the prompt's tokens are no proper prefix of those of {text!r:.300}")
        cut = max(0, len(tokens) - max_length)
        encoded.append(Encoded(tokens[cut:], max(1, len(prompt) - cut)))
    return encoded


def padded(rows: Sequence[list[int]], pad_token_id: int) -> Tensor:
    """Token ids [B, T], padded on the right: a causal model needs no mask to ignore it."""
    input_BT = torch.full((len(rows), max(map(len, rows))), pad_token_id)
    for number, row in enumerate(rows):
        input_BT[number, : len(row)] = torch.tensor(row)
    return input_BT


def batches(length_N: Indices, batch_tokens: int, seed: int) -> Iterator[Indices]:
    """Batches without end: every epoch a new order, similar lengths inside a batch, the batches in random order.

    A batch times its longest sequence is at most `batch_tokens`; a longer sequence goes alone.
    """
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(len(length_N))
        order = order[np.argsort(length_N[order], kind="stable")]
        epoch, start = [], 0
        for end in range(1, len(order) + 1):
            # Sorted by length, so the next sequence would be the longest of the batch.
            if end == len(order) or (end + 1 - start) * length_N[order[end]] > batch_tokens:
                epoch.append(order[start:end])
                start = end
        yield from (epoch[number] for number in rng.permutation(len(epoch)))
