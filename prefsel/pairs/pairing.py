"""Groups with judged completions → pairs: which two completions of a prompt are chosen and rejected.

    group ─ rule ─► candidates, two completions each, in an order ─► the first one, the first few, or all of them

Candidates and their order follow from ids, texts and numbers alone, so neither the order of completions nor the
sharding changes a pair.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import permutations
from typing import Any, NamedTuple

import pyarrow as pa

from prefsel.config.pairing import AboveMargin, BestRandom, BestWorst, ByGenerator, Confidence, Pairing
from prefsel.errors import NonFiniteError, invalid
from prefsel.ingest.identity import pair_id
from prefsel.pairs.judged import JudgedGroup, Numbers, judged_groups
from prefsel.schema import PAIRS

REASONS = ("too_few_responses", "unjudged", "one_generator", "tied", "within_bounds", "length_gap")
"""Why a prompt gives no pair; the first that applies is counted."""


class Candidate(NamedTuple):
    """Two completions that may become a pair, by their positions, and the keys that put candidates in order."""

    order: tuple[Any, ...]
    pair_id: bytes
    mirror_id: bytes
    prompt_id: bytes
    chosen: int
    rejected: int
    margin: float | None


Found = tuple[list[Candidate] | str, int | None]
"""Candidates, or why there are none; and how many of them become pairs, None: all."""


def make_pairs(
    groups: pa.Table,
    columns: Mapping[str, Numbers],
    rule: Pairing,
    *,
    generators: Sequence[Sequence[str | None]] | None = None,
    lengths: Numbers | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """The pairs that a rule makes of the completions of each prompt.

    Args:
        groups: Schema `GROUPS`, with or without `rest`; each completion once per group.
        columns: The judges' numbers by the name of their column, aligned with the groups and their completions; larger
            is better, None where there is no number. One for `best_worst`, `best_random` and `above_margin`, at least
            two for `confidence`, none for `by_generator`.
        rule: Which completions become pairs.
        generators: For `by_generator`: who wrote each completion, aligned likewise.
        lengths: For `by_generator` with a limit: the tokens of each completion, aligned likewise.

    Returns:
        The pairs, schema `PAIRS`: in the order of the groups, within one by the rule's order. `label_margin` is the
        difference of the judge's numbers (of their means over several judges), null without a judge; `provenance` is
        that of the group. And how many prompts gave no pair, by reason, each counted once: with the prompts that gave
        a pair or more they make up all groups.

    Raises:
        UserError: Columns, generators or lengths that the rule does not take, lacks, or that do not align.
        NonFiniteError: A number is NaN or infinite, or a margin overflows.
        IntegrityError: A completion stands twice in its group.
    """
    _check_inputs(columns, rule, generators, lengths)
    dropped: Counter[str] = Counter()
    rows: list[int] = []
    pairs: list[Candidate] = []
    for row, group in enumerate(judged_groups(groups, columns, generators, lengths)):
        found, most = _candidates(group, rule)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        _check_margins(found)
        kept = sorted(found, key=lambda one: (*one.order, one.pair_id))[:most]
        rows += [row] * len(kept)
        pairs += kept
    return _table(groups, rows, pairs), dict(dropped)


def _candidates(group: JudgedGroup, rule: Pairing) -> Found:
    if isinstance(rule, ByGenerator):
        return _by_generator(group, rule)
    if len(group.ids) < (rule.num_expected or 2):
        return "too_few_responses", None
    if len(group.values) < 2 or (rule.require_all and len(group.values) < len(group.ids)):
        return "unjudged", None
    return _JUDGED[type(rule)](group, rule)


def _best_worst(group: JudgedGroup, rule: BestWorst) -> Found:
    value = _first(group)
    ordered = list(_ordered(group, value))
    ends = min(((-value[a], value[b]) for a, b in ordered), default=None)
    found = [_pair(group, a, b, value[a] - value[b]) for a, b in ordered if (-value[a], value[b]) == ends]
    return found or "tied", 1


def _best_random(group: JudgedGroup, rule: BestRandom) -> Found:
    """Among equally good responses the chosen one is drawn too: the draw is over the two together."""
    value = _first(group)
    ordered = list(_ordered(group, value))
    best = max((value[a] for a, _ in ordered), default=None)
    found = [_pair(group, a, b, value[a] - value[b], seed=rule.seed) for a, b in ordered if value[a] == best]
    return found or "tied", 1


def _above_margin(group: JudgedGroup, rule: AboveMargin) -> Found:
    value = _first(group)
    ordered = [(a, b, value[a] - value[b]) for a, b in _ordered(group, value)]
    if not ordered:
        return "tied", None
    found = [_pair(group, a, b, margin, -margin) for a, b, margin in ordered if margin > rule.margin]
    return found or "within_bounds", rule.max_pairs


def _confidence(group: JudgedGroup, rule: Confidence) -> Found:
    # `statistics` sums exactly and rounds once: neither the order of the judges nor 2 − 1 against 1 + 0 makes a margin.
    mean = {place: statistics.mean(values) for place, values in group.values.items()}
    reach = {place: rule.width * statistics.pstdev(values) for place, values in group.values.items()}
    lower = {place: mean[place] - reach[place] for place in mean}
    upper = {place: mean[place] + reach[place] for place in mean}
    ordered = list(_ordered(group, mean))
    if not ordered:
        return "tied", None
    clear = [(a, b) for a, b in ordered if lower[a] > upper[b]]
    found = [_pair(group, a, b, mean[a] - mean[b], upper[b] - lower[a]) for a, b in clear]
    return found or "within_bounds", rule.max_pairs if rule.all else 1


def _by_generator(group: JudgedGroup, rule: ByGenerator) -> Found:
    if len(group.ids) < 2:
        return "too_few_responses", None
    wrote = {
        name: [place for place, one in enumerate(group.generators) if one == name] for name in (rule.strong, rule.weak)
    }
    if not all(wrote.values()):
        return "one_generator", None
    differing = [(a, b) for a in wrote[rule.strong] for b in wrote[rule.weak] if group.texts[a] != group.texts[b]]
    if not differing:
        return "tied", None
    limit = rule.max_length_difference
    near = [(a, b) for a, b in differing if limit is None or _is_near(group.lengths[a], group.lengths[b], limit)]
    found = [_pair(group, a, b, None, seed=rule.seed) for a, b in near]
    return found or "length_gap", None if rule.all else 1


_JUDGED: dict[type, Callable[[JudgedGroup, Any], Found]] = {
    BestWorst: _best_worst,
    BestRandom: _best_random,
    AboveMargin: _above_margin,
    Confidence: _confidence,
}


def _first(group: JudgedGroup) -> dict[int, float]:
    """The numbers of the only judge."""
    return {place: values[0] for place, values in group.values.items()}


def _ordered(group: JudgedGroup, value: Mapping[int, float]) -> Iterator[tuple[int, int]]:
    """Every two completions of different text, the strictly better one first."""
    return ((a, b) for a, b in permutations(value, 2) if value[a] > value[b] and group.texts[a] != group.texts[b])


def _pair(
    group: JudgedGroup, chosen: int, rejected: int, margin: float | None, *order: float, seed: int | None = None
) -> Candidate:
    """A candidate; with a seed its place follows from that and its pair_id, so that the first of several is drawn."""
    prompt, ids = group.prompt_id, group.ids
    found = pair_id(prompt, ids[chosen], ids[rejected], None)
    place = () if seed is None else (blake2b(f"pairing {seed} ".encode() + found, digest_size=8).digest(),)
    mirror = pair_id(prompt, ids[rejected], ids[chosen], None)
    return Candidate((*order, *place), found, mirror, prompt, chosen, rejected, margin)


def _is_near(one: float | None, other: float | None, limit: int) -> bool:
    return one is not None and other is not None and abs(one - other) <= limit


def _check_inputs(columns: Mapping[str, Any], rule: Pairing, generators: object, lengths: object) -> None:
    named = ", ".join(columns) or None
    if not isinstance(rule, ByGenerator):
        if isinstance(rule, Confidence) and len(columns) < 2:
            raise invalid("columns", named, "two judges or more, whose agreement makes the bounds of confidence")
        if not isinstance(rule, Confidence) and len(columns) != 1:
            raise invalid("columns", named, f"one judge, which {rule.kind} goes by")
        return
    if columns:
        raise invalid("columns", named, "none, as by_generator has no judge")
    if generators is None:
        raise invalid("generators", None, "who wrote each completion, which by_generator goes by")
    if lengths is None and rule.max_length_difference is not None:
        raise invalid("lengths", None, "the tokens of each completion, or max_length_difference null")


def _check_margins(found: list[Candidate]) -> None:
    for one in found:
        if one.margin is not None and not math.isfinite(one.margin):
            prompt = one.prompt_id.hex()
            raise NonFiniteError(f"label_margin: overflows for prompt_id {prompt}; scale the judge's numbers")


def _table(groups: pa.Table, rows: list[int], pairs: list[Candidate]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "pair_id": [one.pair_id for one in pairs],
        "mirror_id": [one.mirror_id for one in pairs],
        "prompt_id": [one.prompt_id for one in pairs],
        "chosen": [one.chosen for one in pairs],
        "rejected": [one.rejected for one in pairs],
        "aspect": [None] * len(pairs),
        "label_margin": [one.margin for one in pairs],
    }
    arrays = [pa.array(values, PAIRS.field(name).type) for name, values in columns.items()]
    provenance = groups["provenance"].combine_chunks().take(pa.array(rows, pa.int64()))
    return pa.Table.from_arrays([*arrays, provenance], schema=PAIRS)
