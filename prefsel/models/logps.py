r"""Log-probs of completions, \(\sum_t \log \pi(y_t \mid x, y_{<t})\) over response tokens, from packed rows.

The trunk sees every token of a row once, the head only the rows that predict a response token, some at a time. The
same function scores and trains: it calls the model's own modules, so autograd, forward-mode derivatives, adapters,
gradient checkpointing and ZeRO-3's gathering of weights work through it.

Shapes: T tokens of a row, R response tokens, C completions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefsel.errors import NonFiniteError, UserError
from prefsel.ingest.identity import completion_id, prompt_id
from prefsel.models.architecture import in_evaluation_mode, supports_packing, unwrapped
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.chat import EncodedGroup, Encoder, Truncation
from prefsel.models.head import head_logps
from prefsel.models.layout import Kernel, attention_area, build_layout
from prefsel.models.loading import check_vocabulary
from prefsel.models.neighbours import padding_matters, require_causal
from prefsel.models.packing import PackedBatch, pack
from prefsel.models.padded import PaddedBatch, pad, padded_logps
from prefsel.models.positions import num_positions
from prefsel.models.writer import Messages
from prefsel.pairs.arrow import as_rows

logger = logging.getLogger(__name__)

PADDED_LOGITS_BYTES = 2_000_000_000
"""Most memory for the logits of a padded batch: models that are called whole cannot take their head in chunks."""


def packed_logps(model: nn.Module, batch: PackedBatch, *, head_chunk: int = 1024, kernel: Kernel = "auto") -> Tensor:
    """Summed log-probs of every completion of a packed row.

    Args:
        model: A causal language model that `supports_packing`, or one with adapters of peft.
        batch: The row, on the model's device.
        head_chunk: Most rows whose logits exist at once without gradient, see `head_logps`; with gradient 0.4 GB of a
            plain head's. Weights partitioned by ZeRO-3 are called once.
        kernel: Attention, see `build_layout`; "matmul" for forward-mode derivatives.

    Returns:
        [C] float64, nats, in the order of `batch.completion_index`; with gradient if enabled. Each token's log-softmax
        is computed in fp32 (fp64 for an fp64 model), sums in fp64.

    Raises:
        UserError: The model cannot be packed exactly; names why.
    """
    hidden_TD = packed_hidden(model, batch, kernel=kernel)
    rows_R, targets_R = batch.rows_R.to(hidden_TD.device), batch.targets_R.to(hidden_TD.device)
    return batch.sums(head_logps(model, hidden_TD, rows_R, targets_R, head_chunk))


def packed_hidden(model: nn.Module, batch: PackedBatch, *, kernel: Kernel = "auto") -> Tensor:
    """Last hidden states of a packed row, [T, D], after the model's final norm.

    Raises:
        UserError: The model cannot be packed exactly; names why.
    """
    is_supported, reason = supports_packing(model)
    if not is_supported:
        raise UserError(f"this model cannot be packed: {reason}")
    model = unwrapped(model)
    if model.config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)
    config = model.config
    layout = build_layout(
        batch.segments,
        dtype=model.dtype,
        device=batch.input_ids_T.device,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        kernel=kernel,
    )
    output = model.base_model(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.position_ids_T[None],
        # Of four dimensions: handed on unread, where None would make transformers build a [T, T] mask.
        attention_mask=layout.causal[None, None],
        use_cache=False,
        layout=layout,
    )
    return output.last_hidden_state[0]


# ------------------------------------------------------------------------------------------------- groups → columns


@dataclass(frozen=True)
class Route:
    """How a model's numbers are computed: on packed rows, or padded because packing would not be exact."""

    is_packed: bool
    reason: str
    """Why not packed."""
    rows: Callable[[Sequence[EncodedGroup], int], Sequence[PackedBatch | PaddedBatch]]
    """(groups, token budget) → batches."""
    forward: Callable[[Any], Tensor]
    """A batch on the model's device → one number, or one per head, for each entry of its `completion_index`."""
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    """What `forward` runs in; forward-mode derivatives do not work in inference mode."""
    num_forwards: float = 1.0
    """What `forward` costs, in forward passes of the model."""

    def attention_area(self, batch: Any) -> int:
        """Query-key products per head that a batch takes."""
        return attention_area(batch.segments) if isinstance(batch, PackedBatch) else batch.attention_area


def logps_route(model: nn.Module, pad_token_id: int | None = None) -> Route:
    """The route of a causal language model; padded rows are filled with `pad_token_id`, or 0.

    Raises:
        UserError: The model's numbers are not those of a sequence alone, however its rows are made, or no log-probs.
    """
    is_packed, reason = supports_packing(model)
    if is_packed:
        return Route(True, "", pack, partial(packed_logps, model))
    fill, forward = pad_token_id or 0, partial(padded_logps, model)
    single = padding_matters(model, forward, fill)
    require_causal(model, forward)
    vocab_size = unwrapped(model).config.get_text_config().vocab_size
    most_tokens = PADDED_LOGITS_BYTES // (8 * vocab_size)
    rows = partial(_pad, pad_token_id=None if single else fill, most_tokens=most_tokens)
    return Route(False, "; ".join(filter(None, [reason, single])), rows, forward)


def _pad(
    groups: Sequence[EncodedGroup], token_budget: int, *, pad_token_id: int | None, most_tokens: int
) -> list[PaddedBatch]:
    return pad(groups, min(token_budget, most_tokens), pad_token_id=pad_token_id)


