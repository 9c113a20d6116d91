"""Rotary embeddings whose frequencies follow from the longest sequence of a batch: every row gets its own instead.

`longrope` (Phi-3) changes its factors above the length of pretraining, `dynamic` rescales with every token beyond it
and keeps what it computed. transformers asks the longest position of the whole batch, so that a prompt of four tokens
was scored as −24.32 nats alone and as −24.77 beside a longer one.

    lengths of rows ─▶ the module's own forward, once per length, from its first state ─▶ cosines and sines of every row

Shapes: B rows, T tokens of the longest, d of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTH_ROPES = ("dynamic", "longrope")
"""Parts of the `rope_type`s whose frequencies follow from a sequence's length (transformers: `dynamic_rope_update`)."""
ORIGINAL = "original_inv_freq"
"""What transformers calls the frequencies a module starts from, after a layer type where there are several."""


def length_ropes(config: Any) -> list[str]:
    """The rotary embeddings of a model's configuration that depend on a sequence's length; empty: none."""
    kinds = {str(one.get("rope_type") or one.get("type") or "") for one in rope_parameters(config)}
    return sorted(kind for kind in kinds if _depends_on_length(kind))


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of a configuration's rotary embeddings: one set, or one for each kind of layers that it has."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer = {name: one for name, one in found.items() if isinstance(one, Mapping)}
    used = getattr(text, "layer_types", None) or by_layer
    return [one for name, one in by_layer.items() if name in used] if by_layer else [found]


def length_rotaries(model: nn.Module) -> list[nn.Module]:
    """The modules of transformers that compute such embeddings."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(map(_depends_on_length, kinds.values() if isinstance(kinds, Mapping) else [kinds])):
            found.append(module)
    return found


@contextmanager
def own_frequencies(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Let every row of a right-padded batch be rotated as if it were alone; other models are left as they are.

    Args:
        model: It is called with the batch inside the block, once or several times.
        lengths: Tokens of each row, padding left out, [B].
    """
    rotaries = length_rotaries(model)

    def by_row(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return _by_row(module, args, kwargs, output, lengths)

    handles = [module.register_forward_hook(by_row, with_kwargs=True) for module in rotaries]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        reset(model)


def reset(model: nn.Module) -> None:
    """Forget every sequence that length-dependent rotary embeddings have met: as the model was loaded."""
    for module in length_rotaries(model):
        _reset(module)


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and any(name in kind for name in LENGTH_ROPES)


def _by_row(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, lengths: Sequence[int]
) -> Any:
    """The module's output where each row was asked for alone, zero behind its end.

    Args:
        module: Called with `args` and `kwargs`, among them `position_ids`, [1 or B, T] after any leading axes.
        args: Of the call.
        kwargs: Of the call.
        output: What it gave for the whole batch: a tensor [1 or B, T, d] after any leading axes, or several.
        lengths: Tokens of each row, [B].
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    positions = bound.arguments["position_ids"]
    is_single = isinstance(output, Tensor)
    shaped = [torch.zeros_like(one).repeat_interleave(len(lengths) // one.shape[-3], dim=-3) for one in _listed(output)]
    known: dict[int, list[Tensor]] = {}
    for row, length in enumerate(lengths):
        is_shared = positions.shape[-2] == 1
        if not is_shared or length not in known:
            _reset(module)
            own = positions[..., :1, :length] if is_shared else positions[..., row : row + 1, :length]
            bound.arguments["position_ids"] = own
            known[length] = _listed(module.forward(*bound.args, **bound.kwargs))
        for whole, part in zip(shaped, known[length]):
            whole[..., row : row + 1, :length, :] = part
    return shaped[0] if is_single else tuple(shaped)


def _listed(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _reset(module: nn.Module) -> None:
    """Back to the first frequencies: `dynamic` keeps those of the longest sequence it has met, `longrope` none."""
    kinds = module.rope_type
    named = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, Mapping) else {"": kinds}
    for prefix, kind in named.items():
        if "dynamic" in str(kind):
            device = getattr(module, f"{prefix}inv_freq").device
            first = getattr(module, f"{prefix}{ORIGINAL}").to(device)
            module.register_buffer(f"{prefix}inv_freq", first, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
