"""Every rule, written down again row by row over plain Python lists: full sorts, loops, exact fractions.

Nothing is rounded that decides, but for z-scores, which are irrational.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np

Row = dict[str, Any]
"""`id` (int), `prompt`, `chosen`, `rejected`, `source`, `aspect`, `lengths` (two, or None), and scores or None."""


class Impossible(Exception):
    """What the package refuses: a count above the population, a z-score of a constant."""


class NearTie(Exception):
    """Two different sums that only rounding tells apart: no expectation is better than another."""


def naive_select(rule: dict[str, Any], rows: list[Row]) -> list[int]:
    """Positions of the kept rows."""
    names = named_scores(rule)
    population = [n for n, row in enumerate(rows) if all(row[name] is not None for name in names)]
    scores = made_scores(rule, rows, population)
    return sorted(keep(rule, rows, population, scores))


def named_scores(rule: dict[str, Any]) -> set[str]:
    inside = rule.get("rules", []) + ([rule["rule"]] if "rule" in rule else [])
    own = {rule["score"]} if "score" in rule else set(rule.get("scores", []))
    return own.union(*(named_scores(one) for one in inside))


# ------------------------------------------------------------------------------------------------ scores of rules


def made_scores(rule: dict[str, Any], rows: list[Row], population: list[int]) -> dict[str, dict[int, float]]:
    """Scores of every fusion, shuffle and budgeted intersection at any depth, by the rule's text."""
    found: dict[str, dict[int, float]] = {}
    for one in rule.get("rules", []) + ([rule["rule"]] if "rule" in rule else []):
        found |= made_scores(one, rows, population)
    if rule["kind"] == "fuse":
        found[repr(rule)] = fused(rule, rows, population)
    elif rule["kind"] == "agree":
        found[repr(rule)] = {n: consensus([rows[n][name] for name in rule["scores"]]) for n in population}
    elif rule["kind"] == "random":
        found[repr(rule)] = {n: hashed(rows[n]["id"], rule.get("seed", 0)) for n in population}
    elif rule["kind"] == "intersect" and "budget" in rule:
        shares = [percentiles(rows, population, band["score"]) for band in rule["rules"]]
        found[repr(rule)] = {n: -max(abs(share[n] - 50) for share in shares) for n in population}
    return found


def consensus(margins: list[float]) -> float:
    """What the least decided of agreeing judges says; 0 where they are divided or one says nothing."""
    if all(margin > 0 for margin in margins):
        return min(margins)
    return max(margins) if all(margin < 0 for margin in margins) else 0.0


def fused(rule: dict[str, Any], rows: list[Row], population: list[int]) -> dict[int, float]:
    names, num = rule["scores"], len(population)
    weights = rule.get("weights") or [1 / len(names)] * len(names)
    if rule["how"] == "rank":
        shares = [percentiles(rows, population, name) for name in names]
        exact_weights = [Fraction(str(w)) for w in weights]
        return {n: sum(w * (share[n] / 100) for w, share in zip(exact_weights, shares)) for n in population}
    terms: list[dict[int, float]] = []
    for name in names if population else []:
        exact = [Fraction(rows[n][name]) for n in population]
        mean = sum(exact) / num
        variance = sum((value - mean) ** 2 for value in exact) / num
        if not variance:
            raise Impossible
        terms.append({n: float(value - mean) / math.sqrt(variance) for n, value in zip(population, exact)})
    sums = {n: math.fsum(w * term[n] for w, term in zip(weights, terms)) for n in population}
    by_inputs: dict[tuple[float, ...], float] = {}
    for n in population:
        by_inputs[tuple(rows[n][name] + 0.0 for name in names)] = sums[n]
    ordered = sorted(by_inputs.values())
    if any(b - a < 1e-9 for a, b in itertools.pairwise(ordered)):
        raise NearTie
    return sums


def percentiles(rows: list[Row], population: list[int], name: str) -> dict[int, Fraction]:
    """By exact ranks in a full sort; the smaller pair_id of a tie ranks higher."""
    ordered = sorted(population, key=lambda n: (rows[n][name], -rows[n]["id"]))
    return {n: Fraction(100 * (2 * place + 1), 2 * len(ordered)) for place, n in enumerate(ordered)}


