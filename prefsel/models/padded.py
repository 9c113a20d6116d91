"""One completion per row, padded on the right and masked: for models that packed rows would not serve exactly.

Right padding keeps every token's position what it is alone, and a causal model never looks at what follows; encoders
get the mask. The model's own forward is called whole with ids and mask alone, so soft-capping, scaling, poolers and
positions are its own: RoBERTa and its kin number theirs from their ids and not from 0. Rotary embeddings that follow
the longest row get every row's own length (`rotary`). What is still not the number of the sequence alone is found by
`neighbours`.

Shapes: B rows, T tokens of the longest, R response tokens of a row, V vocabulary, H heads of a reward model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefsel.models.chat import EncodedGroup
from prefsel.models.rotary import own_frequencies


@dataclass(frozen=True)
class PaddedBatch:
    """Completions with their prompts, side by side."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    """Prompt + response."""
    completion_index: list[tuple[int, int]]
    """For each row: (position of its group in the sequence of groups, completion in the group)."""

    @property
    def trunk_tokens(self) -> int:
        """B·T, padding included."""
        return self.input_ids_BT.numel()

    @property
    def padding_tokens(self) -> int:
        """Tokens of no completion."""
        return self.trunk_tokens - sum(self.lengths)

    @property
    def repeated_prompt_tokens(self) -> int:
        """The prompt of every completion but a group's first."""
        return sum(length for length, (_, number) in zip(self.prompt_lengths, self.completion_index) if number)

    @property
    def shared_tokens(self) -> int:
        """None: every completion has its own row."""
        return 0

    @property
    def attention_area(self) -> int:
        """Query-key pairs per head: the whole square of every row."""
        return len(self.lengths) * self.input_ids_BT.shape[1] ** 2

    @property
    def head_rows(self) -> int:
        """Rows that pass the head of a language model: from the first row any completion needs."""
        return len(self.lengths) * (self.input_ids_BT.shape[1] - min(self.prompt_lengths) + 1)

    def to(self, device: torch.device | str) -> PaddedBatch:
        """The same batch with its tensors on `device`."""
        ids, mask = self.input_ids_BT.to(device), self.attention_mask_BT.to(device)
        return PaddedBatch(ids, mask, self.prompt_lengths, self.lengths, self.completion_index)


def pad(groups: Sequence[EncodedGroup], token_budget: int, *, pad_token_id: int | None) -> list[PaddedBatch]:
    """Batches of at most `token_budget` tokens, padding included, of completions of similar length, longest first.

    Args:
        groups: Encoded groups; completions that are not `ok` have no output.
        token_budget: B·T at most; a single longer sequence has a batch of its own.
        pad_token_id: What fills the rows; None: nothing can, so every batch has one row.
    """
    rows: list[tuple[tuple[int, int], int, list[int]]] = []
    for number, group in enumerate(groups):
        starts = group.prompt_starts or (0,) * len(group.status)
        for completion, status in enumerate(group.status):
            if status == "ok":
                prompt = group.prompt_tokens[starts[completion] :]
                rows.append(((number, completion), len(prompt), prompt + group.completion_tokens[completion]))
    rows.sort(key=lambda row: -len(row[2]))
    batches, first = [], 0
    while first < len(rows):
        longest = len(rows[first][2])
        size = 1 if pad_token_id is None else max(1, token_budget // longest)
        batches.append(_batch(rows[first : first + size], longest, pad_token_id or 0))
        first += size
    return batches


def _batch(rows: list[tuple[tuple[int, int], int, list[int]]], longest: int, pad_token_id: int) -> PaddedBatch:
    ids_BT = torch.full((len(rows), longest), pad_token_id)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, (_, _, tokens) in enumerate(rows):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        mask_BT[row, : len(tokens)] = 1
    return PaddedBatch(
        input_ids_BT=ids_BT,
        attention_mask_BT=mask_BT,
        prompt_lengths=tuple(prompt_length for _, prompt_length, _ in rows),
        lengths=tuple(len(tokens) for _, _, tokens in rows),
        completion_index=[key for key, _, _ in rows],
    )


def padded_logps(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Summed log-probs of every row's response, [B] float64, nats; log-softmax in fp32, sums in fp64."""
    logps = []
    for logits_RV, targets_R in zip(response_logits(model, batch), response_targets(batch)):
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        rows_RV = logits_RV.log_softmax(dim=-1, dtype=dtype)
        logps.append(rows_RV.gather(1, targets_R[:, None].to(rows_RV.device)).double().sum())
    return torch.stack(logps)


def response_logits(model: nn.Module, batch: PaddedBatch) -> list[Tensor]:
    """The logits that predict the response tokens of every row, B of [R, V], from one forward of the whole batch."""
    ids_BT = batch.input_ids_BT
    first = min(batch.prompt_lengths) - 1
    keep = torch.arange(first, ids_BT.shape[1], device=ids_BT.device)
    options = _accepted(model, logits_to_keep=keep)
    logits_BTV = _logits(model, batch, options)
    if "logits_to_keep" not in options:  # an adapter may have put virtual tokens before each row
        logits_BTV = logits_BTV[:, logits_BTV.shape[1] - ids_BT.shape[1] + first :]
    return [
        logits_TV[start - 1 - first : end - 1 - first]
        for logits_TV, start, end in zip(logits_BTV, batch.prompt_lengths, batch.lengths)
    ]


def response_targets(batch: PaddedBatch) -> list[Tensor]:
    """The response tokens of every row, B of [R]."""
    return [ids_T[start:end] for ids_T, start, end in zip(batch.input_ids_BT, batch.prompt_lengths, batch.lengths)]


def padded_rewards(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """The classifier's outputs, [B, H] float64."""
    return _logits(model, batch, {}).double()


def _logits(model: nn.Module, batch: PaddedBatch, options: dict[str, Any]) -> Tensor:
    """The model's own logits, given ids and mask, and no positions: it knows best how it counts them."""
    options = options | _accepted(model, use_cache=False)
    with own_frequencies(model, batch.lengths):
        logits: Tensor = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, **options).logits
    return logits


def _accepted(model: nn.Module, **options: Any) -> dict[str, Any]:
    """The options that the model's forward names: architectures without caches do not."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in known}
