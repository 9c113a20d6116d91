"""Rewards of completions from sequence classifiers with one or several named heads, on packed rows.

The classifier reads one hidden row of each sequence: that of its last token, or, as in transformers at batch 1, of the
last token that is not the model's pad token. With pad = eos that is the token *before* a final eos, the row such a
head was trained on. Which sequences lie beside it does not matter: no padding of ours ever enters.

Shapes: T tokens of a row, C completions, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from prefsel.errors import UserError
from prefsel.models.architecture import supports_packing, unwrapped
from prefsel.models.chat import EncodedGroup
from prefsel.models.layout import Kernel
from prefsel.models.logps import Route, packed_hidden
from prefsel.models.neighbours import padding_matters
from prefsel.models.packing import PackedBatch, pack
from prefsel.models.padded import PaddedBatch, pad, padded_rewards

Rows = Callable[[Sequence[EncodedGroup], int], list[PaddedBatch]]
"""(groups, token budget) → batches."""


def packed_rewards(model: nn.Module, batch: PackedBatch, *, kernel: Kernel = "auto") -> Tensor:
    """Rewards of every completion of a packed row.

    Args:
        model: A classifier that `supports_packed_rewards`.
        batch: The row, on the model's device.
        kernel: Attention, see `layout.build_layout`.

    Returns:
        [C, H] float64, in the order of `batch.completion_index` and of the model's labels; with gradient if enabled.

    Raises:
        UserError: The model cannot be packed exactly; names why.
    """
    is_supported, reason = supports_packed_rewards(model)
    if not is_supported:
        raise UserError(f"this reward model cannot be packed: {reason}")
    hidden_TD = packed_hidden(model, batch, kernel=kernel)
    rows_C = _reward_rows(batch, unwrapped(model).config.pad_token_id).to(hidden_TD.device)
    return unwrapped(model).score(hidden_TD.index_select(0, rows_C)).double()


def _reward_rows(batch: PackedBatch, pad_token_id: int | None) -> Tensor:
    """The hidden row each completion is judged by, [C]: its last token that is not `pad_token_id`, else its first."""
    ids_T = batch.input_ids_T
    row_T = torch.arange(len(ids_T), device=ids_T.device)
    if pad_token_id is not None:
        row_T = torch.where(ids_T != pad_token_id, row_T, -1).cummax(0).values
    # From the last of a sequence's ranges to its first (M at most): the last row of the range, if that lies in it.
    depth = max(len(path.rows) for path in batch.paths)
    ranges = [[*path.rows[:1] * (depth - len(path.rows)), *path.rows] for path in batch.paths]
    start_CM, end_CM = torch.tensor(ranges, device=ids_T.device).unbind(-1)
    last_CM = row_T[end_CM - 1]
    found_C = start_CM[:, 0]
    for place in range(depth):
        found_C = torch.where(last_CM[:, place] >= start_CM[:, place], last_CM[:, place], found_C)
    return found_C


def supports_packed_rewards(model: nn.Module) -> tuple[bool, str]:
    """Whether packed rows give exactly this classifier's outputs, and if not, why."""
    is_supported, reason = supports_packing(model)
    if not is_supported:
        return False, reason
    inner = unwrapped(model)
    if not type(inner).__name__.endswith("ForSequenceClassification") or not isinstance(
        getattr(inner, "score", None), nn.Module
    ):
        return False, f"{type(inner).__name__} has no `score` layer on its last hidden state"
    return True, ""


def reward_route(model: nn.Module) -> Route:
    """How a reward model is run; padded rows take the model's own pad token, and without one are single.

    Raises:
        UserError: The model's numbers are not those of a sequence alone, however its rows are made.
    """
    is_packed, reason = supports_packed_rewards(model)
    if is_packed:
        return Route(True, "", pack, partial(packed_rewards, model))
    fill, forward = own_pad_token(model), partial(padded_rewards, model)
    single = padding_matters(model, forward, fill)
    rows = padded_rows(model, None if single else fill)
    return Route(False, "; ".join(filter(None, [reason, single])), rows, forward)


def padded_rows(model: nn.Module, pad_token_id: int | None) -> Rows:
    """How sequences are padded for a classifier: filled with a token, or single where that is None."""
    rows: Rows = partial(pad, pad_token_id=pad_token_id)
    config = unwrapped(model).config
    if not config.is_encoder_decoder:
        return rows
    return partial(_with_equal_ends, rows=rows, eos_token_id=config.eos_token_id)


def _with_equal_ends(
    groups: Sequence[EncodedGroup], token_budget: int, *, rows: Rows, eos_token_id: int
) -> list[PaddedBatch]:
    """Batches of sequences that have equally many eos tokens.

    BART, T5 and their kin read the row of a sequence's last one, and take no others together.
    """
    numbers = []
    for group in groups:
        starts = group.prompt_starts or (0,) * len(group.status)
        of_prompts = [group.prompt_tokens[start:].count(eos_token_id) for start in starts]
        numbers.append([n + ids.count(eos_token_id) for n, ids in zip(of_prompts, group.completion_tokens)])
    batches: list[PaddedBatch] = []
    for number in sorted({number for row in numbers for number in row}):
        masked = [
            replace(group, status=[what if n == number else "elsewhere" for n, what in zip(row, group.status)])
            for group, row in zip(groups, numbers)
        ]
        batches += rows(masked, token_budget)
    return batches


def own_pad_token(model: nn.Module) -> int | None:
    """The pad token of a classifier's configuration; None: it has none, or one that no row of the embedding is for.

    Old checkpoints of Llama say −1.
    """
    config = unwrapped(model).config.get_text_config()  # of a model that reads images, too
    token: int | None = getattr(config, "pad_token_id", None)
    is_known = token is not None and 0 <= token < config.vocab_size
    return token if is_known else None
