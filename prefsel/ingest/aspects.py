"""Ratings of several aspects → which of them labels the pairs of a prompt, and those pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from prefsel.config import FormatOptions
from prefsel.ingest.example import Completion, Margin, Preference, difference, mine
from prefsel.ingest.identity import prompt_id
from prefsel.ingest.messages import Messages

OVERALL = "overall"


def by_aspects(
    prompt: Messages, kept: Sequence[Completion], names: Iterable[str], options: FormatOptions
) -> tuple[list[Preference], int]:
    """The preferences among a prompt's completions by their ratings, and how many comparisons are ties.

    Args:
        prompt: Whose hash says which aspect labels, where one is to be assigned.
        kept: Its completions.
        names: Which of their ratings are aspects.
        options: Of the source.
    """
    aspects = set(names)
    of_aspects = [{name: one.ratings[name] for name in one.ratings if name in aspects} for one in kept]
    preferences: list[Preference] = []
    ties = 0
    for aspect, margin in labels(prompt, list(kept), of_aspects, options):
        found, equal = mine(len(kept), aspect, margin)
        preferences += found
        ties += equal
    return preferences, ties


def labels(
    prompt: Messages, kept: list[Completion], of_aspects: list[dict[str, float]], options: FormatOptions
) -> list[tuple[str | None, Margin]]:
    """The aspects that label the pairs of a prompt, each with its margin; a holistic label has no aspect.

    Args:
        prompt: Whose hash says which aspect labels, where one is to be assigned.
        kept: Its completions.
        of_aspects: Their ratings, those of aspects alone.
        options: Of the source.
    """
    if options.label != "aspect":
        whole = _mean_margin(of_aspects)
        if options.label == "overall":
            whole = margin_of([row.ratings for row in kept], OVERALL)
        if not options.relabel:
            return [(None, whole)]
        own = labels(prompt, kept, of_aspects, options.model_copy(update={"label": "aspect"}))
        return [(None, _turned(whole, [margin for _, margin in own]))]
    names = sorted({name for ratings in of_aspects for name in ratings})
    names = [name for name in names if sum(name in ratings for ratings in of_aspects) >= 2]
    if options.aspect is not None:
        return [(name, margin_of(of_aspects, name)) for name in names if name == options.aspect]
    if options.aspects == "assign" and names:
        hashed = blake2b(b"aspect" + prompt_id(prompt), digest_size=8).digest()
        names = [names[int.from_bytes(hashed, "big") % len(names)]]
    return [(name, margin_of(of_aspects, name)) for name in names]


def _turned(whole: Margin, own: Sequence[Margin]) -> Margin:
    """`whole` for the pairs that some other margin decides; None for the others."""

    def margin(first: int, second: int) -> float | None:
        return whole(first, second) if any(one(first, second) for one in own) else None

    return margin


def margin_of(ratings: list[dict[str, float]], name: str) -> Margin:
    """The difference of two completions in one rating."""

    def margin(first: int, second: int) -> float | None:
        if name not in ratings[first] or name not in ratings[second]:
            return None
        return difference(ratings[first][name], ratings[second][name])

    return margin


def _mean_margin(of_aspects: list[dict[str, float]]) -> Margin:
    """The mean difference over the aspects both completions are rated on, so that "N/A" on one side biases nothing."""

    def margin(first: int, second: int) -> float | None:
        common = sorted(of_aspects[first].keys() & of_aspects[second].keys())
        if not common:
            return None
        terms = [difference(of_aspects[first][name], of_aspects[second][name]) for name in common]
        return math.fsum(terms) / len(terms)

    return margin
