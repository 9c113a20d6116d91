"""Whether a padded row's number is that of its sequence alone: tried, not looked up, so that it holds for any model.

    made-up sequences of unequal length ─┬─ each alone, twice ──► the same?      no: refused
                                         └─ all in one batch ───► as alone?      no: one sequence a row, or refused

Where a model reads its last column (XLNet), or averages over padding, no batch of unequal rows gives its number.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from prefsel.errors import UserError
from prefsel.models.architecture import unwrapped
from prefsel.models.chat import EncodedGroup
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.rotary import length_ropes, length_rotaries

TRIED_LENGTHS = ((3, 4), (2, 9), (8, 12), (5, 19), (9, 9), (4, 14))
"""Tokens of prompt and response of the sequences; two are equally long, which shows what rounding alone does."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of the largest number; XLNet's rewards differ by as much as they are large, rounding by 1e-6."""
TOLERANCE_16_BITS = 0.05

PADDING_MATTERS = "what pads a row changes its number"

Forward = Callable[[PaddedBatch], Tensor]

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_causal: WeakSet[nn.Module] = WeakSet()


def padding_matters(model: nn.Module, forward: Forward, pad_token_id: int | None) -> str:
    """Why rows must hold one sequence each; empty: padding changes no number. Tried once for each model.

    Args:
        model: In evaluation mode, on its device.
        forward: A padded batch on the model's device → one number, or several, per row.
        pad_token_id: What fills rows; None: rows are single anyway.

    Raises:
        UserError: Even alone, a sequence's number is not its own: it changes from call to call, or with what the model
            met before.
    """
    if model not in _found:
        _refuse_known(model)
        _found[model] = _tried(model, forward, pad_token_id)
    return _found[model]


def require_padding(model: nn.Module, forward: Forward, pad_token_id: int, *, what: str) -> None:
    """Refuse a model whose rows must be single, where several are needed at once; errors also as `padding_matters`.

    Args:
        model: As `padding_matters`.
        forward: As `padding_matters`.
        pad_token_id: As `padding_matters`.
        what: What cannot be done with it, for the error.

    Raises:
        UserError: Padding changes its numbers.
    """
    if reason := padding_matters(model, forward, pad_token_id):
        raise UserError(
            f"{_name(model)}: {what} takes two completions or more at once, and of this model {reason}; use a model "
            "whose numbers do not depend on padding (this one can score, one sequence at a time)"
        )


def require_causal(model: nn.Module, forward: Forward) -> None:
    """Refuse a model that sees the tokens it is asked for: its log-probs are none. Tried once for each model.

    An encoder with a language model's head, such as BERT, is loaded as one without a word. What it gives for the first
    half of a response changes with the second. All sequences that are compared are equally long, because the rotary
    embedding of some models follows the length.

    Args:
        model: In evaluation mode, on its device.
        forward: A padded batch on the model's device → the log-prob of each row's response.

    Raises:
        UserError: It is not causal.
    """
    if model in _causal:
        return
    wholes: list[EncodedGroup] = []
    ends: list[EncodedGroup] = []
    for group in _sequences(unwrapped(model)):
        prompt, (response,) = group.prompt_tokens, group.completion_tokens
        middle = len(response) // 2
        begun, end = response[:middle], response[middle:]
        for one in (end, list(itertools.islice(itertools.cycle(prompt), len(end)))):
            wholes.append(EncodedGroup(prompt, [begun + one], ["ok"], 0))
            ends.append(EncodedGroup(prompt + begun, [one], ["ok"], 0))
    whole_N, end_N = (_numbers(model, forward, pad(groups, 1, pad_token_id=None))[:, 0] for groups in (wholes, ends))
    begun_N2 = (whole_N - end_N).view(-1, 2)
    difference, largest = float((begun_N2[:, 0] - begun_N2[:, 1]).abs().max()), float(whole_N.abs().max())
    if difference > _tolerance(model) * largest:
        raise UserError(
            f"{_name(model)}: it sees the tokens that follow, so what it gives for a response is no log-prob (that of "
            f"a first half changes by {difference:.3g} with the second, where the largest is {largest:.3g}); valid: a "
            'model that reads from left to right, for BERT and its kin "is_decoder": true in its config.json'
        )
    _causal.add(model)


