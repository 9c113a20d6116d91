"""Means over evaluation items with their intervals, and differences of two models over the same items.

Two models are compared item by item, so that what makes an item easy or hard for both cancels out. Items of one prompt
count together, as one draw: six pairs of a prompt are not six prompts.

Shapes: N items, G prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""95 % of a normal distribution lie within so many standard deviations of its mean."""


@dataclass(frozen=True)
class Values:
    """What a model reached on every item of an evaluation."""

    items: Sequence[str]
    """Names of the items, unique: pair_ids, or prompts."""
    prompts: Sequence[str]
    """The prompt of each item."""
    value_N: np.ndarray
    """float64; larger is better."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95 % interval, from the spread between prompts."""

    mean: float
    low: float | None
    """None, like `high`, of fewer than two prompts."""
    high: float | None
    num_items: int
    num_prompts: int


def estimate(value_N: np.ndarray, prompts: Sequence[str]) -> Estimate | None:
    r"""The mean of values whose items belong to prompts, with a normal interval: mean ± 1.96 standard errors.

    The standard error is that of a mean over clusters, \(\sqrt{\frac{G}{G-1}\sum_g(\sum_{i\in g}(v_i-\bar v))^2}/N\);
    with one item per prompt it is the usual \(s/\sqrt N\).

    Args:
        value_N: Values, [N] float64.
        prompts: The prompt of each, N.

    Returns:
        None without a value.

    Source: Miller 2024 (arXiv 2411.00640), "Adding Error Bars to Evals": clustered standard errors, and differences
    paired over items; the factor G / (G − 1), that of a sample variance, is ours.
    """
    if not len(value_N):
        return None
    mean = float(value_N.mean())
    _, group_N = np.unique(np.asarray(prompts), return_inverse=True)
    sum_G = np.bincount(group_N, weights=value_N - mean)
    if len(sum_G) < 2:
        return Estimate(mean, None, None, len(value_N), len(sum_G))
    error = math.sqrt(len(sum_G) / (len(sum_G) - 1) * float((sum_G**2).sum())) / len(value_N)
    return Estimate(mean, mean - Z_95 * error, mean + Z_95 * error, len(value_N), len(sum_G))


def paired_difference(ours: Values, theirs: Values) -> Estimate | None:
    """The mean of ours − theirs over the items that both have; None without such items."""
    both = difference(ours, theirs)
    return estimate(both.value_N, both.prompts)


def difference(ours: Values, theirs: Values) -> Values:
    """Ours − theirs over the items that both have, in the order of ours."""
    place = {item: number for number, item in enumerate(theirs.items)}
    own = [number for number, item in enumerate(ours.items) if item in place]
    items, prompts = ([names[number] for number in own] for names in (ours.items, ours.prompts))
    return Values(items, prompts, ours.value_N[own] - theirs.value_N[[place[item] for item in items]])
