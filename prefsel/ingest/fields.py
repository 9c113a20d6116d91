"""Fields of a row by dotted path, and the numbers in them.

a.b          the field b of the object a
a[].b        the field b of every element of the list a: a list
a[0].b       that of its first element
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from prefsel.ingest.row_error import missing

_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d*)\]")


NOTHING = frozenset({"", "[]", "{}", "null", "None", "nan", "NaN", "<NA>"})
"""Texts that tables write for nothing."""


def lookup(value: Any, path: str) -> Any:
    """What lies at a path; None where a part of it is absent or null, or is of another kind.

    A field whose own name holds dots or brackets is found by that name.
    """
    if isinstance(value, Mapping) and path in value:
        return value[path]
    return _walk(value, _steps(path))


def required(value: Mapping[str, Any], path: str) -> Any:
    """What lies at a path.

    Raises:
        RowError: Nothing does.
    """
    found = lookup(value, path)
    if found is None:
        raise missing(value, path)
    return found


def top_field(path: str) -> str:
    """The field of the row that a path begins with."""
    return str(_steps(path)[0])


@lru_cache(maxsize=4096)
def _steps(path: str) -> tuple[str | int | None, ...]:
    """Names, positions, and None for every element."""
    found: list[str | int | None] = []
    for name, position in _STEP.findall(path):
        found.append(name or (int(position) if position else None))
    return tuple(found)


def _walk(value: Any, steps: tuple[str | int | None, ...]) -> Any:
    for place, step in enumerate(steps):
        if step is None:
            return [_walk(one, steps[place + 1 :]) for one in value] if isinstance(value, list) else None
        if isinstance(step, int):
            is_there = isinstance(value, list) and -len(value) <= step < len(value)
            value = value[step] if is_there else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, no text or what tables write for none, or a list or object of nothing."""
    if isinstance(value, str):
        return value.strip() in NOTHING
    if isinstance(value, bytes):
        return not value
    if isinstance(value, list):
        return all(is_empty(one) for one in value)
    if isinstance(value, Mapping):
        return all(is_empty(one) for one in value.values())
    return value is None


def parsed_number(value: Any) -> float | None:
    """A number, also one written as text; None for what is no finite number, such as "N/A". −0.0 becomes 0.0."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        found = float(value) + 0.0
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
