"""Which token comes next: a number of a sequence of one's own, and the distribution function it inverts.

Every response has random numbers of its own, by (seed, key of its prompt, number of the sample, token), so neither its
neighbours nor how many samples are asked for change it.

Shapes: B rows, V vocabulary, H likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefsel.errors import invalid
from prefsel.generate.cohort import Row

LIKELIEST = 128
"""Tokens that are put in order before all are, on a CPU: with V = 8 192 and 64 rows sorting all took 20 ms, these 4."""
CHUNK_BYTES = 400_000_000
"""Most memory for the distributions of some rows, in fp64, with their order."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that holds this probability, in (0, 1]."""
    max_new_tokens: int = 256
    """A response that has not ended by then is cut."""
    seed: int = 0
    """Of all random numbers, 0 to 2^53 − 1; ignored at temperature 0."""

    def __post_init__(self) -> None:
        """Refuse numbers out of their range."""
        if self.temperature < 0:
            raise invalid("temperature", self.temperature, "0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "above 0, at most 1")
        if self.max_new_tokens < 1:
            raise invalid("max_new_tokens", self.max_new_tokens, "1 or more")
        if not 0 <= self.seed < 2**53:
            raise invalid("seed", self.seed, "0 to 2^53 − 1")


def draw(rows: Sequence[Row], logits_BV: Tensor, sampling: Sampling) -> list[int]:
    """The next token of every row, by its next random number.

    Returns:
        −1 where a row's logits are no distribution: NaN, +inf, or −inf for every token.
    """
    uniform_B = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
    next_B = pick(logits_BV, uniform_B.to(logits_BV.device), sampling.temperature, sampling.top_p)
    # Read together: one wait for the device a step.
    tokens: list[int] = next_B.where(logits_BV.amax(dim=-1).isfinite(), -1).tolist()
    return tokens


def random_numbers(seed: int, key: int, sample: int) -> np.random.Generator:
    """The random numbers of one response, of which every token takes the next one.

    Args:
        seed: Of the whole run, 53 bits.
        key: Of the prompt, 64 bits; from 2^63 on the upper 53 of them.
        sample: Which response to it: counts 2^192 Philox blocks onwards, so that no two share any.
    """
    # What numpy makes of a list with one such number, written out: responses of earlier versions stay what they were.
    rounded = min(int(float(key)), 2**64 - 1) if key >= 2**63 else key
    keys, counter = np.array([seed, rounded], dtype=np.uint64), np.array([0, 0, 0, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=keys, counter=counter))


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token each row draws with its uniform number in [0, 1), by inverting the distribution function; int64 [B].

    Tokens count from the likeliest down, equally likely ones from the first, so the tail beyond `top_p` is cut by
    scaling the uniform number.

    Args:
        logits_BV: On any device.
        uniform_B: In fp64, beside them.
        temperature: Divides the logits; 0 takes the likeliest token, and no random number.
        top_p: Draw from the smallest set of likeliest tokens that holds this probability, in (0, 1].
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    rows = max(1, CHUNK_BYTES // (32 * logits_BV.shape[1]))
    chunks = zip(logits_BV.split(rows), uniform_B.split(rows))
    return torch.cat([_pick(logits.float(), uniform, temperature, top_p) for logits, uniform in chunks])


def _pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    if logits_BV.device.type != "cpu" or logits_BV.shape[1] < 4 * LIKELIEST:
        return _pick_sorted(logits_BV, uniform_B, temperature, top_p)
    token_B, is_decided_B = _pick_likeliest(logits_BV, uniform_B, temperature, top_p)
    if not is_decided_B.all():
        (open_O,) = (~is_decided_B).nonzero(as_tuple=True)
        token_B[open_O] = _pick_sorted(logits_BV[open_O], uniform_B[open_O], temperature, top_p)
    return token_B


def _pick_sorted(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """With all tokens in order."""
    sorted_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    cumulative_BV = (sorted_BV.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The first token that reaches top_p is the last one kept.
    last_B1 = (cumulative_BV < top_p).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV.gather(1, last_B1)
    rank_B1 = (cumulative_BV <= threshold_B1).sum(dim=-1, keepdim=True)
    return token_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0]


def _pick_likeliest(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """With the likeliest tokens in order only; the token, and whether it is certainly the one, both [B]."""
    token_BH = logits_BV.topk(LIKELIEST, dim=-1, sorted=False).indices.sort(dim=-1).values
    sorted_BH, order_BH = logits_BV.gather(1, token_BH).sort(dim=-1, descending=True, stable=True)
    weights_BV = logits_BV.double()
    weights_BV.sub_(sorted_BH[:, :1]).div_(temperature).exp_()
    probability_BH = ((sorted_BH - sorted_BH[:, :1].double()) / temperature).exp() / weights_BV.sum(-1, keepdim=True)
    cumulative_BH = probability_BH.cumsum(dim=-1)
    last_B1 = (cumulative_BH < top_p).sum(dim=-1, keepdim=True)
    has_last_B1 = last_B1 < LIKELIEST
    last_B1 = last_B1.clamp(max=LIKELIEST - 1)
    # Without a cut all tokens hold probability 1, up to rounding.
    mass_B1 = torch.where(has_last_B1, cumulative_BH.gather(1, last_B1), torch.ones_like(cumulative_BH[:, :1]))
    rank_B1 = torch.minimum((cumulative_BH <= uniform_B[:, None] * mass_B1).sum(dim=-1, keepdim=True), last_B1)
    # Which of the tokens that equal the last one are among the likeliest is left to chance.
    is_clear_B1 = sorted_BH.gather(1, rank_B1) > sorted_BH[:, -1:]
    is_decided_B1 = is_clear_B1 & (has_last_B1 | (top_p == 1))
    return token_BH.gather(1, order_BH.gather(1, rank_B1))[:, 0], is_decided_B1[:, 0]
