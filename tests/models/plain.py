"""The oracle of padded models: transformers itself, given one sequence with its mask, and nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prefsel.models.chat import EncodedGroup

Numbers = dict[tuple[int, int], list[float]]


def plain_numbers(model: Any, groups: Sequence[EncodedGroup], *, is_reward: bool) -> Numbers:
    """Rewards, or the log-prob of the response, of every completion; each by a fresh copy, so that nothing is kept."""
    found = {}
    for g, group in enumerate(groups):
        for c, response in enumerate(group.completion_tokens):
            ids = torch.tensor([group.prompt_tokens + response])
            with torch.no_grad():
                logits = copy.deepcopy(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            if is_reward:
                found[g, c] = logits.tolist()
            else:
                logps_TV = logits[len(group.prompt_tokens) - 1 : -1].double().log_softmax(-1)
                found[g, c] = [float(logps_TV.gather(1, torch.tensor(response)[:, None]).sum())]
    return found


def route_numbers(route: Any, groups: Sequence[EncodedGroup], token_budget: int) -> Numbers:
    """What a route makes of them."""
    found = {}
    with route.context():
        for batch in route.rows(groups, token_budget):
            values = route.forward(batch).reshape(len(batch.completion_index), -1).tolist()
            found |= dict(zip(batch.completion_index, values))
    return found


def largest_difference(got: Numbers, expected: Numbers) -> float:
    """Over all numbers of all completions."""
    assert got.keys() == expected.keys()
    return max(abs(a - b) for key, row in expected.items() for a, b in zip(got[key], row, strict=True))


def called_with(route: Any) -> list[int]:
    """Receives the rows of every batch that the route's model is called with."""
    sizes: list[int] = []
    model: Callable[..., Any] = route.forward.args[0]
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes
