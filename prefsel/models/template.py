"""What a chat template makes of messages: found by asking it once, then looked at in every conversation it writes.

    probe_template   two messages of known text ─► does it take text, parts, what opens an answer, what ends it
    lost_of_prompt, became   messages against the text written for them ─► what is not as it came

A template is a program of somebody else. It may trim, drop reasoning, skip tool calls, read content as parts only, or
write nothing at all, each without an error; what it did is counted and shown, because every number is of that text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, whether to open an answer) → text; raises `TemplateError` for whatever the template raises."""

REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_content")
"""Keys of a message that hold what was thought before its content."""
ADDRESSES = frozenset({"id", "type", "index", "tool_call_id", "call_id"})
"""Keys within a message whose values say where something belongs; no template has to write them."""
THOUGHT_ENDS = "</think>"
WORD = re.compile(r"\w+")
SHOWN = 80
"""Characters of an example."""
ASKED, ANSWERED = "wq7x asks", "zk4j answers"
"""Texts that no template writes by itself."""


@dataclass(frozen=True)
class Note:
    """Something a template did with some completions of a group: a key of `reasons.TEMPLATE_NOTES`, or an error."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True)
class TemplateTraits:
    """What holds for every conversation of a template."""

    takes_text: bool = True
    """Content that is text is written."""
    takes_parts: bool = False
    """Content that is a list of parts is written, as the text of its parts."""
    unanswered: str = ""
    """How the generation prompt ends, where the turn of an answer does not begin so: `<think>` of a reasoning model."""
    ending: str | None = None
    """What is written after an answer; None where the template did not take two plain messages."""


def probe_template(render: Render) -> TemplateTraits:
    """Ask a template what it does, with a question and an answer of known text.

    A template that refuses or garbles even these gets the traits of an ordinary one: its conversations will tell.
    """
    texts = [_attempt(render, _two_messages(content)) for content in (str, _as_parts)]
    takes_text, takes_parts = (_holds(text) and "'type'" not in text for text in texts)
    if not takes_text and not takes_parts:
        return TemplateTraits()
    content, full = (str, texts[0]) if takes_text else (_as_parts, texts[1])
    head, ending = full[: full.index(ANSWERED)], full[full.rindex(ANSWERED) + len(ANSWERED) :]
    opened = _attempt(render, _two_messages(content)[:1], is_open=True)
    is_longer = not full.startswith(opened) and opened.startswith(head)
    return TemplateTraits(takes_text, takes_parts, opened[len(head) :] if is_longer else "", ending)


def _two_messages(content: Callable[[str], Any]) -> list[dict[str, Any]]:
    roles = (("user", ASKED), ("assistant", ANSWERED))
    return [{"role": role, "content": content(text)} for role, text in roles]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _attempt(render: Render, messages: Messages, *, is_open: bool = False) -> str:
    try:
        return render(messages, is_open)
    except TemplateError:
        return ""


def _holds(text: str) -> bool:
    return ASKED in text and ANSWERED in text


def as_taken(messages: Messages, traits: TemplateTraits) -> list[dict[str, Any]]:
    """Messages with their content in the form that the template takes, where it takes one of text and parts only.

    Raises:
        TemplateError: A part is no text, and the template takes text.
    """
    if traits.takes_text and traits.takes_parts:
        return [dict(message) for message in messages]
    return [{**message, "content": _taken(message.get("content"), traits)} for message in messages]


def _taken(content: Any, traits: TemplateTraits) -> Any:
    if isinstance(content, str) and not traits.takes_text:
        return _as_parts(content)
    if isinstance(content, list) and not traits.takes_parts:
        return "".join(map(_text_of_part, content))
    return content


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise TemplateError(f"it takes text, and a message holds a part of type {kind!r}")
    return str(part["text"])


# --------------------------------------------------------------------------------------- what became of the messages


def lost_of_prompt(messages: Messages, text: str) -> str:
    """The first thing of a prompt that its text lacks, in words; empty when all of it is there.

    Reasoning of earlier turns is not missed: templates leave it out by design.
    """
    for number, message in enumerate(messages):
        content = _plain(message.get("content"))
        if message["role"] == "assistant":
            content = content.rpartition(THOUGHT_ENDS)[2]
        if not is_written(content, text):
            return f"{message['role']} message {number}: {shown(content)}"
        for key in _lacking_keys(message, text):
            if key not in REASONING:
                return f"{message['role']} message {number}: {key} {shown(message[key])}"
    return ""


@dataclass(frozen=True)
class Became:
    """What a template made of a completion."""

    seems_silent: bool
    """None of its words are written, although it says something: what another answer would make certain."""
    notes: tuple[tuple[str, str], ...] = ()
    """(kind, example) of everything that is not as it came."""


def became(messages: Messages, text: str, ending: str) -> Became:
    """How the text that a template wrote for a completion differs from the completion.

    White space is not looked at, and content is taken for written when all its words are: templates trim, and write
    quotes and line breaks of JSON in their own way.

    Args:
        messages: The completion.
        text: What the conversation has behind its prompt.
        ending: What the template writes after an answer.
    """
    said, notes = False, dict[str, str]()
    wanted = False
    for message in messages:
        content = _plain(message.get("content"))
        thought, ended, answer = content.rpartition(THOUGHT_ENDS)
        wanted |= bool(content.strip())
        if content and not content.strip():
            if content + ending not in text:
                notes.setdefault("blank", repr(content))
        elif is_written(content, text):
            said |= bool(content.strip())
        elif ended and is_written(answer, text):
            said |= bool(answer.strip())
            notes.setdefault("thinking_dropped", shown(thought.replace("<think>", "").strip()))
        elif any(word in text for word in WORD.findall(content)):
            said = True
            notes.setdefault("changed", shown(content))
        else:
            notes.setdefault("changed", f"nothing of {shown(content)}")
        lacking = _lacking_keys(message, text)
        for key in lacking:
            kind = "thinking_dropped" if key in REASONING else "changed"
            notes.setdefault(kind, f"{key} {shown(message[key])}")
        others = [key for key in message if key not in ("role", "content", *REASONING)]
        wanted |= bool(others)
        said |= any(key not in lacking for key in others)
        end = ending.strip()
        if end and content.strip().endswith(end) and text.rstrip().endswith(f"{end}{ending}".rstrip()):
            notes.setdefault("ends_twice", shown(content.strip()[-SHOWN:]))
    return Became(wanted and not said and "thinking_dropped" not in notes, tuple(notes.items()))


def another(messages: Messages) -> list[dict[str, Any]]:
    """Messages of the same roles that say something else, and nothing besides their content."""
    others = []
    for message in messages:
        content = message.get("content")
        others.append({"role": message["role"], "content": ANSWERED if _plain(content).strip() else content})
    return others


def is_written(content: str, text: str) -> bool:
    """Whether a text holds some content, but for white space and punctuation."""
    return content.strip() in text or _has_words(content, text)


def _has_words(content: str, text: str) -> bool:
    words = WORD.findall(content)
    return bool(words) and all(word in text for word in words)


def _lacking_keys(message: Mapping[str, Any], text: str) -> list[str]:
    """Keys besides role and content of which the text holds nothing."""
    lacking = []
    for key, value in message.items():
        if key not in ("role", "content", *ADDRESSES):
            leaves = list(_leaves(value))
            if leaves and not any(is_written(one, text) for one in leaves):
                lacking.append(key)
    return lacking


def _leaves(value: Any) -> Iterator[str]:
    """The texts within a value, but for addresses."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ADDRESSES:
                yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)


def _plain(content: Any) -> str:
    """The text of some content, whatever its form."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def special_text(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds texts of special tokens in content; None where the tokenizer has none, or does not see them in text.

    Tokens that are added without being special, such as `<tool_call>`, are ordinary words of a model's answers.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        return None
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special)
    tokens = {token for token in (*tokenizer.all_special_tokens, *added) if token.strip()}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def special_note(pattern: re.Pattern[str] | None, messages: Messages) -> str:
    """The first text of a special token in the content of messages, with what is around it; empty: there is none."""
    if pattern is not None:
        for message in messages:
            content = _plain(message.get("content"))
            if found := pattern.search(content):
                start = max(0, found.start() - SHOWN // 4)
                return f"{found[0]} in {message['role']} content {shown(content[start:])}"
    return ""


def shown(value: Any) -> str:
    """A value as text of one line, cut to what an example may take."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
