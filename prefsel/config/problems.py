"""What pydantic found wrong, in one line a person can act on: field, value, what is valid, the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_CHARACTERS = 120


def problem(details: Mapping[str, Any], field: str, valid: Iterable[str]) -> str:
    """One line for one error of a `ValidationError`.

    Args:
        details: one of its `errors()`.
        field: where it stands, as the user wrote it.
        valid: the keys there are, where an unknown one was given; the kinds, where a kind is wrong or missing.
    """
    if details["type"] == "extra_forbidden":
        keys = sorted(valid)
        return f"{field}: unknown key; {nearest(str(details['loc'][-1]), keys)}valid: {', '.join(keys)}"
    if details["type"] == "missing":
        return f"{field}: required, but missing"
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = re.findall(r"'([^']*)'", details["ctx"].get("expected_tags", "")) or list(valid)
        if "tag" not in details["ctx"]:
            return f"{field}.kind: required, but missing; valid: {', '.join(kinds)}"
        got = details["ctx"]["tag"]
        return f"{field}.kind: got {got!r}; {nearest(got, kinds)}valid: {', '.join(kinds)}"
    message = details["msg"].removeprefix("Value error, ")
    # A check of a whole record names the keys that it is about itself.
    if details["type"] == "value_error" and isinstance(details.get("input"), Mapping):
        return f"{field}: {message}".removeprefix(": ")
    shown = repr(details.get("input"))[:SHOWN_CHARACTERS]
    return f"{field}: got {shown}; {message[0].lower()}{message[1:]}".removeprefix(": ")


def nearest(got: str, valid: Iterable[str]) -> str:
    """A hint at the valid text most like another one; empty where none is."""
    near = difflib.get_close_matches(got, list(valid), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
