"""Thresholds: which rows of a score a leaf keeps, decided by order statistics over shards.

    decide (driver)  -- queries -->  ShardValues.answer (each shard)  ->  Thresholds  ->  keep (each shard)

A *label* names a stratum: the values of the quota's columns; `()` is the whole corpus. N: rows of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefsel.errors import UserError
from prefsel.numbers.order import Located, Target, locate, target
from prefsel.numbers.quantiles import quantiles
from prefsel.numbers.ranges import BLOCK, WORD_BITS, Ask, Summary
from prefsel.numbers.shard_values import ShardValues
from prefsel.rules import Above, Band, Between, Label, Leaf, largest_remainder, percentile, rule_budget


@dataclass(frozen=True)
class Threshold:
    """The last row of a cut: rows at or before it in the total order are kept."""

    score: float
    pair_id: int | None
    """The last pair_id kept among those with exactly `score` (128 bits), or None: all of them."""
    descending: bool

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to apply the cut."""
        return self.pair_id is not None

    def to_json(self) -> dict[str, float | str | None]:
        """For a manifest, the pair_id as hex."""
        return {"score": self.score, "pair_id": None if self.pair_id is None else f"{self.pair_id:032x}"}


@dataclass(frozen=True)
class Thresholds:
    """What a leaf decided about the corpus; enough for a shard to keep its own rows."""

    last: Mapping[Label, Threshold | None]
    """Of `top` and `quota`: the last row kept per stratum; None keeps nothing of it."""
    edges: tuple[float, float] | None = None
    """Of `band` and `above`: kept are the rows strictly between them."""
    neighbours: tuple[float, float] | None = None
    """Of `band`: the scores that decide, those of the rows at or before its lower and at or behind its upper edge."""
    limits: Mapping[Label, tuple[float, float]] | None = None
    """Of `threshold`: kept are the rows from the first value of their stratum to the second, both included."""
    reverse: bool = False
    """Of `band`, `above` and `threshold`: keep the complement. (A reversed top has ascending thresholds.)"""
    length_edges: tuple[float, ...] | None = None
    """Of strata by `length_bin`: the inner edges."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to apply the cut: only where a threshold score ties."""
        return any(cut is not None and cut.needs_ids for cut in self.last.values())

    def to_json(self) -> dict[str, Any]:
        """For a manifest: edges, or per stratum the threshold score and pair_id (null: all ties kept)."""
        if self.limits is not None:
            if () in self.limits:
                return _named_limits(*self.limits[()]) | {"reverse": self.reverse}
            return {label_text(label): _named_limits(*both) for label, both in self.limits.items()}
        if self.edges is not None:
            low, high = self.edges
            named = {"above": low} if math.isinf(high) else {"low": low, "high": high}
            return named | {"reverse": self.reverse}
        return {label_text(label): cut and cut.to_json() for label, cut in self.last.items()}


def _named_limits(low: float, high: float) -> dict[str, float]:
    return {name: one for name, one in (("from", low), ("to", high)) if math.isfinite(one)}


@dataclass(frozen=True)
class Decided:
    """The thresholds of a leaf, and how many rows they keep of each shard."""

    thresholds: Thresholds
    kept_S: np.ndarray | None
    """int64; None where it was not told on the way."""


def label_text(label: Label) -> str:
    """A stratum's name as written in selections and manifests: its values joined by `/`, null as `null`."""
    return "/".join("null" if value is None else value for value in label) or "all"


def decide(rule: Leaf, summaries: Mapping[Label, Sequence[Summary]], ask: Ask) -> Decided:
    """The thresholds of `rule` over a corpus.

    Args:
        rule: what to keep.
        summaries: of the scores of all shards, by stratum: by the quota's columns, else one, of label `()`.
        ask: sends queries to every shard.

    Raises:
        UserError: a count above the eligible corpus; pair_ids that are not unique where a score ties; a table of values
            that lacks a stratum.
    """
    if isinstance(rule, Above):
        return Decided(Thresholds({}, edges=(rule.threshold, math.inf), reverse=rule.reverse), None)
    if isinstance(rule, Between):
        return Decided(Thresholds({}, limits=_limits(rule, summaries), reverse=rule.reverse), None)
    sizes = {label: sum(one.count for one in many) for label, many in summaries.items()}
    if isinstance(rule, Band):
        return _band(rule, summaries, sizes[()], ask)
    labels = sorted(sizes, key=lambda label: [(value is not None, value or "") for value in label])
    seats = largest_remainder([sizes[label] for label in labels], rule_budget(rule, sum(sizes.values())))
    targets = {
        (label, 0): target(summaries[label], count, descending=not rule.reverse, by_id=True)
        for label, count in zip(labels, seats)
        if count
    }
    found = locate(targets, ask)
    last = {label: threshold(targets[label, 0], found[label, 0]) if (label, 0) in found else None for label in labels}
    kept_KS = np.array([targets[key].kept_S(words) for key, words in found.items()], np.int64)
    return Decided(Thresholds(last), kept_KS.sum(axis=0) if len(found) else None)


def threshold(one: Target, found: Sequence[Located]) -> Threshold:
    """The row that was searched for, as the last one of a cut."""
    score, *words = (word.value for word in found)
    pair_id = (int(words[0]) << WORD_BITS) | int(words[1]) if words else None
    return Threshold(float(score), pair_id, one.descending)


