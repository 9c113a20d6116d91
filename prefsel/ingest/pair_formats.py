"""Formats of rows that hold one labelled pair: chosen and rejected, under whatever names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.config import FieldMap, FormatOptions
from prefsel.ingest.example import Example, Format
from prefsel.ingest.fields import is_empty
from prefsel.ingest.mapping import mapped, pair
from prefsel.ingest.messages import TRANSCRIPT_TURN, held_messages, transcript_of
from prefsel.ingest.row_error import RowError, wrong_type
from prefsel.ingest.surroundings import PROMPTS

_SIDES = ("chosen", "rejected")
_LABELLED = FieldMap(prompt="prompt", chosen="chosen", rejected="rejected")


def _adapt_transcript(value: Mapping[str, Any], options: FormatOptions) -> Example:
    r"""`chosen` and `rejected` as whole transcripts of `\n\nHuman:` and `\n\nAssistant:` turns (HH-RLHF).

    The turns they share from the start are the prompt. White space around a turn is not part of it; text before the
    first turn is a system message.
    """
    turns = []
    for name in _SIDES:
        if value.get(name) is None:
            raise RowError("missing_field", f"{name}: absent or null")
        if not isinstance(value[name], str):
            raise wrong_type(name, value[name], "a string")
        turns.append(transcript_of(value[name], name))
    return pair(value, FieldMap(chosen="chosen", rejected="rejected"), (turns[0], turns[1]), options)


# ------------------------------------------------------------------------------------------------ what rows look like


def _sides(value: Mapping[str, Any]) -> list[Any]:
    return [value.get(name) for name in _SIDES]


def _are_texts(value: Mapping[str, Any]) -> bool:
    """Whether both sides are answers as text, and no message lists kept as their JSON."""
    sides = _sides(value)
    return all(isinstance(one, str) for one in sides) and any(held_messages(one) is None for one in sides)


def _are_conversations(value: Mapping[str, Any]) -> bool:
    """Whether both sides are messages, in any shape, or one is and the other a text."""
    sides = _sides(value)
    is_shaped = all(isinstance(one, str | list | Mapping) for one in sides) and not _are_texts(value)
    return is_shaped and all(_may_be_messages(one) for one in sides)


def _may_be_messages(side: Any) -> bool:
    if not isinstance(side, list):
        return True
    return bool(side) and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in side)


def _repeat_prompt(value: Mapping[str, Any]) -> bool:
    sides = _sides(value)
    if not _are_conversations(value) or not all(isinstance(one, list | str) for one in sides):
        return False
    has_prompt = any(not is_empty(value.get(name)) for name in PROMPTS)
    return not any(map(_opens, sides)) or (not has_prompt and _share_opening(sides))


def _share_opening(sides: Sequence[Any]) -> bool:
    """Whether both sides are conversations that begin with the same message of the assistant."""
    first, second = (held_messages(one) if isinstance(one, str) else one for one in sides)
    return bool(first and second and first[1:] and second[1:] and first[0] == second[0])


def _opens(side: Any) -> bool:
    """Whether a side begins with the assistant's answer."""
    messages = held_messages(side) if isinstance(side, str) else side
    if messages is None:
        return True
    role = messages[0].get("role", messages[0].get("from"))
    return isinstance(role, str) and role.lower() in ("assistant", "gpt", "bot", "model")


def _with(prompt: str) -> Any:
    def matches(value: Mapping[str, Any]) -> bool:
        return not is_empty(value.get(prompt)) and (_are_texts(value) or _are_conversations(value))

    return matches


def _is_plain(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("prompt"), str) and not is_empty(value["prompt"]) and _are_texts(value)


def _is_transcript(value: Mapping[str, Any]) -> bool:
    has_prompt = any(not is_empty(value.get(name)) for name in PROMPTS)
    return not has_prompt and _are_texts(value) and TRANSCRIPT_TURN.search(value["chosen"]) is not None


def _has_two_outputs(value: Mapping[str, Any]) -> bool:
    outputs = value.get("output")
    are_two = isinstance(outputs, list) and len(outputs) == 2 and all(isinstance(one, str) for one in outputs)
    return are_two and not is_empty(value.get("instruction"))


def _is_openai(value: Mapping[str, Any]) -> bool:
    return {"input", "preferred_output", "non_preferred_output"} <= value.keys()


_OPENAI = FieldMap(
    prompt="input.messages", tools="input.tools", chosen="preferred_output", rejected="non_preferred_output"
)
FORMATS = (
    mapped("prompt_chosen_rejected", _LABELLED, _is_plain),
    Format("transcript", _adapt_transcript, _is_transcript, ("chosen", "rejected")),
    mapped("messages_implicit", _LABELLED, _repeat_prompt, ("chosen", "rejected")),
    mapped("messages_explicit", _LABELLED, _with("prompt")),
    mapped("ultrainteract", _LABELLED.model_copy(update={"prompt": "trajectory"}), _with("trajectory")),
    mapped("orca", _LABELLED.model_copy(update={"prompt": "question"}), _with("question")),
    mapped("sharegpt", _LABELLED.model_copy(update={"prompt": "conversations"}), _with("conversations")),
    mapped("conversation", _LABELLED.model_copy(update={"prompt": "conversation"}), _with("conversation")),
    mapped("axolotl", _LABELLED.model_copy(update={"prompt": "messages"}), _with("messages")),
    mapped("alpaca", _LABELLED.model_copy(update={"prompt": "instruction"}), _with("instruction")),
    mapped(
        "alpaca_outputs", FieldMap(prompt="instruction", chosen="output[0]", rejected="output[1]"), _has_two_outputs
    ),
    mapped("distilabel", _LABELLED.model_copy(update={"prompt": "input"}), _with("input")),
    mapped("openai", _OPENAI, _is_openai),
    mapped(
        "argilla",
        FieldMap(prompt="instruction", chosen="chosen_response", rejected="rejected_response"),
        needs=("instruction", "chosen_response", "rejected_response"),
    ),
    mapped("stack_exchange", FieldMap(prompt="question", chosen="response_j", rejected="response_k")),
)
"""In the order in which they are tried."""
