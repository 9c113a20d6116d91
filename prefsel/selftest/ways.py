"""Ways of making the rows, all of which must give the numbers of one sequence at a time.

Shapes: T tokens of a sequence, R response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefsel.models.architecture import unwrapped
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.logps import model_device
from prefsel.models.padded import PaddedBatch, pad, padded_logps, padded_rewards
from prefsel.models.reward import padded_rows
from prefsel.models.rotary import reset
from prefsel.score.engine import Engine, Values
from prefsel.selftest.subject import Subject

BATCH_SIZES = (1, 2, 8)
LOGITS_BYTES = 4_000_000_000
"""Most memory for the logits of a padded batch; longer sequences are left out of that check, and it says so."""
MOST_TOKENS = 65_536
"""Of a padded batch of a reward model, which has no logits."""


@dataclass(frozen=True)
class Path:
    """One way of making rows."""

    label: str
    compute: Callable[[Subject], Values]
    is_padded: bool


def paths(subject: Subject) -> list[Path]:
    """Every way that must give the reference's numbers."""
    is_padded = not subject.route.is_packed
    rows = "padded by length" if is_padded else "packed"
    engine = [("all groups together", together), ("reversed", _in_reverse)]
    engine += [(f"{size} group{'s' * (size > 1)} a row", partial(grouped, size=size)) for size in BATCH_SIZES]
    found = [Path(f"{rows}, {what}", compute, is_padded) for what, compute in engine]
    sizes = BATCH_SIZES if subject.pad_token_id is not None else (1,)
    padded = [(f"padded, {n} sequence{'s' * (n > 1)}", partial(_padded_unequal, size=n)) for n in sizes]
    return found + [Path(label, compute, True) for label, compute in padded]


def reference(subject: Subject) -> Values:
    """Every completion alone: the model's plain forward without padding, mask or packing, its own attention."""
    found: Values = {}
    with torch.inference_mode(), _own_attention(subject.model):
        for key in subject.keys:
            prompt, response = subject.sequence(key)
            ids_1T = torch.tensor([prompt + response], device=model_device(subject.model))
            reset(subject.model)
            output = subject.model(input_ids=ids_1T).logits[0]
            found[key] = output.tolist() if subject.is_reward else [_summed(output, len(prompt), response)]
    return found


def _summed(logits_TV: Tensor, start: int, response: Sequence[int]) -> float:
    """Log-prob of a response in fp64, 256 tokens at a time."""
    total = 0.0
    for first in range(0, len(response), 256):
        targets_R = torch.tensor(response[first : first + 256], device=logits_TV.device)
        rows_RV = logits_TV[start - 1 + first :][: len(targets_R)].double()
        total += float((rows_RV.gather(1, targets_R[:, None])[:, 0] - rows_RV.logsumexp(1)).sum())
    return total


def together(subject: Subject) -> Values:
    """Through the engine of a run, which isolates what the model cannot score: it is NaN here."""
    engine = Engine(subject.model, subject.encoder, subject.route, subject.token_budget)
    found, _ = engine.score_window(subject.groups, defaultdict(float))
    return {key: found.get(key, [math.nan]) for key in subject.keys}


def _in_reverse(subject: Subject) -> Values:
    """Groups from the last to the first, and so the completions of each."""
    turned = [
        replace(
            group,
            completion_tokens=group.completion_tokens[::-1],
            status=group.status[::-1],
            prompt_starts=group.prompt_starts[::-1],
        )
        for group in reversed(subject.groups)
    ]
    values = _forward(subject, subject.route.rows(turned, subject.token_budget), subject.route.forward)
    return {(len(turned) - 1 - g, len(turned[g].status) - 1 - c): numbers for (g, c), numbers in values.items()}


def grouped(subject: Subject, size: int) -> Values:
    """Few groups at a time."""
    found: Values = {}
    for first in range(0, len(subject.groups), size):
        rows = subject.route.rows(subject.groups[first : first + size], subject.token_budget)
        values = _forward(subject, rows, subject.route.forward)
        found |= {(first + g, c): numbers for (g, c), numbers in values.items()}
    return found


def _padded_unequal(subject: Subject, size: int) -> Values:
    """Rows of `size` sequences, long ones beside short ones, padded and called as transformers would be."""
    config = unwrapped(subject.model).config.get_text_config()
    most_tokens = MOST_TOKENS
    if not subject.is_reward:
        most_tokens = LOGITS_BYTES // (config.vocab_size * subject.model.dtype.itemsize)
    keys = [key for key in subject.keys if size == 1 or subject.length(key) * size <= most_tokens]
    keys.sort(key=subject.length)
    fill = subject.pad_token_id
    rows = padded_rows(subject.model, fill) if subject.is_reward else partial(pad, pad_token_id=fill)
    mixed = [keys[at // 2] if at % 2 == 0 else keys[-1 - at // 2] for at in range(len(keys))]
    found: Values = {}
    for first in range(0, len(mixed), size):
        beside = set(mixed[first : first + size])
        budget = size * max(map(subject.length, beside))
        found |= forward_padded(subject, rows(subject.only(beside).groups, budget))
    return found


def forward_padded(subject: Subject, rows: Iterable[PaddedBatch]) -> Values:
    """Rows through the padded path, with the pad token they are filled with."""
    forward = partial(padded_rewards if subject.is_reward else padded_logps, subject.model)
    with pad_token(subject.model, subject.pad_token_id):
        return _forward(subject, rows, forward)


def _forward(subject: Subject, rows: Iterable[Any], forward: Callable[[Any], Tensor]) -> Values:
    found: Values = {}
    with torch.inference_mode():
        for row in rows:
            output = forward(row.to(model_device(subject.model)))
            found |= zip(row.completion_index, output.reshape(len(row.completion_index), -1).tolist())
    return found


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Attention that transformers ships, in place of ours."""
    model = unwrapped(model)
    before = model.config._attn_implementation
    if before == IMPLEMENTATION:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def pad_token(model: Any, token: int | None) -> Iterator[None]:
    """Another pad token in the model's configuration, as a script sets it before it makes batches."""
    config = unwrapped(model).config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = token
    try:
        yield
    finally:
        config.pad_token_id = before


@contextmanager
def precision(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The same weights in a wider dtype; afterwards every tensor is what it was, for widening loses nothing."""
    before = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        model.to(dtype)
        yield
    finally:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(before[name])