def hashed(pair_id: int, seed: int) -> float:
    mask = 2**64 - 1

    def mix(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    first, second = divmod(pair_id, 2**64)
    return (mix(mix(mix(seed) ^ second) ^ first) >> 11) * 2.0**-53


# -------------------------------------------------------------------------------------------------------- keeping

Scores = dict[str, dict[int, float]]


def score_of(rule: dict[str, Any], rows: list[Row], scores: Scores) -> Callable[[int], float]:
    if rule["kind"] == "dedupe":
        return score_of(rule["rule"], rows, scores)
    if rule["kind"] == "intersect" and "budget" not in rule:
        return score_of(rule["rules"][0], rows, scores)
    if "score" in rule:
        return lambda n: rows[n][rule["score"]] + 0.0
    return lambda n: scores[repr(rule)][n]


def is_reversed(rule: dict[str, Any]) -> bool:
    if rule["kind"] == "dedupe":
        return is_reversed(rule["rule"])
    if rule["kind"] == "intersect" and "budget" not in rule:
        return is_reversed(rule["rules"][0]) != rule.get("reverse", False)
    return rule.get("reverse", False)


def in_order(numbers: Iterable[int], rows: list[Row], score: Callable[[int], float], last: bool) -> list[int]:
    return sorted(numbers, key=lambda n: (score(n) if last else -score(n), rows[n]["id"]))


def how_many(rule: dict[str, Any], num: int) -> int:
    if "ratio" in rule:
        return math.floor(Fraction(str(rule["ratio"])) * num)
    if rule["count"] > num:
        raise Impossible
    return rule["count"]


def keep(rule: dict[str, Any], rows: list[Row], there: list[int], scores: Scores) -> set[int]:
    kind, reverse = rule["kind"], rule.get("reverse", False)
    if kind == "dedupe":
        left = deduped(rule, rows, there, scores)
        return keep(rule["rule"], rows, left, scores)
    if kind == "intersect" and "budget" not in rule:
        common = set(there).intersection(*(keep(one, rows, there, scores) for one in rule["rules"]))
        return set(there) - common if reverse else common
    score = score_of(rule, rows, scores)
    if kind == "intersect":
        kept = set(in_order(there, rows, score, False)[: how_many(rule["budget"], len(there))])
        return set(there) - kept if reverse else kept
    if kind == "above":
        return {n for n in there if (score(n) > rule["threshold"]) != reverse}
    if kind == "agree":
        told = {"keep": lambda value: value > 0, "flip": lambda value: value != 0}[rule.get("action", "keep")]
        return {n for n in there if told(score(n)) != reverse}
    if kind == "threshold":
        return {n for n in there if within(rule, rows[n], score(n)) != reverse}
    if kind == "band":
        low, high = (exact_percentile([score(n) for n in there], rule[end]) if there else 0 for end in ("low", "high"))
        return {n for n in there if (low < Fraction(score(n)) < high) != reverse}
    by = rule.get("by")
    if not by:
        return set(in_order(there, rows, score, reverse)[: how_many(rule, len(there))])
    return quota(rule, [by] if isinstance(by, str) else by, rows, there, score)


def within(rule: dict[str, Any], row: Row, value: float) -> bool:
    """From low to high, both themselves included; `by` names the stratum whose values they are."""
    by = rule.get("by", [])
    name = "/".join("null" if row[one] is None else row[one] for one in ([by] if isinstance(by, str) else by))
    for end, holds in (("low", value.__ge__), ("high", value.__le__)):
        limit = rule.get(end)
        if isinstance(limit, dict) and name not in limit:
            raise Impossible
        limit = limit[name] if isinstance(limit, dict) else limit
        if limit is not None and not holds(float(limit)):
            return False
    return True


def naive_flipped(rule: dict[str, Any], rows: list[Row]) -> list[int]:
    """Positions of the kept rows whose label is turned: those that all judges of the one flipping rule contradict."""
    turning = [one for one in flipping(rule)]
    return [n for n in naive_select(rule, rows) for one in turning if all(rows[n][name] < 0 for name in one["scores"])]


def flipping(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules inside that turn labels; a complement has none."""
    if rule.get("reverse", False):
        return []
    if rule.get("action") == "flip":
        return [rule]
    return [
        found for one in rule.get("rules", []) + ([rule["rule"]] if "rule" in rule else []) for found in flipping(one)
    ]


def exact_percentile(values: list[float], percent: float) -> Fraction:
    """numpy's `linear` definition, without rounding."""
    ordered = sorted(map(Fraction, values))
    place = (len(ordered) - 1) * Fraction(str(percent)) / 100
    before, after = ordered[math.floor(place)], ordered[math.ceil(place)]
    return before + (after - before) * (place - math.floor(place))


def deduped(rule: dict[str, Any], rows: list[Row], there: list[int], scores: Scores) -> list[int]:
    groups: dict[Any, list[int]] = {}
    for n in there:
        both = frozenset((rows[n]["chosen"], rows[n]["rejected"]))
        groups.setdefault(rows[n]["prompt"] if rule["by"] == "prompt" else (rows[n]["prompt"], both), []).append(n)
    score, last = score_of(rule, rows, scores), is_reversed(rule)
    return sorted(in_order(group, rows, score, last)[0] for group in groups.values())


def quota(
    rule: dict[str, Any], by: list[str], rows: list[Row], there: list[int], score: Callable[[int], float]
) -> set[int]:
    num_bins = rule.get("length_bins", 4)
    gaps = {n: abs(rows[n]["lengths"][0] - rows[n]["lengths"][1]) for n in there if rows[n]["lengths"]}
    edges = np.quantile(list(gaps.values()), [b / num_bins for b in range(1, num_bins)]) if gaps else []

    def value(n: int, name: str) -> Any:
        if name != "length_bin":
            return rows[n][name]
        return sum(edge <= gaps[n] for edge in edges) if n in gaps else None

    strata: dict[tuple[Any, ...], list[int]] = {}
    for n in there:
        strata.setdefault(tuple(value(n, name) for name in by), []).append(n)
    labels = sorted(strata, key=lambda label: [(one is not None, one if one is not None else 0) for one in label])
    total = how_many(rule, len(there))
    shares = [Fraction(total * len(strata[label]), len(there)) for label in labels]
    seats = [math.floor(share) for share in shares]
    for place in sorted(range(len(labels)), key=lambda p: seats[p] - shares[p])[: total - sum(seats)]:
        seats[place] += 1
    last = rule.get("reverse", False)
    return {n for label, seat in zip(labels, seats) for n in in_order(strata[label], rows, score, last)[:seat]}
