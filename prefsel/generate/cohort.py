"""Prompts that are answered together: their keys and values once for all samples, and those of every response.

    prompt_KV  [C prompts, P tokens]      x x x x x ·      written once, by the prompts' own pass
                                          x x x x x x
    own_KV     [B rows, S tokens]         y y y            a row is one response that still runs
                                          y y y
                                          y y y            rows of the first prompt, then …

A row attends to its prompt's keys, which all rows of the prompt share, and to its own. Rows begin together, so that
most cohorts have equally long ones, and nothing is padded but prompts of similar length. A row that ends is
overwritten by the last one; own keys grow in place, and double when there is no more room.

What no row holds is zero, never left over: a masked NaN is still one.

Shapes: T tokens of a packed row of prompts, C prompts, N samples a prompt, P tokens of the longest prompt, B rows,
S tokens of the longest response, K key heads, G query heads of each, D head size. `KV` is an axis of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

FIRST_TOKENS = 32
"""Tokens a response has room for at first."""


@dataclass(eq=False)
class Row:
    """A response in the making."""

    prompt: int
    """Its place among the prompts of the call."""
    sample: int
    """Which of the prompt's responses, counted from 0."""
    random: np.random.Generator
    """Gives every token its number."""
    tokens: list[int] = field(default_factory=list)
    """Drawn so far, without the stop token."""
    stop: str = ""
    """Why it ended: `end`, `length` or `poisoned`; empty: it has not."""

    def take(self, token: int, stops: Sequence[int], most_tokens: int) -> None:
        """Add a token that was drawn, or end; −1: there was no distribution to draw from."""
        if token < 0:
            self.stop = "poisoned"
        elif token in stops:
            self.stop = "end"
        else:
            self.tokens.append(token)
            self.stop = "length" if len(self.tokens) == most_tokens else ""


