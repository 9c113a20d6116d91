"""The attention function of sampling, as transformers calls it: it keeps keys and values, so the model needs no cache.

Shapes: T tokens of a packed row, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefsel.generate.cohort import Cohort
from prefsel.models.attention import prompt_tree_attention
from prefsel.models.layout import Layout

IMPLEMENTATION = "prefsel_generate"


class KeysAndValues(Protocol):
    """What one pass of the model reads and writes."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `sampling_attention`."""
        ...


@dataclass(frozen=True)
class PromptPass:
    """Prompts side by side in a packed row, each attending to itself."""

    cohort: Cohort
    layout: Layout
    prompt_T: Tensor
    """Which prompt of the cohort each token belongs to."""
    position_T: Tensor
    """Where in the prompt it is."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `sampling_attention`."""
        places = (self.prompt_T.to(key.device), self.position_T.to(key.device))
        self.cohort.write_prompts(module.layer_idx, key[0], value[0], *places)
        return prompt_tree_attention(module, query, key, value, None, scaling=scaling, layout=self.layout)[0]


@dataclass(frozen=True)
class DecodeStep:
    """One token of every row of some cohorts, in their order."""

    cohorts: Sequence[Cohort]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `sampling_attention`."""
        sizes = [len(cohort.rows) for cohort in self.cohorts]
        parts = zip(self.cohorts, *(rows[0].split(sizes, dim=1) for rows in (query, key, value)))
        return torch.cat([cohort.attend(module.layer_idx, *part, scaling) for cohort, *part in parts])[None]


def sampling_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    keys_and_values: KeysAndValues,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The attention layer.
        query: [1, H, T, D].
        key: [1, K, T, D], K dividing H.
        value: [1, K, T, D].
        attention_mask: Ignored.
        scaling: Factor of the scores; default 1/√D.
        keys_and_values: Of the pass: a keyword of the model's own call, which every layer passes on.
        **kwargs: Ignored: there is no dropout, and no mask.

    Returns:
        [1, T, H, D], and None in place of the weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return keys_and_values.attend(module, query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, sampling_attention)