def _refuse_known(model: nn.Module) -> None:
    """Refuse what short sequences do not show."""
    inner = unwrapped(model)
    config = inner.config
    who = _name(model)
    if (ropes := length_ropes(config)) and not length_rotaries(inner):
        raise UserError(
            f"{who}: its {' and '.join(map(repr, ropes))} rotary embedding follows the longest sequence of a batch, in "
            "code that transformers does not share; use a version of the model without code of its own"
        )
    if getattr(config, "attention_type", None) == "block_sparse" or config.model_type == "reformer":
        raise UserError(
            f"{who}: its sparse attention changes with what it met before (drawn blocks, a switch to full attention); "
            'BigBird can be scored with "attention_type": "original_full" in its config.json'
        )


def _tried(model: nn.Module, forward: Forward, pad_token_id: int | None) -> str:
    """`padding_matters` of a model that was not tried yet."""
    groups = _sequences(unwrapped(model))
    alone = _numbers(model, forward, pad(groups, 1, pad_token_id=None))
    finite = torch.isfinite(alone).all(dim=1)
    if not finite.any():
        return ""  # Nothing can be said; real sequences are isolated as poisoned.
    groups, alone = [group for group, is_finite in zip(groups, finite) if is_finite], alone[finite]
    limit = _tolerance(model) * float(alone.abs().max())
    again = float((_numbers(model, forward, pad(groups, 1, pad_token_id=None)) - alone).abs().max())
    if again > limit:
        raise UserError(
            f"{_name(model)}: the same sequences got numbers {again:.3g} apart when they were asked for twice; "
            "valid: a model without randomness and memory in evaluation mode"
        )
    if pad_token_id is None:
        return ""
    lengths = [_length(group) for group in groups]
    equal = [number for number, length in enumerate(lengths) if lengths.count(length) > 1]
    side = pad([groups[number] for number in equal], 2**20, pad_token_id=0)
    rounding = float((_numbers(model, forward, side) - alone[equal]).abs().max()) if equal else 0.0
    beside = float((_numbers(model, forward, pad(groups, 2**20, pad_token_id=pad_token_id)) - alone).abs().max())
    # A model that mixes its rows does so without padding, too: rounding excuses no more than threefold.
    if beside <= max(limit, min(4 * rounding, 3 * limit)):
        return ""
    return f"{PADDING_MATTERS} (by up to {beside:.3g} where the largest is {float(alone.abs().max()):.3g})"


def _numbers(model: nn.Module, forward: Forward, batches: list[PaddedBatch]) -> Tensor:
    """One row of numbers for each sequence of the batches, in their order, on the CPU."""
    device = unwrapped(model).get_input_embeddings().weight.device
    with torch.no_grad():
        rows = [forward(batch.to(device)).reshape(len(batch.lengths), -1) for batch in batches]
    keys = [key for batch in batches for key in batch.completion_index]
    return torch.cat(rows).cpu()[sorted(range(len(keys)), key=keys.__getitem__)]


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE.get(unwrapped(model).dtype, TOLERANCE_16_BITS)


def _name(model: nn.Module) -> str:
    inner = unwrapped(model)
    return f"model {inner.config.name_or_path or inner.config.model_type} ({type(inner).__name__})"


def _length(group: EncodedGroup) -> int:
    return len(group.prompt_tokens) + len(group.completion_tokens[0])


def _sequences(model: Any) -> list[EncodedGroup]:
    """Prompts with one response, of tokens that mean nothing to the model; each ends with its end of sequence."""
    config, rng = model.config.get_text_config(), random.Random(0)  # nosec B311 # made-up token ids
    declared = {name: getattr(config, name, None) for name in dir(config) if name.endswith("token_id")}
    size = config.vocab_size  # under ZeRO-3 the embedding itself has no row here
    special = {token for token in declared.values() if isinstance(token, int)}
    plain = [token for token in range(min(size, 4096)) if token not in special] or [0]
    eos = declared.get("eos_token_id")
    last = [eos] if isinstance(eos, int) and 0 <= eos < size else []
    groups = []
    for prompt, response in TRIED_LENGTHS:
        tokens = [rng.choice(plain) for _ in range(prompt + response - len(last))] + last
        groups.append(EncodedGroup(tokens[:prompt], [tokens[prompt:]], ["ok"], 0))
    return groups
