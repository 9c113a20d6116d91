"""The formats a row can have: a name, an adapter each, and which one a row looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from prefsel.config import FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.example import Completion, Example, Preference, RowError, field, prompt_of
from prefsel.ingest.pair_formats import (
    HH_TURN,
    adapt_messages_explicit,
    adapt_messages_implicit,
    adapt_prompt_chosen_rejected,
    adapt_transcript,
)
from prefsel.ingest.ranking_formats import adapt_ranked, adapt_scored, adapt_ultrafeedback
from prefsel.plugins.registry import Registry

__all__ = [
    "FORMATS",
    "Completion",
    "Example",
    "FormatOptions",
    "Preference",
    "RowError",
    "detect",
    "prompt_adapter",
]

Adapter: TypeAlias = Callable[[Mapping[str, Any], FormatOptions], Example]

FORMATS: Registry[Adapter] = Registry(
    "formats",
    {
        "prompt_chosen_rejected": adapt_prompt_chosen_rejected,
        "transcript": adapt_transcript,
        "messages_explicit": adapt_messages_explicit,
        "messages_implicit": adapt_messages_implicit,
        "ultrafeedback": adapt_ultrafeedback,
        "ranked": adapt_ranked,
        "scored": adapt_scored,
    },
)
"""Format name → adapter, those of plugins included, which `detect` never chooses.

An adapter returns an `Example` or raises `RowError`; it reads nothing but its arguments.
"""


def detect(value: Mapping[str, Any]) -> str:
    """The format a row looks like.

    Raises:
        UserError: none of them; lists the fields seen and the formats.
    """
    name = _pair_format(value) or _completions_format(value)
    if name is None:
        fields = ", ".join(f"{key} ({type(found).__name__})" for key, found in value.items()) or "none"
        raise UserError(f"format: cannot tell from the fields {fields}; name one of {', '.join(FORMATS)}")
    return name


def prompt_adapter(name: str | None) -> Adapter:
    """An adapter that keeps a row's prompt only: as format `name` (None: the row's own) finds it, else a prompt field.

    For sets of prompts to leave out of a corpus: such a row may have no completions, or useless ones.
    """

    def adapt(value: Mapping[str, Any], options: FormatOptions) -> Example:
        try:
            return Example(FORMATS[name or detect(value)](value, options).prompt, [], [])
        except (UserError, RowError):
            return Example(prompt_of(field(value, "prompt", "question", "instruction"), "prompt"), [], [])

    return adapt


def _pair_format(value: Mapping[str, Any]) -> str | None:
    prompt, chosen, rejected = (value.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "prompt_chosen_rejected"
        if isinstance(prompt, list):
            return "messages_explicit"
        return "transcript" if prompt is None and HH_TURN.search(chosen) else None
    if not isinstance(chosen, list | str) or not isinstance(rejected, list | str):
        return None
    # A prompt beside conversations that repeat it, as in ultrafeedback_binarized: the conversations say more.
    begins = [_first_role(chosen), _first_role(rejected)]
    if None not in begins and "assistant" not in begins:
        return "messages_implicit"
    return "messages_explicit" if isinstance(prompt, list | str) and begins == ["assistant"] * 2 else None


def _first_role(side: list[Any] | str) -> object:
    if isinstance(side, str):
        return "assistant"
    return side[0].get("role") if side and isinstance(side[0], dict) else None


def _completions_format(value: Mapping[str, Any]) -> str | None:
    completions = value.get("completions") or value.get("responses")
    if not isinstance(completions, list) or not completions:
        return None
    if isinstance(value.get("preference"), list):
        return "ranked"
    if isinstance(value.get("rewards"), list) or isinstance(value.get("scores"), list):
        return "scored"
    is_annotated = all(isinstance(one, dict) and ("response" in one or "annotations" in one) for one in completions)
    return "ultrafeedback" if is_annotated else None