class Cohort:
    """Prompts with their rows, and the keys and values of both, layer by layer."""

    def __init__(self, prompt_lengths: Sequence[int], num_samples: int, rows: Sequence[Row], most_tokens: int) -> None:
        """Take rows in; what they need is allocated layer by layer, by the first pass.

        Args:
            prompt_lengths: Tokens of each prompt, [C].
            num_samples: N.
            rows: N of the first prompt, N of the second, …
            most_tokens: A response has at most so many.
        """
        self.prompt_lengths, self.num_samples, self.most_tokens = list(prompt_lengths), num_samples, most_tokens
        self.rows = list(rows)
        self.prompt_B = [number // num_samples for number in range(len(self.rows))]
        self.sample_B = [number % num_samples for number in range(len(self.rows))]
        self.room, self.num_places = min(FIRST_TOKENS, most_tokens), len(self.rows)
        self.prompt_KV: dict[int, Tensor] = {}
        """By layer, [2, C, K, P, D]."""
        self.own_KV: dict[int, Tensor] = {}
        """By layer, [2, places ≥ B, K, room ≥ S, D]."""
        self._plans: dict[torch.device, _Plan] = {}  # a model may be spread over several

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values have a place here, now or before the last row ends."""
        running = max(self.num_places * self.room, len(self.rows) * self.most_tokens)
        return len(self.prompt_lengths) * max(self.prompt_lengths) + running

    # ---------------------------------------------------------------------------------------- keys and values

    def write_prompts(
        self, layer: int, key_KTD: Tensor, value_KTD: Tensor, prompt_T: Tensor, position_T: Tensor
    ) -> None:
        """Keep what a packed row of prompts computed: token t is at `position_T[t]` of prompt `prompt_T[t]`."""
        if layer not in self.prompt_KV:
            heads, _, size = key_KTD.shape
            shape = (2, len(self.prompt_lengths), heads, max(self.prompt_lengths), size)
            self.prompt_KV[layer] = key_KTD.new_zeros(shape)
            self.own_KV[layer] = key_KTD.new_zeros(2, self.num_places, heads, self.room, size)
        for kept, new_KTD in zip(self.prompt_KV[layer], (key_KTD, value_KTD)):
            kept[prompt_T, :, position_T] = new_KTD.transpose(0, 1)

    def attend(self, layer: int, query_HBD: Tensor, key_KBD: Tensor, value_KBD: Tensor, scaling: float) -> Tensor:
        """One more token of every row attends to its prompt, its response so far and itself; [B, H, D]."""
        plan = self._planned(query_HBD.device, query_HBD.dtype)
        num_heads, num_rows, size = query_HBD.shape
        heads = key_KBD.shape[0]
        own_KV, prompt_KV = self.own_KV[layer][:, :num_rows], self.prompt_KV[layer]
        for kept, new_KBD in zip(own_KV, (key_KBD, value_KBD)):
            if plan.is_even:
                kept[:, :, plan.longest - 1] = new_KBD.transpose(0, 1)
            else:
                kept[plan.row_B, :, plan.last_B] = new_KBD.transpose(0, 1)
        key_BKSD, value_BKSD = own_KV[:, :, :, : plan.longest]
        query_BKGD = query_HBD.transpose(0, 1).reshape(num_rows, heads, num_heads // heads, size) * scaling
        own_BKGS = query_BKGD @ key_BKSD.transpose(2, 3)
        prompt_BKGP = plan.gathered(plan.spread(query_BKGD) @ prompt_KV[0].transpose(2, 3))
        if plan.own_mask is not None:
            own_BKGS += plan.own_mask
        if plan.prompt_mask is not None:
            prompt_BKGP += plan.prompt_mask
        scores = torch.cat([prompt_BKGP, own_BKGS], dim=-1)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=dtype).to(scores.dtype)
        prompt_BKGP, own_BKGS = weights.split([prompt_BKGP.shape[-1], plan.longest], dim=-1)
        output = own_BKGS @ value_BKSD + plan.gathered(plan.spread(prompt_BKGP) @ prompt_KV[1])
        return output.reshape(num_rows, num_heads, size)

    # --------------------------------------------------------------------------------------------- coming and going

    def leave(self) -> list[Row]:
        """Let the rows that have ended go, and their prompts with the last of them; returns them."""
        ended = [number for number, row in enumerate(self.rows) if row.stop]
        if not ended:
            return []
        gone = [self.rows[number] for number in ended]
        left = len(self.rows) - len(ended)
        # The last rows fill the holes, so that the running ones stay side by side.
        holes = [number for number in ended if number < left]
        moved = [number for number in range(left, len(self.rows)) if not self.rows[number].stop]
        for hole, number in zip(holes, moved):
            self.rows[hole] = self.rows[number]
            self.prompt_B[hole], self.sample_B[hole] = self.prompt_B[number], self.sample_B[number]
        del self.rows[left:], self.prompt_B[left:], self.sample_B[left:]
        for kept in self.own_KV.values() if holes else ():
            kept[:, holes] = kept[:, moved]
        self._plans = {}
        self._drop_prompts()
        return gone

    def grow(self) -> None:
        """Make room for one more token of every row."""
        self._plans = {}
        longest = max((len(row.tokens) for row in self.rows), default=0)
        if longest > self.room:
            self.room, self.num_places = min(2 * self.room, self.most_tokens), len(self.rows)
            for layer, kept in self.own_KV.items():
                self.own_KV[layer] = _resized(kept[:, : len(self.rows)], (2, len(self.rows), -1, self.room, -1))

    def _drop_prompts(self) -> None:
        """Forget prompts without a row once they are a quarter: each time all others are copied."""
        used = sorted(set(self.prompt_B))
        if not used or len(used) > 0.75 * len(self.prompt_lengths):
            return
        place = {prompt: number for number, prompt in enumerate(used)}
        self.prompt_lengths = [self.prompt_lengths[prompt] for prompt in used]
        self.prompt_B = [place[prompt] for prompt in self.prompt_B]
        longest = max(self.prompt_lengths)
        for layer, kept in self.prompt_KV.items():
            self.prompt_KV[layer] = kept[:, used, :, :longest].contiguous()

    @classmethod
    def merged(cls, first: Cohort, second: Cohort) -> Cohort:
        """Both as one: fewer calls where few rows are left."""
        cohort = cls(
            first.prompt_lengths + second.prompt_lengths,
            first.num_samples,
            first.rows + second.rows,
            first.most_tokens,
        )
        before = len(first.prompt_lengths)
        cohort.prompt_B = first.prompt_B + [before + prompt for prompt in second.prompt_B]
        cohort.sample_B = first.sample_B + second.sample_B
        cohort.room = max(first.room, second.room)
        longest = max(cohort.prompt_lengths)
        for layer in first.prompt_KV:
            prompts = [_resized(one.prompt_KV[layer], (2, -1, -1, longest, -1)) for one in (first, second)]
            cohort.prompt_KV[layer] = torch.cat(prompts, dim=1)
            own = [
                _resized(one.own_KV[layer][:, : len(one.rows)], (2, -1, -1, cohort.room, -1)) for one in (first, second)
            ]
            cohort.own_KV[layer] = torch.cat(own, dim=1)
        return cohort

    def _planned(self, device: torch.device, dtype: torch.dtype) -> _Plan:
        if device not in self._plans:
            self._plans[device] = _Plan.of(self, device, dtype)
        return self._plans[device]


@dataclass(frozen=True)
class _Plan:
    """What all layers of a step need to know of a cohort."""

    num_prompts: int
    num_samples: int
    is_full: bool
    """Every sample of every prompt runs, in order."""
    is_even: bool
    """All rows are equally long."""
    longest: int
    """S, the token of this step included."""
    row_B: Tensor
    last_B: Tensor
    """Where the token of this step goes."""
    prompt_B: Tensor
    sample_B: Tensor
    own_mask: Tensor | None
    """[B, 1, 1, S] of 0 and −inf."""
    prompt_mask: Tensor | None
    """[B, 1, 1, P] of 0 and −inf."""

    @classmethod
    def of(cls, cohort: Cohort, device: torch.device, dtype: torch.dtype) -> _Plan:
        lengths, prompts = [len(row.tokens) for row in cohort.rows], cohort.prompt_lengths
        rows = range(len(lengths))
        cells = [prompt * cohort.num_samples + sample for prompt, sample in zip(cohort.prompt_B, cohort.sample_B)]
        row_B, last_B, prompt_B, sample_B, length_B = torch.tensor(
            [
                list(rows),
                [length - 1 for length in lengths],
                cohort.prompt_B,
                cohort.sample_B,
                [prompts[prompt] for prompt in cohort.prompt_B],
            ]
        ).to(device)
        return cls(
            num_prompts=len(prompts),
            num_samples=cohort.num_samples,
            is_full=cells == list(range(len(prompts) * cohort.num_samples)),
            is_even=min(lengths) == max(lengths),
            longest=max(lengths),
            row_B=row_B,
            last_B=last_B,
            prompt_B=prompt_B,
            sample_B=sample_B,
            own_mask=None if min(lengths) == max(lengths) else _mask(last_B + 1, max(lengths), dtype),
            prompt_mask=None if min(prompts) == max(prompts) else _mask(length_B, max(prompts), dtype),
        )

    def spread(self, rows_BKGX: Tensor) -> Tensor:
        """Rows → [C, K, N·G, X], by prompt; zero where a sample has ended."""
        _, heads, group, size = rows_BKGX.shape
        shape = (self.num_prompts, heads, self.num_samples, group, size)
        if self.is_full:
            whole = rows_BKGX.view(shape[0], shape[2], heads, group, size).transpose(1, 2)
        else:
            whole = rows_BKGX.new_zeros(shape)
            whole[self.prompt_B, :, self.sample_B] = rows_BKGX
        return whole.reshape(self.num_prompts, heads, -1, size)

    def gathered(self, whole: Tensor) -> Tensor:
        """What `spread` did, undone: [C, K, N·G, X] → rows."""
        _, heads, _, size = whole.shape
        shaped = whole.view(self.num_prompts, heads, self.num_samples, -1, size)
        if self.is_full:
            return shaped.transpose(1, 2).reshape(-1, heads, shaped.shape[3], size)
        return shaped[self.prompt_B, :, self.sample_B]


def _mask(length_B: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """0 for the first tokens of each row, −inf behind them."""
    is_outside_BX = torch.arange(longest, device=length_B.device) >= length_B[:, None]
    mask_BX = torch.zeros(is_outside_BX.shape, dtype=dtype, device=length_B.device)
    return mask_BX.masked_fill_(is_outside_BX, float("-inf"))[:, None, None]


def _resized(kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers in a larger tensor, zero elsewhere; −1 stands for a size that stays."""
    whole = kept.new_zeros([old if new == -1 else new for old, new in zip(kept.shape, shape)])
    whole[tuple(slice(size) for size in kept.shape)] = kept
    return whole