def _limits(rule: Between, summaries: Mapping[Label, Sequence[Summary]]) -> dict[Label, tuple[float, float]]:
    """The values of every stratum that occurs.

    Raises:
        UserError: a table of values lacks one of them.
    """
    labels = [label for label, many in summaries.items() if many] if rule.by else [()]
    strata = {label_text(label) for label in labels} if rule.by else set()
    for end, table in (("low", rule.low), ("high", rule.high)):
        if isinstance(table, dict) and (lacking := sorted(strata - set(table))):
            raise UserError(
                f"rule threshold: {end} has no value for {', '.join(lacking)} (by {', '.join(rule.by or ())}); "
                f"got {', '.join(sorted(table)) or 'none'}; valid: one for each of {', '.join(sorted(strata))}"
            )
    return {label: rule.limits(label_text(label)) for label in labels}


def _band(rule: Band, summaries: Mapping[Label, Sequence[Summary]], size: int, ask: Ask) -> Decided:
    if not size:
        return Decided(Thresholds({}, edges=(0.0, 0.0), reverse=rule.reverse), None)
    found = quantiles({"low": ((), percentile(rule.low)), "high": ((), percentile(rule.high))}, summaries, ask)
    # No row lies between a percentile and its neighbours, so a row above the lower edge is one above the row at or
    # before it. The percentile itself may be rounded onto a row: 1e9 + 0.3 · 1e-7 is 1e9.
    low, high = found["low"].below, found["high"].above
    inside_S = np.maximum(high.below_S - low.below_S - low.at_S, 0)
    kept_S = low.below_S + low.at_S + low.above_S - inside_S if rule.reverse else inside_S
    edges, neighbours = (found["low"].value, found["high"].value), (float(low.value), float(high.value))
    return Decided(Thresholds({}, edges=edges, neighbours=neighbours, reverse=rule.reverse), kept_S)


def keep(cut: Thresholds, rows: ShardValues) -> np.ndarray:
    """Which rows of a shard the cut keeps, bool."""
    if cut.limits is not None:
        low_N, high_N = limits_of(cut.limits, rows)
        is_inside_N = (rows.value_N >= low_N) & (rows.value_N <= high_N)
        return ~is_inside_N if cut.reverse else is_inside_N
    if cut.edges is not None:
        low, high = cut.neighbours or cut.edges
        is_inside_N = (rows.value_N > low) & (rows.value_N < high)
        return ~is_inside_N if cut.reverse else is_inside_N
    cuts = [cut.last.get(label) for label in rows.labels]
    return keep_mask(rows.value_N, rows.ids_NW, cuts, rows.code_N)


def limits_of(limits: Mapping[Label, tuple[float, float]], rows: ShardValues) -> tuple[np.ndarray, np.ndarray]:
    """The two values of each row's stratum, float64 [N] each, infinite where there is none."""
    both_S2 = np.array([limits[label] for label in rows.labels], np.float64).reshape(-1, 2)
    code_N = np.zeros(len(rows.value_N), np.int64) if rows.code_N is None else rows.code_N
    return both_S2[code_N, 0], both_S2[code_N, 1]


def keep_mask(
    score_N: np.ndarray, ids_NW: np.ndarray | None, cuts: Sequence[Threshold | None], code_N: np.ndarray | None = None
) -> np.ndarray:
    """Which rows are at or before the cut of their stratum.

    Args:
        score_N: float64, finite.
        ids_NW: may be None when no cut `needs_ids`.
        cuts: one per stratum, all of one direction; None keeps nothing of it.
        code_N: position in `cuts` of each row, -1 for rows that are never kept; None: all rows are in the first.
    """
    is_kept_N = np.zeros(len(score_N), bool)
    given = [cut for cut in cuts if cut is not None]
    if not given:
        return is_kept_N
    never = math.inf if given[0].descending else -math.inf
    limit_S = np.array([never if cut is None else cut.score for cut in [*cuts, None]])
    for start in range(0, len(score_N), BLOCK):
        block = slice(start, start + BLOCK)
        score_B, limit_B = score_N[block], limit_S[0 if code_N is None else code_N[block]]
        is_kept_N[block] = score_B >= limit_B if given[0].descending else score_B <= limit_B
        if any(cut.needs_ids for cut in given):
            tie_M = np.flatnonzero(score_B == limit_B) + start
            is_kept_N[tie_M] = _ids_up_to(ids_NW, tie_M, cuts, 0 if code_N is None else code_N[tie_M])
    return is_kept_N


def _ids_up_to(
    ids_NW: np.ndarray | None, row_M: np.ndarray, cuts: Sequence[Threshold | None], code_M: np.ndarray | int
) -> np.ndarray:
    """Whether the pair_id of each row is at or before that of its stratum's cut."""
    if ids_NW is None:
        raise ValueError("this cut needs the pair_ids")
    last = [(1 << 128) - 1 if cut is None or cut.pair_id is None else cut.pair_id for cut in cuts]
    words = [divmod(pair_id, 1 << WORD_BITS) for pair_id in last]
    last_SW = np.array(words, np.uint64).reshape(-1, 2)  # also of no cut: a shard may lack every stratum that ties
    ids_MW, last_MW = ids_NW[row_M], last_SW[code_M]
    first_M, last_M = ids_MW[:, 0], last_MW[..., 0]
    return (first_M < last_M) | ((first_M == last_M) & (ids_MW[:, 1] <= last_MW[..., 1]))
