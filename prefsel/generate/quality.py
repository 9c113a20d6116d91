"""Why a sampled response is of no use, by its text alone: no model, no second opinion.

Shapes: none; a unit is a word, a mark, or a character of a script that puts no spaces between words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

RUN = 4
"""Units of a run that counts as repeated when it came before."""
FEWEST_UNITS = 32
"""A shorter text may say the same four words twice, and a loop shorter than that is a refrain."""
LONGEST_PERIOD = 64
"""Units of what a text repeats at its end."""
FEWEST_TURNS = 4
"""Times that it must say it."""

LONGEST_RULE = 120
"""Marks of a drawn line, such as the frame of a table; a longer run is a model that says nothing else."""

# Thai to Tibetan, Burmese, Khmer, kana, Chinese characters.
_SPACELESS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+|[^\w\s]")
_RULE = re.compile(r"([-=*#.~+─━═—·])\1{3,}")


class Said(Protocol):
    """What is judged: a `Response`, or anything with its text and how it stopped."""

    @property
    def text(self) -> str:
        """Without outer white space."""

    @property
    def stop(self) -> str:
        """`end`, `length` or `poisoned`."""


def why_unused(
    responses: Sequence[Said],
    *,
    drop_cut: bool = False,
    max_repetition: float | None = 0.5,
) -> list[str | None]:
    """Why each response to one prompt is of no use; None: it is.

    The first reason that holds counts: `poisoned`, `empty`, `cut_off`, `repetitive`, `duplicate_response`.

    Args:
        responses: All samples of the prompt, in their order.
        drop_cut: Whether responses that were cut at the limit are of no use.
        max_repetition: Most share of repeated runs of four units, see `repetition`; it also bars texts that end in a
            loop. None: any may repeat itself.
    """
    reasons: list[str | None] = []
    kept: set[str] = set()
    for one in responses:
        reason = _why_alone(one, drop_cut, max_repetition) or ("duplicate_response" if one.text in kept else None)
        reasons.append(reason)
        if not reason:
            kept.add(one.text)
    return reasons


def _why_alone(one: Said, drop_cut: bool, max_repetition: float | None) -> str | None:
    if one.stop == "poisoned":
        return "poisoned"
    if not one.text.strip():
        return "empty"
    if drop_cut and one.stop == "length":
        return "cut_off"
    if max_repetition is not None:
        units = units_of(one.text)
        if repetition(units) > max_repetition or ends_in_loop(units):
            return "repetitive"
    return None


def units_of(text: str) -> list[str]:
    """The units of a text, in lower case; a drawn line is one unit, however long it is."""
    drawn = _RULE.sub(lambda found: found[0] if len(found[0]) > LONGEST_RULE else found[1], text)
    return _UNIT.findall(drawn.lower())


def repetition(units: Sequence[str]) -> float:
    """Share of runs of four units that came before in the text; 0 for a text of fewer than 32 units."""
    if len(units) < FEWEST_UNITS:
        return 0.0
    runs = list(zip(*(units[start:] for start in range(RUN))))
    return 1.0 - len(set(runs)) / len(runs)


def ends_in_loop(units: Sequence[str]) -> bool:
    """Whether the text ends in the same 1 to 64 units again and again: four times at least, and 32 units at least.

    So a long answer is found that ends in a loop, though most of it is not repeated.
    """
    for period in range(1, min(LONGEST_PERIOD, len(units) // FEWEST_TURNS) + 1):
        needed = max(FEWEST_TURNS * period, FEWEST_UNITS)
        if needed <= len(units) and list(units[-needed + period :]) == list(units[-needed:-period]):
            return True
    return False
