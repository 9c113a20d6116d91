"""Formats of rows that hold one response: the rows of a prompt, which stand one after the other, are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.aspects import by_aspects
from prefsel.ingest.example import Completion, Example, Format, Preference, completion_of, difference, field, field_name
from prefsel.ingest.fields import is_empty, parsed_number
from prefsel.ingest.messages import Messages, messages_of, prompt_transcript
from prefsel.ingest.row_error import RowError
from prefsel.ingest.surroundings import with_surroundings

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ATTRIBUTE_MAX = 4.0
LABEL, LABELS = "label", ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations")


def _adapt_helpsteer2(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """nvidia/HelpSteer2: `prompt`, one `response`, and its attributes from 0 to 4."""
    found = {name: parsed_number(value.get(name)) for name in ATTRIBUTES}
    ratings = {name: one for name, one in found.items() if one is not None and 0 <= one <= ATTRIBUTE_MAX}
    num_off_scale = sum(one is not None for one in found.values()) - len(ratings)
    return replace(_one(value, options, "response", ratings), absent=num_off_scale)


def _pair_up_attributes(
    prompt: Messages, completions: Sequence[Completion], options: FormatOptions
) -> tuple[list[Preference], int]:
    """As ratings of several aspects label pairs everywhere: one attribute per prompt, a named one, or all."""
    return by_aspects(prompt, completions, ATTRIBUTES, options)


def _adapt_unpaired(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """One response and whether it is good, `label` or `kto_tag` (true or false, or 1 and 0), as KTO is trained on.

    The response is `completion` after `prompt`, or the last turn of `messages` or `conversations`.
    """
    found = field(value, *LABELS)
    label = float(found) if isinstance(found, bool) else parsed_number(found)
    if isinstance(found, str) and found.strip().lower() in ("true", "false"):
        label = float(found.strip().lower() == "true")
    if label not in (0.0, 1.0):
        raise RowError("wrong_type", f"{LABEL}: got {found!r}; valid: true, false, 1, 0")
    ratings = {LABEL: label}
    if (side := _response_field(value)) is not None:
        return _one(value, options, side, ratings)
    name = next(one for one in CONVERSATIONS if one in value)
    conversation = messages_of(value[name], name, role="user")
    completion = completion_of(conversation[-1:], f"{name}[-1]")
    prompt = with_surroundings(value, conversation[:-1], options, used=(name,))
    return Example(prompt, [Completion(completion, ratings)], [])


def _pair_up_labels(
    prompt: Messages, completions: Sequence[Completion], options: FormatOptions
) -> tuple[list[Preference], int]:
    """Every good response over every bad one, or with `pairs: best_worst` the first of each."""
    good, bad = ([k for k, one in enumerate(completions) if one.ratings.get(LABEL) == label] for label in (1.0, 0.0))
    if options.pairs == "best_worst":
        good, bad = good[:1], bad[:1]
    return [Preference(first, second, None, difference(1.0, 0.0)) for first in good for second in bad], 0


def _one(value: Mapping[str, Any], options: FormatOptions, side: str, ratings: dict[str, float]) -> Example:
    name = field_name(value, "prompt", "instruction")
    turns = prompt_transcript(value[name]) if isinstance(value[name], str) else None
    prompt = turns or messages_of(value[name], name, role="user")
    prompt = with_surroundings(value, prompt, options, used=(name,))
    return Example(prompt, [Completion(completion_of(field(value, side), side), ratings)], [])


def _response_field(value: Mapping[str, Any]) -> str | None:
    return next((name for name in ("completion", "response", "output") if name in value), None)


def _is_helpsteer2(value: Mapping[str, Any]) -> bool:
    return not is_empty(value.get("prompt")) and "response" in value and ATTRIBUTES[0] in value


def _is_unpaired(value: Mapping[str, Any]) -> bool:
    has_prompt = any(not is_empty(value.get(name)) for name in ("prompt", "instruction"))
    has_response = has_prompt and _response_field(value) is not None
    has_response |= any(isinstance(value.get(name), list) and len(value[name]) > 1 for name in CONVERSATIONS)
    return has_response and any(isinstance(value.get(name), bool | int | str) for name in LABELS)


FORMATS = (
    Format("helpsteer2", _adapt_helpsteer2, _is_helpsteer2, ("prompt", "response", "helpfulness"), _pair_up_attributes),
    Format("unpaired", _adapt_unpaired, _is_unpaired, ("prompt", "completion", "label"), _pair_up_labels),
)
"""In the order in which they are tried."""
