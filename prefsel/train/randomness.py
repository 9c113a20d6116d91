"""A model's own randomness in training: switched off wherever a model keeps it, and proven to be off.

Stored reference log-probs were computed without dropout (TRL switches it off too), and without it a step is the same
however it is spread over workers. Architectures keep their probabilities in many places: modules of dropout, numbers on
layers (OPT, Llama), the configuration that a layer reads in its forward (Falcon), layer drop, stochastic depth, jitter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefsel.errors import UserError
from prefsel.train.batch import pair_outputs
from prefsel.train.data import EncodedPairs
from prefsel.train.objective import Run

PROBABILITY = re.compile("drop|jitter")
"""In the name of every number that decides how random a forward pass in training is."""


def silence(model: nn.Module) -> None:
    """Set every probability of dropout, layer drop, stochastic depth and jitter to 0, in modules and configuration."""
    for module in model.modules():
        if "Drop" in type(module).__name__ and isinstance(getattr(module, "p", None), float):
            module.p = 0.0
        _zero(module)
    for config in _configs(model):
        _zero(config)


@contextmanager
def declared(model: nn.Module, original: Any) -> Iterator[None]:
    """Inside, the model's configuration says what `original`, the one it was loaded with, says about dropout."""
    for config, before in zip(_configs(model), _with_parts(original)):
        for name in _probabilities(before):
            setattr(config, name, getattr(before, name))
    try:
        yield
    finally:
        for config in _configs(model):
            _zero(config)


@torch.no_grad()
def require_equal_forwards(run: Run, pairs: EncodedPairs) -> None:
    """Refuse a model whose outputs of the shortest pair differ between two forward passes in training mode.

    The dropout of adapters, which the configuration asks for, is left out of it; the random state stays as it is.

    Raises:
        UserError: They differ by more than two passes in evaluation mode do; names the first module that differs.
    """
    shortest = np.array([np.argmin(pairs.num_tokens_N)])
    modules = dict(run.engine.module.named_modules())
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        run.engine.train()
        asked_for = [one for name, one in modules.items() if ".lora_dropout." in name and one.training]
        for one in asked_for:
            one.eval()
        (first, seen), (second, seen_again) = (_watched(run, pairs, shortest, modules) for _ in range(2))
        for one in asked_for:
            one.train()
        difference = (first - second).abs().max().item()
        if difference == 0:
            return
        run.engine.eval()
        still = [pair_outputs(run, pairs, shortest)[0] for _ in range(2)]
    if difference <= 4 * (still[0] - still[1]).abs().max().item():
        return  # kernels that add in any order: no dropout
    # Where one pass skipped a layer, the first module that only one of them ran.
    differing = [one for one, other in zip_longest(seen, seen_again) if one != other and one is not None]
    name = (differing or seen[-1:])[0][0]
    raise UserError(
        f"model: two forward passes in training mode differ by {difference:.3g}, first in {name} "
        f"({type(modules[name]).__name__}), although its dropout is off; set what makes it random to 0 in the model's "
        "config.json, since stored reference log-probs have no such noise"
    )


def _watched(
    run: Run, pairs: EncodedPairs, indices_P: Any, modules: dict[str, nn.Module]
) -> tuple[Tensor, list[tuple[str, float]]]:
    """The outputs, and a sum over the output of every module, in the order in which they end."""
    seen: list[tuple[str, float]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found = output if isinstance(output, tuple | list) else [output]
            seen.append((name, sum(one.double().sum().item() for one in found if isinstance(one, Tensor))))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items() if name]
    outputs, _ = pair_outputs(run, pairs, indices_P)
    for hook in hooks:
        hook.remove()
    return outputs, seen


def _zero(owner: Any) -> None:
    for name in _probabilities(owner):
        setattr(owner, name, 0.0)


def _probabilities(owner: Any) -> list[str]:
    return [
        name for name, value in vars(owner).items() if PROBABILITY.search(name.lower()) and isinstance(value, float)
    ]


def _configs(model: Any) -> list[Any]:
    return _with_parts(model.config)


def _with_parts(config: Any) -> list[Any]:
    """A configuration and those inside it, such as that of the text part."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]
