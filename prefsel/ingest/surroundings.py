"""What stands beside a prompt in a row: system text, earlier turns, input and tools, which become a part of it.

A field that changes what the model saw, and that nothing reads, refuses the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.fields import is_empty, lookup, top_field
from prefsel.ingest.messages import Messages, has_text, held_messages, messages_of, text_of
from prefsel.ingest.prompt import same
from prefsel.ingest.row_error import RowError, wrong_type

AROUND: dict[str, tuple[str, ...]] = {
    "input": ("input",),
    "history": ("history",),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
}
"""What stands beside a prompt, and what it is usually called, in the order in which it is put there."""
SEEN = frozenset({*(name for names in AROUND.values() for name in names), "initial_reason_steps"})
"""Fields that change what the model saw: a row is never read without one that says something."""
SEEN_WORDS = frozenset(
    {"system", "sys", "developer", "persona", "history", "context", "contexts", "dialogue", "dialog"}
    | {"tool", "tools", "document", "documents", "docs", "passage", "passages", "knowledge", "attachments"}
    | {"image", "images", "img", "audio", "audios", "video", "videos"}
    | {"reasoning", "thinking", "think", "thought", "thoughts", "cot", "prefix", "prefill"}
)
"""Words of their names; a field with one of them is such a field too."""
NOT_SEEN = frozenset({"tool_choice", "parallel_tool_calls"})
PROMPTS = ("prompt", "question", "instruction", "query")
"""What a row calls its prompt; a second one with another text is no less what the model may have seen."""
CONVERSATIONS = ("messages", "conversation", "conversations")
"""Fields that repeat the prompt in many sets, and hold what came before it in others."""
LONG_TEXT = 40
"""Characters; a shorter text may stand in another one by chance."""


def with_surroundings(
    value: Mapping[str, Any],
    prompt: Messages,
    options: FormatOptions,
    *,
    used: Iterable[str],
    given: Mapping[str, str] | None = None,
    is_whole: bool = False,
) -> Messages:
    """The prompt with the system text, earlier turns, input and tools that stand beside it in the row.

    Args:
        value: The row.
        prompt: What it calls its prompt, or what its conversations share.
        options: Of the source; `ignore` names fields that may be left out.
        used: Fields that were read already.
        given: Paths of surroundings, by role (a key of `AROUND`), where they are not the usual names.
        is_whole: Whether the prompt is what conversations share, so that the input may stand in it already.

    Raises:
        RowError: The prompt has no text, or a field that changes what the model saw would be left out.
    """
    is_used, texts = {*used, *options.ignore}, [one["content"] or "" for one in prompt]
    for role, names in AROUND.items():
        there = (one for one in names if one not in is_used and not is_empty(value.get(one)))
        path = (given or {}).get(role) or next(there, None)
        found = None if path is None else lookup(value, path)
        said = [one["content"] or "" for one in prompt if one["role"] == "system"] if role == "system" else texts
        if path is None or is_empty(found) or (role != "input" and _is_told(found, said)):
            continue
        if role == "input" and is_whole and isinstance(found, str) and any(found.strip() in text for text in texts):
            is_used.add(top_field(path))
            continue
        is_used.add(top_field(path))
        prompt = _PUT[role](prompt, found, path)
    texts = [one["content"] or "" for one in prompt]
    for name in sorted(name for name in value.keys() - is_used if _is_seen(name) or name in CONVERSATIONS):
        is_told = _are_told if name in CONVERSATIONS else _is_told
        if _says(value[name]) and not is_told(value[name], texts):
            raise _unread(name)
    for name in PROMPTS:
        other = value.get(name)
        if name not in is_used and isinstance(other, str) and not is_empty(other) and not _overlaps(other, texts):
            raise _unread(name)
    if not any(has_text(message) for message in prompt):
        raise RowError("empty_prompt", "prompt: no text")
    return prompt


def refuse_siblings(value: Mapping[str, Any], paths: Iterable[str], options: FormatOptions) -> None:
    """Refuse a field that the model saw beside one that is read inside an object.

    Raises:
        RowError: Such a field says something, and neither the map nor `ignore` names it.
    """
    read_inside: dict[str, set[str]] = {}
    for path in paths:
        before, dot, name = path.rpartition(".")
        if dot:
            read_inside.setdefault(before, set()).add(name.split("[")[0])
    for before, names in read_inside.items():
        holders = lookup(value, before)
        for holder in holders if isinstance(holders, list) else [holders]:
            for name in sorted(holder.keys() - names) if isinstance(holder, Mapping) else ():
                if _is_seen(name) and _says(holder[name]) and not {name, f"{before}.{name}"} & set(options.ignore):
                    raise _unread(f"{before}.{name}")


def _unread(name: str) -> RowError:
    return RowError(
        "unread_field",
        f"{name}: it changes what the model sees, and nothing reads it; name it in sources[].map, or in "
        "sources[].options.ignore to leave it out",
    )


@lru_cache(maxsize=4096)
def _is_seen(field: str) -> bool:
    """Whether a word of a field's name is something that the model saw or said: `images_chosen`, `systemPrompt`."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field).lower())
    return field not in NOT_SEEN and (field in SEEN or not SEEN_WORDS.isdisjoint(words))


