"""What a row calls its prompt, and where its conversations part: everything before that is the prompt, too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prefsel.config import FieldMap
from prefsel.ingest.fields import is_empty, lookup
from prefsel.ingest.messages import Messages, messages_of, prompt_transcript, require_text
from prefsel.ingest.row_error import RowError, missing


def own_prompt(value: Mapping[str, Any], fields: FieldMap, many: Iterable[Messages]) -> Messages:
    """What the row calls its prompt; nothing where it names none, and whole conversations say it.

    Raises:
        RowError: It is absent or empty, and the sides are answers alone.
    """
    found = None if fields.prompt is None else lookup(value, fields.prompt)
    if is_empty(found):
        if fields.prompt is not None and all(len(one) == 1 for one in many):
            empty = RowError("empty_prompt", f"{fields.prompt}: no text")
            raise missing(value, fields.prompt) if found is None else empty
        return []
    if isinstance(found, str) and _TEMPLATED.fullmatch(found):
        raise RowError("wrong_type", f"{fields.prompt}: a chat template was applied to it already; give the messages")
    turns = prompt_transcript(found) if isinstance(found, str) else None
    return turns or messages_of(found, fields.prompt or "", role="user")


_TEMPLATED = re.compile(
    r"""\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*
    (<\|im_start\|>.*<\|im_start\|>assistant
    |<\|start_header_id\|>.*<\|start_header_id\|>assistant<\|end_header_id\|>
    |<start_of_turn>.*<start_of_turn>model
    |<\|user\|>.*<\|assistant\|>
    |(<<SYS>>.*<</SYS>>)?\s*\[INST\].*\[/INST\])\s*""",
    re.DOTALL | re.VERBOSE,
)
"""A whole prompt as a template writes it, waiting for the answer; text that only mentions such a mark is none."""


def split(prompt: Messages, many: Iterable[Messages], names: Iterable[str]) -> tuple[Messages, list[Messages]]:
    """Prompt and completions: what all conversations share from the start belongs to the prompt, whoever opens them.

    Args:
        prompt: What the row calls its prompt; may be empty.
        many: Completions, or conversations that repeat the prompt and perhaps more before it.
        names: What errors call them.

    Raises:
        RowError: They share no prompt, or part at a message that is no answer.
    """
    many = list(many)
    repeats = [bool(prompt) and same(one[: len(prompt)], prompt) for one in many]
    rest = [one[len(prompt) :] if is_repeated else one for one, is_repeated in zip(many, repeats)]
    limit = min(len(one) for one in rest) - 1
    shared = 0
    while shared < limit and all(one[shared] == rest[0][shared] for one in rest):
        shared += 1
    before = rest[0][:shared]
    if before and prompt and (all(repeats) or not _holds(before, prompt)):
        if before[0]["role"] != "assistant" and not all(repeats):
            raise RowError("prompt_mismatch", "prompt: it does not stand in the conversations, which have another one")
        before = [*prompt, *before]
    for name, one in zip(names, rest):
        require_text(one[shared:], name)
        if one[-1]["role"] != "assistant":
            raise RowError("wrong_type", f"{name}: ends with role {one[-1]['role']!r}; valid: the assistant's")
        # Parting at a user's message means that two different questions were answered: no preference between answers.
        if one[shared]["role"] != "assistant":
            raise RowError("prompt_mismatch", f"{name}: parts from the others at message {shared}, which is no answer")
    if not before and prompt and prompt[-1]["role"] == "assistant":
        if not any(same(one[:1], prompt[-1:]) for one in rest):
            raise RowError("prompt_mismatch", "prompt: ends with the assistant's turn, and answers follow it")
        prompt = prompt[:-1]  # the whole conversation with one of the answers
    if not (before or prompt):
        raise RowError("prompt_mismatch", "the conversations share no message before the answer")
    if all(one["role"] == "system" for one in before or prompt):
        raise RowError("empty_prompt", "the conversations share no message but the system's before the answer")
    return before or prompt, [one[shared:] for one in rest]


def same(some: Messages, others: Messages) -> bool:
    """Whether two message lists say the same; white space around a text does not matter."""
    return len(some) == len(others) and all(_text(one) == _text(other) for one, other in zip(some, others))


def _text(message: Mapping[str, Any]) -> tuple[str, str]:
    return message["role"], (message["content"] or "").strip()


def _holds(conversation: Messages, prompt: Messages) -> bool:
    """Whether all messages of a prompt stand in a conversation, in their order."""
    rest = iter(_text(one) for one in conversation)
    return all(_text(one) in rest for one in prompt)
