"""What pydantic found wrong, in one line a person can act on: field, value, what is valid, the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_CHARACTERS = 120


def problem(details: Mapping[str, Any], field: str, valid: Iterable[str]) -> str:
    """One line for one error of a `ValidationError`.

    Args:
        details: one of its `errors()`.
        field: where it stands, as the user wrote it.
        valid: the keys there are, where an unknown one was given.
    """
    if details["type"] == "extra_forbidden":
        keys = sorted(valid)
        near = difflib.get_close_matches(str(details["loc"][-1]), keys, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{field}: unknown key; {hint}valid: {', '.join(keys)}"
    if details["type"] == "missing":
        return f"{field}: required, but missing"
    message = details["msg"].removeprefix("Value error, ")
    # A check of a whole record names the values that do not go together itself.
    is_named = details["type"] == "value_error" and isinstance(details.get("input"), Mapping)
    shown = "" if is_named else f"got {repr(details.get('input'))[:SHOWN_CHARACTERS]}; "
    return f"{field}: {shown}{message[0].lower()}{message[1:]}".removeprefix(": ")