def _says(value: object) -> bool:
    """Whether a field holds text or objects; numbers and truth values count and mark, and say nothing."""
    return isinstance(value, str | list | Mapping | bytes) and not is_empty(value)


def _overlaps(text: str, texts: Iterable[str]) -> bool:
    """Whether a text stands in one of others, or one of them in it."""
    return any(text.strip() in one or (one.strip() and one.strip() in text) for one in texts)


def _is_told(found: object, texts: Iterable[str]) -> bool:
    """Whether a message says what a field says: it is the same text, or holds it and it is too long to be chance."""
    if not isinstance(found, str):
        return False
    told = found.strip()
    return any(told == text.strip() or (len(told) >= LONG_TEXT and told in text) for text in texts)


def _are_told(found: object, texts: Iterable[str]) -> bool:
    """Whether a conversation beside the prompt says nothing new: all of it but an answer at its end is told."""
    if isinstance(found, list) and all(isinstance(one, Mapping) and "input" in one for one in found):
        both = (("user", "input"), ("assistant", "output"))  # distilabel: question and answer in one object
        found = [{"role": role, "content": one.get(key) or ""} for one in found for role, key in both]
    try:
        turns = messages_of(found, "", role="user")
    except RowError:
        return False
    before = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return all(_is_told(one["content"] or "", texts) for one in before)


def _put_input(prompt: Messages, found: object, path: str) -> Messages:
    if not isinstance(found, str) or len(prompt) != 1 or prompt[0]["role"] != "user":
        raise RowError("unread_field", f"{path}: text that follows an instruction can only be put behind a text")
    return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{found}"}]


def _put_history(prompt: Messages, found: object, path: str) -> Messages:
    if isinstance(found, list) and all(isinstance(one, list) and len(one) == 2 for one in found):
        roles = ("user", "assistant")
        found = [{"role": role, "content": text} for one in found for role, text in zip(roles, one) if text]
    if isinstance(found, str) and held_messages(found) is None:
        raise RowError("unread_field", f"{path}: got a text; valid: pairs of user and assistant, or messages")
    turns = messages_of(found, path, role="user")
    return prompt if same(prompt[: len(turns)], turns) else [*turns, *prompt]


def _put_system(prompt: Messages, found: object, path: str) -> Messages:
    found = text_of(found, path)
    if any(one["role"] == "system" for one in prompt):
        raise RowError("unread_field", f"{path}: the conversation has another system message")
    return [{"role": "system", "content": found}, *prompt]


def _put_tools(prompt: Messages, found: object, path: str) -> Messages:
    """Tools travel with the first message; the template gets them as its `tools`."""
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except ValueError:
        tools = None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(one, Mapping) for one in tools):
        raise wrong_type(path, found, "a list of tools, or its JSON text")
    if prompt and "tools" in prompt[0] and prompt[0]["tools"] != tools:
        raise RowError("unread_field", f"{path}: the first message has other tools")
    return [{**prompt[0], "tools": tools}, *prompt[1:]] if tools and prompt else prompt


_PUT = {"input": _put_input, "history": _put_history, "system": _put_system, "tools": _put_tools}
