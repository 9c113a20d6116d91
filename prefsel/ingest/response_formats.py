"""Formats of rows that hold one response: the rows of a prompt, which stand one after the other, are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.example import Completion, Example, Format, Preference, completion_of, difference, field, mine
from prefsel.ingest.fields import is_empty, parsed_number
from prefsel.ingest.mapping import with_surroundings
from prefsel.ingest.messages import Messages, messages_of, prompt_transcript
from prefsel.ingest.ranking_formats import labels
from prefsel.ingest.row_error import RowError

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LABEL, LABELS = "label", ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations")


def _adapt_helpsteer2(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """nvidia/HelpSteer2: `prompt`, one `response`, and its attributes from 0 to 4."""
    ratings = {name: parsed_number(value.get(name)) for name in ATTRIBUTES}
    return _one(value, options, "response", {name: one for name, one in ratings.items() if one is not None})


def _pair_up_attributes(
    prompt: Messages, completions: Sequence[Completion], options: FormatOptions
) -> tuple[list[Preference], int]:
    """As ratings of several aspects label pairs everywhere: one attribute per prompt, a named one, or all."""
    kept, preferences, ties = list(completions), [], 0
    of_aspects = [{name: one.ratings[name] for name in ATTRIBUTES if name in one.ratings} for one in kept]
    for aspect, margin in labels(prompt, kept, of_aspects, options):
        found, equal = mine(len(kept), aspect, margin)
        preferences += found
        ties += equal
    return preferences, ties


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
    if "completion" in value:
        return _one(value, options, "completion", ratings)
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
    found = field(value, "prompt")
    turns = prompt_transcript(found) if isinstance(found, str) else None
    prompt = turns or messages_of(found, "prompt", role="user")
    prompt = with_surroundings(value, prompt, options, used=("prompt",))
    return Example(prompt, [Completion(completion_of(field(value, side), side), ratings)], [])


def _is_helpsteer2(value: Mapping[str, Any]) -> bool:
    return not is_empty(value.get("prompt")) and "response" in value and ATTRIBUTES[0] in value


def _is_unpaired(value: Mapping[str, Any]) -> bool:
    has_response = not is_empty(value.get("prompt")) and "completion" in value
    has_response |= any(isinstance(value.get(name), list) and len(value[name]) > 1 for name in CONVERSATIONS)
    return has_response and any(isinstance(value.get(name), bool | int | str) for name in LABELS)


FORMATS = (
    Format("helpsteer2", _adapt_helpsteer2, _is_helpsteer2, ("prompt", "response", "helpfulness"), _pair_up_attributes),
    Format("unpaired", _adapt_unpaired, _is_unpaired, ("prompt", "completion", "label"), _pair_up_labels),
)
"""In the order in which they are tried."""
