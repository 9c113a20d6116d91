"""What the field's data keeps as a conversation, or one side of it → messages.

    text · one message · messages · from/value turns · their JSON text · a transcript   ──▶   [{role, content, …}, …]

A message keeps every key that could change what a model sees, as it came; the tokenizer's own template decides what
becomes of them. Only what cannot matter goes: nulls, and the bookkeeping of exports.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from prefsel.ingest.fields import is_empty
from prefsel.ingest.row_error import RowError, missing, wrong_type

Message: TypeAlias = dict[str, Any]
"""`role` and `content` (text, or None beside a tool call), and further keys as they came."""
Messages: TypeAlias = list[Message]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
}
"""Names of roles in the field, in lower case; every other name stays as it came, for the template to judge."""
BOOKKEEPING = frozenset(
    {"id", "uuid", "message_id", "parent_id", "index", "turn", "turn_identifier", "source", "model"}
    | {"timestamp", "tstamp", "created_at", "updated_at", "create_time", "date", "language", "lang"}
    | {"num_tokens", "token_count", "weight", "train", "loss", "loss_weight", "score", "rating"}
    | {"toxic", "redacted", "moderation", "openai_moderation", "feedback_options"}
)
"""Keys of a message that no chat template writes."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text, in the messages of one interface and of another."""
CALLS = ("tool_calls", "function_call")
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
"""Keys of a message with what is no text."""
TRANSCRIPT_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""Where a turn of an HH transcript begins."""
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def messages_of(found: object, name: str, *, role: str) -> Messages:
    """A conversation, or a part of it, in any of the shapes above.

    Args:
        found: What stands in the row.
        name: What errors call it.
        role: Whose a plain text is.

    Raises:
        RowError: It is none of these shapes.
    """
    if isinstance(found, str):
        held = held_messages(found)
        return [{"role": role, "content": found}] if held is None else messages_of(held, name, role=role)
    if isinstance(found, Mapping):
        return [message_of(found, name)]
    if not isinstance(found, list):
        raise wrong_type(name, found, "text, a message, or a list of messages")
    return [message_of(one, f"{name}[{number}]") for number, one in enumerate(found)]


def message_of(found: object, name: str) -> Message:
    """One message, as `role` and `content`, or as `from` and `value`.

    Raises:
        RowError: It lacks one of the two, or its content is neither text nor parts of text.
    """
    if not isinstance(found, Mapping):
        raise wrong_type(name, found, "an object with role and content")
    role_key, content_key = ("from", "value") if "from" in found and "role" not in found else ("role", "content")
    role = found.get(role_key)
    if is_empty(role):
        raise missing(found, f"{name}.{role_key}")
    if not isinstance(role, str):
        raise wrong_type(f"{name}.{role_key}", role, "text")
    rest = {
        key: _call_list(one) if key == "tool_calls" else one
        for key, one in found.items()
        if key not in (role_key, content_key, *BOOKKEEPING) and not is_empty(one)
    }
    if unseen := sorted(rest.keys() & MEDIA):
        raise RowError("content_part", f"{name}.{unseen[0]}: only text can be read")
    if role == "function_call" and content_key == "value":  # a turn of ShareGPT that is a call as JSON text
        return {"role": "assistant", "content": None, "tool_calls": [_call(found.get("value"), name)], **rest}
    content = _content(found.get(content_key), f"{name}.{content_key}", may_lack=any(key in rest for key in CALLS))
    return {"role": ROLES.get(role.strip().lower(), role), "content": content, **rest}


def _call_list(found: Any) -> Any:
    """Calls kept as JSON text, as the list they are."""
    try:
        return json.loads(found) if isinstance(found, str) else found
    except ValueError:
        return found


def text_of(found: object, name: str) -> str:
    """A text, also one given as parts.

    Raises:
        RowError: It is neither, or a part is no text.
    """
    if isinstance(found, list) and not all(isinstance(one, Mapping) for one in found):
        raise wrong_type(name, found, "text, or a list of text parts")
    text = _content(found, name, may_lack=False)
    assert text is not None, "only a message with calls may lack it"
    return text


def _content(found: object, name: str, *, may_lack: bool) -> str | None:
    if isinstance(found, str) or (found is None and may_lack):
        return found
    if found is None:
        raise RowError("missing_field", f"{name}: absent or null, in a message without tool calls")
    if not isinstance(found, list):
        raise wrong_type(name, found, "text, or a list of text parts")
    return "".join(_part(one, name) for one in found)


def _part(found: object, name: str) -> str:
    if isinstance(found, Mapping):
        if found.get("type", "text") not in TEXT_PARTS:
            raise RowError("content_part", f"{name}: a part of type {found['type']!r}; only text can be read")
        found = found.get("text")
    if not isinstance(found, str):
        raise wrong_type(name, found, "text, or a list of text parts")
    return found


def _call(text: object, name: str) -> dict[str, Any]:
    try:
        call = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError("wrong_type", f"{name}.value: a function call is JSON text with name and arguments")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


_HOLDS_OBJECTS = re.compile(r"\s*(array\(\s*)?(\[\s*)?\{.*\}(\s*\])?(\s*,\s*dtype=object\s*\))?\s*", re.DOTALL)
_ARRAY = re.compile(r"\Aarray\(\s*(.*?)\s*,\s*dtype=object\s*\)\Z", re.DOTALL)
_NEXT_OBJECT = re.compile(r"\}\s*\n\s*\{")
"""How NumPy prints an array of objects: no comma between them. Line breaks of texts are escaped there."""


def held_messages(text: str) -> list[Any] | None:
    """The messages that a text is the JSON of, or what Python prints for them; None for every other text.

    Tables keep one or the other where a cell can only be text.
    """
    if not _HOLDS_OBJECTS.fullmatch(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(_NEXT_OBJECT.sub("}, {", _ARRAY.sub(r"\1", text.strip())))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    found = [found] if isinstance(found, dict) else found
    is_conversation = isinstance(found, list) and found and all(_is_message(one) for one in found)
    return found if is_conversation else None


def _is_message(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    return {"role", "content"} <= found.keys() or {"from", "value"} <= found.keys()


def transcript_of(text: str, name: str) -> Messages:
    r"""A transcript of `\n\nHuman:` and `\n\nAssistant:` turns (HH-RLHF).

    White space around a turn is not part of it; text before the first turn is a system message. A text of which no two
    turns are so apart is cut at single line breaks.

    Raises:
        RowError: It holds no turn, or one of another speaker before the first.
    """
    if len(TRANSCRIPT_TURN.findall(text)) < 2:  # one line break between the turns
        text = re.sub(r"\n(?=(Human|Assistant):)", "\n\n", text)
    before, *parts = TRANSCRIPT_TURN.split(text)
    if re.match(r"\s*[A-Z][a-z]+:", before):
        raise RowError("wrong_type", f"{name}: begins with another speaker than 'Human:' or 'Assistant:'")
    if not parts:
        raise RowError("wrong_type", f"{name}: holds no 'Human:' or 'Assistant:' turn")
    system = [{"role": "system", "content": before.strip()}] if before.strip() else []
    turns = zip(parts[::2], parts[1::2], strict=True)
    return system + [{"role": _TRANSCRIPT_ROLES[role], "content": content.strip()} for role, content in turns]


HELPSTEER_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")
"""How HelpSteer2 marks the turns after the first in a prompt of several."""


def prompt_transcript(text: str) -> Messages | None:
    """The turns of a prompt that is a transcript waiting for an answer; None for every other text."""
    if HELPSTEER_TURN.search(text):
        first, *parts = HELPSTEER_TURN.split(text)
        turns = [("User", first), *zip(parts[::2], parts[1::2], strict=True)]
        return [{"role": role.lower(), "content": content} for role, content in turns if content.strip()]
    if not re.match(r"\s*Human:", text) or not re.search(r"\n\s*Assistant:\s*\Z", text):
        return None
    return transcript_of("\n\n" + text.strip(), "prompt")[:-1]


def has_text(message: Message) -> bool:
    """Whether a message says something: text, or a call."""
    return bool((message["content"] or "").strip()) or any(key in message for key in CALLS)


def require_text(messages: Messages, name: str) -> None:
    """Refuse a completion of nothing.

    Raises:
        RowError: There is no message, or one of them says nothing.
    """
    if not messages or not all(has_text(message) for message in messages):
        raise RowError("empty_completion", f"{name}: no text")
