"""Quantiles over shards, exactly as numpy's `linear` ones, from two order statistics each.

The value of a quantile is a float like any other: what decides about rows compares them with the order statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from prefsel.numbers.order import Located, locate, target
from prefsel.numbers.ranges import Ask, Summary


def _quantile_position(num_rows: int, q: float | Fraction) -> tuple[int, int, float]:
    """Ranks below and above the quantile `q` (0 to 1) and the way between them (numpy's `linear`).

    Of a `Fraction` the ranks are exact, and are one where the quantile is a row; of a float they are numpy's.
    """
    position = (num_rows - 1) * float(q)
    if isinstance(q, Fraction):
        exact = (num_rows - 1) * q
        below, above = math.floor(exact), math.ceil(exact)
    else:
        below = int(position)
        above = min(below + 1, num_rows - 1)
    return below, above, position - below


def _interpolate(below: float, above: float, fraction: float) -> float:
    """The point `fraction` of the way from `below` to `above`, rounded as numpy's quantiles are."""
    step = above - below
    if math.isinf(step):  # numpy gives NaN or an infinity
        return below * (1 - fraction) + above * fraction
    return above - step * (1 - fraction) if fraction >= 0.5 else below + step * fraction


@dataclass(frozen=True)
class Quantile:
    """A quantile, and the rows around it."""

    value: float
    below: Located
    """The row of the rank at or before it."""
    above: Located
    """That of the rank at or behind it; where the quantile is itself a row, exactly, the two are one."""


def quantiles(
    wanted: Mapping[Any, tuple[Any, float | Fraction]], summaries: Mapping[Any, Sequence[Summary]], ask: Ask
) -> dict[Any, Quantile]:
    """Quantiles of the rows of several strata, all in the same rounds.

    Args:
        wanted: by any name: which stratum, and the share, 0 to 1; see `_quantile_position`.
        summaries: of every stratum that is named, by shard; some rows each.
        ask: sends queries, by (stratum, rank), to every shard.
    """
    positions = {}
    for name, (label, share) in wanted.items():
        positions[name] = label, *_quantile_position(sum(one.count for one in summaries[label]), share)
    ranks = {(label, rank) for label, below, above, _ in positions.values() for rank in (below, above)}
    found = locate({(label, rank): target(summaries[label], rank + 1) for label, rank in sorted(ranks, key=str)}, ask)
    solved = {}
    for name, (label, low, high, fraction) in positions.items():
        (below,), (above,) = found[label, low], found[label, high]
        solved[name] = Quantile(_interpolate(float(below.value), float(above.value), fraction), below, above)
    return solved
