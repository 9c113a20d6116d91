"""What pydantic found wrong, in one line a person can act on: field, value, what is valid, the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_CHARACTERS = 120
NOT_A_TABLE = ("model_type", "model_attributes_type", "dict_type", "mapping_type")
NOT_A_LIST = ("list_type", "tuple_type")
"""What pydantic calls a value that is no table, or no list."""


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
        kinds = list(dict.fromkeys([*_quoted(details["ctx"].get("expected_tags", "")), *valid]))
        return wrong_kind(details["input"], field, kinds)
    if details["type"] in NOT_A_TABLE:
        return f"{field}: got {_shown(details['input'])}; valid: a table of keys"
    if details["type"] in NOT_A_LIST:
        return f"{field}: got {_shown(details['input'])}; valid: a list"
    if details["type"] == "literal_error" and details["loc"][-1] == "kind":
        return wrong_kind({"kind": details["input"]}, field.removesuffix(".kind"), _quoted(details["ctx"]["expected"]))
    message = details["msg"].removeprefix("Value error, ")
    # A check of a whole record names the keys that it is about itself.
    if details["type"] == "value_error" and isinstance(details.get("input"), Mapping):
        return f"{field}: {message}".removeprefix(": ")
    shown = _shown(details.get("input"))
    return f"{field}: got {shown}; {message[0].lower()}{message[1:]}".removeprefix(": ")


def wrong_kind(entry: Any, field: str, kinds: Iterable[str]) -> str:
    """One line for an entry whose `kind` is missing or none of `kinds`, or that is no table at all."""
    known = list(kinds)
    choices = ", ".join(known)
    if not isinstance(entry, Mapping):
        hint = f", for example {{kind: {entry}}}" if entry in known else ""
        return f"{field}: got {_shown(entry)}; valid: a table with a `kind`{hint}; kinds: {choices}"
    if "kind" not in entry:
        return f"{field}.kind: required, but missing; valid: {choices}"
    got = entry["kind"]
    return f"{field}.kind: got {_shown(got)}; {nearest(got, known) if isinstance(got, str) else ''}valid: {choices}"


def nearest(got: str, valid: Iterable[str]) -> str:
    """A hint at the valid text most like another one, or that it is a part of; empty where none is."""
    by_spelling = {text.lower(): text for text in valid}
    spelled = got.lower().replace("-", "_")
    near = difflib.get_close_matches(spelled, by_spelling, n=1)
    near = near or [text for text in by_spelling if len(spelled) > 2 and spelled in text]
    return f"did you mean {by_spelling[near[0]]!r}? " if near else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _shown(value: Any) -> str:
    return repr(value)[:SHOWN_CHARACTERS]