def score_groups(
    model: nn.Module,
    tokenizer: Any,
    groups: Any,
    *,
    token_budget: int,
    template: str = "auto",
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> dict[str, list[Any]]:
    r"""Log-probabilities of every completion of every group, each prompt computed once for all its completions.

    Groups are packed into rows without padding; models that cannot be packed exactly (sliding windows, encoders) take a
    padded path, which a warning of the logger `prefsel.models.logps` tells with its reason. Either way a completion's
    number is that of its sequence alone. It needs no cluster and no workspace.

    Args:
        model: A causal language model of transformers, on any device; one in training is scored without dropout.
        tokenizer: Its tokenizer.
        groups: One row per prompt: dictionaries, or a table in anything that `prefsel.pairs.arrow.as_table` takes, with
            `prompt` (a string, or messages with `role` and `content`) and `completions` (a list of strings, of lists of
            messages, or of `{"messages": …}`); `prompt_id` and `completion_id` (16 bytes) are made where they lack.
        token_budget: Most tokens of one packed row; memory grows with it, numbers change by rounding only.
        template: `auto` (the tokenizer's chat template), `plain`, `hh`, a Jinja file, or a Jinja template.
        max_length: Most tokens of prompt and response together; None: no limit.
        truncation: What happens to a longer one: `drop` it, or cut tokens from the `right` of the response or the
            `left` of the prompt.

    Returns:
        Columns aligned with the groups. `prompt_id`: 16 bytes each. Of the others a list over the completions of each
        group: `completion_ids`; `logps`, \(\sum_t \log\pi(y_t \mid x, y_{<t})\) in nats, summed over the response with
        its end-of-turn; `num_tokens` of the response; `status`, "ok", "too_long" or "template_error". Numbers are None
        where the status is not "ok".

    Raises:
        UserError: The groups lack a column, or template, tokenizer or arguments do not fit; the tokenizer has tokens
            that the model's embedding lacks; a sequence is longer than its positions; or the model's numbers are not
            those of a sequence alone.
        NonFiniteError: The model gave NaN or infinity; names the prompts.
    """
    check_vocabulary(tokenizer, model)
    encoder = Encoder(tokenizer, template, max_length, truncation)
    with in_evaluation_mode(model):
        route = logps_route(model, getattr(tokenizer, "pad_token_id", None))
        columns, values = routed(model, encoder, groups, route, token_budget)
    logps = [[None if v is None else v[0] for v in row] for row in values]
    return {**columns, "logps": logps}


def routed(
    model: nn.Module,
    encoder: Encoder,
    groups: Any,
    route: Route,
    token_budget: int,
) -> tuple[dict[str, list[Any]], list[list[list[float] | None]]]:
    """Every completion of every group through a route; `groups` and errors as `score_groups`.

    Returns:
        The columns of `score_groups` but for `logps`, and per group and completion the numbers of the route, or None.
    """
    given = as_rows(groups, ["prompt", "completions"], uses=["prompt_id"], name="groups")
    rows = list(map(_identified, given))
    pairs = [(row["prompt"], [c["messages"] for c in row["completions"]]) for row in rows]
    encoded = encoder.encode_groups(pairs, strict=False)
    values: list[list[list[float] | None]] = [[None] * len(group.status) for group in encoded]
    if not route.is_packed:
        logger.warning("%s takes the padded path: %s", type(unwrapped(model)).__name__, route.reason)
    with route.context():
        for batch in route.rows(encoded, token_budget):
            try:
                output = route.forward(batch.to(model_device(model))).reshape(len(batch.completion_index), -1)
            except IndexError as error:
                raise _without_positions(model, encoded, error) from error
            for (group, completion), numbers in zip(batch.completion_index, output.tolist()):
                values[group][completion] = numbers
    bad = [
        row["prompt_id"].hex()
        for row, found in zip(rows, values)
        if not all(map(math.isfinite, (number for numbers in found for number in numbers or ())))
    ]
    if bad:
        raise NonFiniteError(f"the model gave NaN or infinity for {len(bad)} prompts, first: {bad[:5]}")
    columns = {
        "prompt_id": [row["prompt_id"] for row in rows],
        "completion_ids": [[completion["completion_id"] for completion in row["completions"]] for row in rows],
        "num_tokens": [num_tokens(group) for group in encoded],
        "status": [group.status for group in encoded],
    }
    return columns, values


def _without_positions(model: nn.Module, encoded: Sequence[EncodedGroup], error: IndexError) -> Exception:
    """The error in words, where it is that a sequence is longer than the model has positions for."""
    limit = num_positions(unwrapped(model).config)
    longest = max(len(group.prompt_tokens) + max(map(len, group.completion_tokens), default=0) for group in encoded)
    if limit is None or longest <= limit:
        return error
    return UserError(
        f"max_length: a sequence has {longest:,} tokens, and the model positions for {limit:,}; give max_length={limit}"
    )


def num_tokens(group: EncodedGroup) -> list[float | None]:
    """Response tokens of each completion, the end-of-turn included; None where it has no log-prob."""
    return [float(len(ids)) if status == "ok" else None for ids, status in zip(group.completion_tokens, group.status)]


def _identified(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with messages and ids, whatever of it was strings or had none."""
    prompt = _messages(group["prompt"], "user")
    identity = group.get("prompt_id") or prompt_id(prompt)
    completions = []
    for given in group["completions"]:
        messages = _messages(given["messages"] if isinstance(given, Mapping) else given, "assistant")
        own = given.get("completion_id") if isinstance(given, Mapping) else None
        completions.append({"completion_id": own or completion_id(identity, messages), "messages": messages})
    return {"prompt_id": identity, "prompt": prompt, "completions": completions}


def _messages(value: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def model_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids."""
    return unwrapped(model).get_input_embeddings().weight.device
