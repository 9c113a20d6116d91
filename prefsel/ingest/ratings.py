"""Numbers that a row holds for its sides or responses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from prefsel.ingest.example import number
from prefsel.ingest.fields import parsed_number
from prefsel.ingest.row_error import wrong_type

SIDES = ("chosen", "rejected")
NO_RATING = frozenset({"id", "idx", "index", "model", "response", "answer", "text", "prompt", "date", "source"})
"""What is said of one side and is no rating, though it may be a number."""


def put(ratings: dict[str, float], name: str, found: object) -> None:
    """Add a number; a text that is none, such as "N/A", is absent.

    Raises:
        RowError: NaN or infinite, or neither number nor text.
    """
    if isinstance(found, float | int) and not isinstance(found, bool):
        ratings.setdefault(name, number(found, name))
    elif (parsed := parsed_number(found)) is not None:
        ratings.setdefault(name, parsed)
    elif not isinstance(found, str | None):
        raise wrong_type(name, found, "a number")


def pair_ratings(value: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers that a row holds for both sides, by `<x>`: `<x>_chosen`, `chosen-<x>`, `chosenX`, or an object `<x>`.

    Text that is a number is one; what is none, such as "N/A" or the name of a model, is no rating.

    Raises:
        RowError: A number is NaN or infinite.
    """
    both: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for key, found in value.items():
        if isinstance(found, Mapping) and found.keys() == set(SIDES):
            for ratings, word in zip(both, SIDES):
                if isinstance(found[word], int | float | Decimal) and not isinstance(found[word], bool):
                    put(ratings, key, found[word])
            continue
        named = rating_name(key)
        if (
            named is not None
            and named[1] not in NO_RATING
            and isinstance(found, str | int | float | Decimal)
            and not isinstance(found, bool)
        ):
            put(both[named[0]], named[1], found)
    return both


def rating_name(key: str) -> tuple[int, str] | None:
    """Side (0 chosen, 1 rejected) and name of a rating's field; None of every other field."""
    for side, pattern in enumerate(_OF_SIDE):
        if found := pattern.fullmatch(key):
            name = found["before"] or found["behind"] or found["camel"]
            return side, name[0].lower() + name[1:] if found["camel"] else name
    return None


_OF_SIDE = [
    re.compile(rf"{word}([_. -](?P<behind>.+)|(?P<camel>[A-Z].*))|(?P<before>.+)([_. -]{word}|{word.title()})")
    for word in SIDES
]
