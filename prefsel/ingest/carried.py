"""Fields of a row that go along with its pairs, as text: who labelled it, its task, its language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from prefsel.ingest.fields import is_empty, lookup
from prefsel.ingest.row_error import wrong_type


def carried_fields(value: Mapping[str, Any], paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What a row says at each path, as (path, text); nothing for a field that is absent, null or empty.

    Numbers and truth values are written as JSON writes them, and a whole number without a fraction however its file
    holds it: 3 and 3.0 are one stratum.

    Raises:
        RowError: A field holds a list or an object.
    """
    found = ((path, lookup(value, path)) for path in paths)
    return tuple((path, _text(path, one)) for path, one in found if not _is_nothing(one))


def _is_nothing(value: Any) -> bool:
    return is_empty(value) or (isinstance(value, float) and math.isnan(value))


def _text(path: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal):
        is_whole = isinstance(value, int) or (math.isfinite(value) and value == int(value))
        return str(int(value) if is_whole else value)
    raise wrong_type(path, value, "text, a number or a truth value, to be carried")
