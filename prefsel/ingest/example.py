"""What an adapter makes of a row, and the checks its fields go through on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from prefsel.config import FormatOptions

Messages: TypeAlias = list[dict[str, str]]

_MAX_FIELDS_NAMED = 20


class RowError(Exception):
    """A row that its format does not allow; `reason` is a key of `reasons.QUARANTINE`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Completion(NamedTuple):
    """One answer and every number that came with it."""

    messages: Messages
    """As dictionaries with `role` and `content`; the first is the assistant's."""
    ratings: dict[str, float]
    """By name: aspects, `score`, columns of the data's own; finite."""


class Preference(NamedTuple):
    """One labelled pair, as indices into the completions; `margin` is None when the label came without a number."""

    chosen: int
    """Which completion was preferred."""
    rejected: int
    """To which other one."""
    aspect: str | None
    """What the two were compared by; None: nothing in particular."""
    margin: float | None
    """By how much."""


@dataclass(frozen=True)
class Example:
    """What a format makes of one row: a prompt, its distinct completions, and the preferences among them."""

    prompt: Messages
    """As dictionaries with `role` and `content`."""
    completions: list[Completion]
    """No two with the same messages."""
    preferences: list[Preference]
    """Pairs of different completions."""
    ties: int = 0
    """Comparisons of the row that preferred neither."""


Adapter: TypeAlias = Callable[[Mapping[str, Any], FormatOptions], Example]
"""(row, options of its source) → what it holds, or a `RowError`; it reads nothing but its arguments."""


@dataclass(frozen=True)
class Format:
    """A format of rows: its name, how a row is read, and which rows look like it."""

    name: str
    """What configurations call it."""
    adapt: Adapter
    """How a row of it is read."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a row looks like it, as far as its fields and their types say."""

    def __call__(self, value: Mapping[str, Any], options: FormatOptions) -> Example:
        """The example of a row; raises `RowError` for a row that the format does not allow."""
        return self.adapt(value, options)


def field(value: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields `names` that is there and not null.

    Raises:
        RowError: none is (`missing_field`).
    """
    for name in names:
        if value.get(name) is not None:
            return value[name]
    present = ", ".join(list(value)[:_MAX_FIELDS_NAMED]) or "nothing"
    raise RowError("missing_field", f"{' or '.join(names)}: absent or null; the row has {present}")


def wrong_type(name: str, got: object, valid: str) -> RowError:
    """The error for a field that holds another type than it should."""
    return RowError("wrong_type", f"{name}: got {type(got).__name__}; valid: {valid}")


def list_field(value: Mapping[str, Any], *names: str) -> list[Any]:
    """The first of the fields `names` that is there, which must be a list."""
    found = field(value, *names)
    if not isinstance(found, list):
        raise wrong_type(" or ".join(names), found, "a list")
    return found


def messages_of(found: object, name: str) -> Messages:
    """`found` as messages with nothing but role and content."""
    if not isinstance(found, list):
        raise wrong_type(name, found, "a list of messages")
    messages = []
    for number, message in enumerate(found):
        if not isinstance(message, dict):
            raise wrong_type(f"{name}[{number}]", message, "an object with role and content")
        role, content = field(message, "role"), field(message, "content")
        if not isinstance(role, str) or not role:
            raise wrong_type(f"{name}[{number}].role", role, "a string")
        if not isinstance(content, str):
            raise wrong_type(f"{name}[{number}].content", content, "a string")
        messages.append({"role": role, "content": content})
    return messages


def prompt_of(found: object, name: str) -> Messages:
    """A prompt given as a string (one user message) or as messages; it must hold some text."""
    messages = [{"role": "user", "content": found}] if isinstance(found, str) else messages_of(found, name)
    if not any(message["content"].strip() for message in messages):
        raise RowError("empty_prompt", f"{name}: no text")
    return messages


def completion_of(found: object, name: str) -> Messages:
    """A completion given as a string (one assistant message) or as messages that begin with the assistant."""
    if isinstance(found, str):
        messages = [{"role": "assistant", "content": found}]
    elif not isinstance(found, list):
        raise wrong_type(name, found, "a string, or a list of messages")
    else:
        messages = messages_of(found, name)
        if messages and messages[0]["role"] != "assistant":
            valid = "messages that begin with the assistant's; use messages_implicit if they repeat the prompt"
            raise RowError("wrong_type", f"{name}: begins with role {messages[0]['role']!r}; valid: {valid}")
    require_text(messages, name)
    return messages


def require_text(messages: Messages, name: str) -> None:
    """Raise `empty_completion` unless there are messages and every one holds text."""
    if not messages or not all(message["content"].strip() for message in messages):
        raise RowError("empty_completion", f"{name}: no text")


def number(found: object, name: str) -> float:
    """A finite number; −0.0 becomes 0.0."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise wrong_type(name, found, "a number")
    try:
        result = float(found) + 0.0
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RowError("non_finite_score", f"{name}: got {result}")
    return result


def difference(first: float, second: float) -> float:
    """`first` − `second`, which must be finite."""
    return number(first - second, "score difference")


def distinct(completions: list[Completion]) -> tuple[list[Completion], list[int]]:
    """`completions` with equal texts stored once (a rating keeps its first value), and the new index of each.

    Raises:
        RowError: fewer than two are left.
    """
    if len(completions) < 2:
        raise RowError("too_few_completions", f"completions: got {len(completions)}; at least 2 are needed")
    places: dict[tuple[tuple[str, str], ...], int] = {}
    kept: list[Completion] = []
    index = []
    for messages, ratings in completions:
        place = places.setdefault(tuple((m["role"], m["content"]) for m in messages), len(kept))
        if place == len(kept):
            kept.append(Completion(messages, dict(ratings)))
        else:
            for key, rating in ratings.items():
                kept[place].ratings.setdefault(key, rating)
        index.append(place)
    if len(kept) < 2:
        raise RowError("identical_completions", f"all {len(completions)} completions are the same text")
    return kept, index
