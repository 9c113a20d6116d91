"""Adapters for rows that hold one labelled pair: chosen and rejected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.example import (
    Completion,
    Example,
    Format,
    Messages,
    Preference,
    RowError,
    completion_of,
    difference,
    field,
    messages_of,
    number,
    prompt_of,
    require_text,
    wrong_type,
)

HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""Where a turn of an HH transcript begins."""

_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_CHOSEN, _REJECTED = "_chosen", "_rejected"


def _adapt_prompt_chosen_rejected(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`prompt`, `chosen`, `rejected` as strings."""
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(field(value, name), str):
            raise wrong_type(name, value[name], "a string")
    return _adapt_messages_explicit(value, options)


def _adapt_messages_explicit(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`prompt` as messages, `chosen` and `rejected` as messages that follow it; each may also be a string."""
    prompt = prompt_of(field(value, "prompt"), "prompt")
    chosen = completion_of(field(value, "chosen"), "chosen")
    rejected = completion_of(field(value, "rejected"), "rejected")
    return _pair(value, prompt, chosen, rejected)


def _adapt_messages_implicit(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`chosen` and `rejected` as whole conversations; the messages they share from the start are the prompt."""
    chosen = messages_of(field(value, "chosen"), "chosen")
    rejected = messages_of(field(value, "rejected"), "rejected")
    return _shared_prompt(value, chosen, rejected)


def _adapt_transcript(value: Mapping[str, Any], options: FormatOptions) -> Example:
    r"""`chosen` and `rejected` as whole transcripts of `\n\nHuman:` and `\n\nAssistant:` turns (HH-RLHF).

    The turns they share from the start are the prompt. White space around a turn is not part of it; text before the
    first turn is a system message.
    """
    return _shared_prompt(value, _turns(value, "chosen"), _turns(value, "rejected"))


def _turns(value: Mapping[str, Any], name: str) -> Messages:
    text = field(value, name)
    if not isinstance(text, str):
        raise wrong_type(name, text, "a string")
    before, *parts = HH_TURN.split(text)
    if not parts:
        raise RowError("wrong_type", f"{name}: holds no 'Human:' or 'Assistant:' turn")
    system = [{"role": "system", "content": before.strip()}] if before.strip() else []
    turns = zip(parts[::2], parts[1::2], strict=True)
    return system + [{"role": _HH_ROLES[role], "content": content.strip()} for role, content in turns]


def _shared_prompt(value: Mapping[str, Any], chosen: Messages, rejected: Messages) -> Example:
    """Split two conversations after the messages they share, leaving each at least one."""
    limit = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    for name, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        require_text(rest, name)
        if rest[-1]["role"] != "assistant":
            raise RowError("wrong_type", f"{name}: ends with role {rest[-1]['role']!r}; valid: the assistant's")
        # Parting at a user's message means that two different questions were answered: no preference between answers.
        if rest[0]["role"] != "assistant":
            raise RowError("prompt_mismatch", f"chosen and rejected part at message {shared}, which is not an answer")
    if not prompt:
        raise RowError("prompt_mismatch", "chosen and rejected share no message before the answer")
    return _pair(value, prompt_of(prompt, "prompt"), chosen[shared:], rejected[shared:])


def _pair(value: Mapping[str, Any], prompt: Messages, chosen: Messages, rejected: Messages) -> Example:
    if chosen == rejected:
        raise RowError("identical_completions", "chosen and rejected are the same text")
    aspect = value.get("aspect")
    if aspect is not None and not isinstance(aspect, str):
        raise wrong_type("aspect", aspect, "a string")
    first, second = _ratings(value)
    margin = difference(first["score"], second["score"]) if "score" in first and "score" in second else None
    completions = [Completion(chosen, first), Completion(rejected, second)]
    return Example(prompt, completions, [Preference(0, 1, aspect or None, margin)])


def _ratings(value: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers in `<x>_chosen` and `<x>_rejected`, by `<x>`; a column that holds something else is not a rating.

    `score_chosen` and `score_rejected` must be numbers if they are there.
    """
    both: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for key, found in value.items():
        ending = _CHOSEN if key.endswith(_CHOSEN) else _REJECTED
        name = key.removesuffix(ending)
        if not name or name == key or found is None:
            continue
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if is_number or name == "score":
            both[ending == _REJECTED][name] = number(found, key)
    return both


# ------------------------------------------------------------------------------------------------ what rows look like


def _sides(value: Mapping[str, Any], kind: type) -> bool:
    return isinstance(value.get("chosen"), kind) and isinstance(value.get("rejected"), kind)


def _first_roles(value: Mapping[str, Any]) -> list[object] | None:
    """The role that each side begins with, a string being the assistant's; None where a side is no conversation."""
    sides = [value.get("chosen"), value.get("rejected")]
    if _sides(value, str) or not all(isinstance(side, list | str) for side in sides):
        return None
    return [_first_role(side) for side in sides]


def _first_role(side: Any) -> object:
    if isinstance(side, str):
        return "assistant"
    return side[0].get("role") if side and isinstance(side[0], dict) else None


def _is_explicit(value: Mapping[str, Any]) -> bool:
    prompt = value.get("prompt")
    if _sides(value, str):
        return isinstance(prompt, list)
    return isinstance(prompt, list | str) and _first_roles(value) == ["assistant"] * 2


def _is_implicit(value: Mapping[str, Any]) -> bool:
    # A prompt beside conversations that repeat it, as in ultrafeedback_binarized: the conversations say more.
    roles = _first_roles(value)
    return roles is not None and None not in roles and "assistant" not in roles


def _is_transcript(value: Mapping[str, Any]) -> bool:
    return _sides(value, str) and value.get("prompt") is None and HH_TURN.search(value["chosen"]) is not None


def _is_plain(value: Mapping[str, Any]) -> bool:
    return _sides(value, str) and isinstance(value.get("prompt"), str)


FORMATS = (
    Format("prompt_chosen_rejected", _adapt_prompt_chosen_rejected, _is_plain),
    Format("transcript", _adapt_transcript, _is_transcript),
    Format("messages_implicit", _adapt_messages_implicit, _is_implicit),
    Format("messages_explicit", _adapt_messages_explicit, _is_explicit),
)
"""In the order in which they are tried."""
