"""What an adapter makes of a row: a prompt, its distinct completions, and the preferences among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

from prefsel.config import FormatOptions
from prefsel.ingest.identity import canonical
from prefsel.ingest.messages import Messages, has_text, messages_of, require_text
from prefsel.ingest.row_error import RowError, missing, wrong_type

Margin: TypeAlias = Callable[[int, int], float | None]
"""The difference of two completions' ratings; None when one of them lacks the rating."""


class Completion(NamedTuple):
    """One answer and every number that came with it."""

    messages: Messages
    """As dictionaries with `role` and `content`, and what else came with them; the first is the assistant's."""
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
    absent: int = 0
    """Ratings that were there and are taken as absent: out of their scale."""


Adapter: TypeAlias = Callable[[Mapping[str, Any], FormatOptions], Example | Sequence[Example]]
"""(row, options of its source) → what it holds, or a `RowError`; it reads nothing but its arguments. A row that holds
several prompts, such as a tree, gives several examples."""

PairUp: TypeAlias = Callable[[Messages, Sequence[Completion], FormatOptions], tuple[list[Preference], int]]


@dataclass(frozen=True)
class Format:
    """A format of rows: its name, how a row is read, and which rows look like it."""

    name: str
    """What configurations call it."""
    adapt: Adapter
    """How a row of it is read."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a row looks like it, as far as its fields and their types say."""
    needs: tuple[str, ...] = ()
    """Fields without which a row is none of it: what the message of a failed detection compares with."""
    pair_up: PairUp | None = None
    """Of a format whose rows hold one response: the preferences among those of a prompt, which stand one after the
    other, and how many ties; (prompt, completions, options)."""

    def __call__(self, value: Mapping[str, Any], options: FormatOptions) -> Example | Sequence[Example]:
        """The examples of a row; raises `RowError` for a row that the format does not allow."""
        return self.adapt(value, options)


def field(value: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields `names` that is there and not null.

    Raises:
        RowError: none is (`missing_field`).
    """
    return value[field_name(value, *names)]


def field_name(value: Mapping[str, Any], *names: str) -> str:
    """Which of the fields `names` is the first that is there and not null; errors as `field`."""
    for name in names:
        if value.get(name) is not None:
            return name
    raise missing(value, " or ".join(names))


def list_field(value: Mapping[str, Any], *names: str) -> list[Any]:
    """The first of the fields `names` that is there, which must be a list."""
    found = field(value, *names)
    if not isinstance(found, list):
        raise wrong_type(" or ".join(names), found, "a list")
    return found


def prompt_of(found: object, name: str) -> Messages:
    """A prompt given as text (one user message) or as messages; it must hold some text."""
    messages = messages_of(found, name, role="user")
    if not any(has_text(message) for message in messages):
        raise RowError("empty_prompt", f"{name}: no text")
    return messages


def completion_of(found: object, name: str) -> Messages:
    """A completion given as text (one assistant message) or as messages that begin with the assistant."""
    if isinstance(found, str):
        messages: Messages = [{"role": "assistant", "content": found}]
    else:
        messages = messages_of(found, name, role="assistant")
    if messages and messages[0]["role"] != "assistant":
        raise RowError("wrong_type", f"{name}: begins with role {messages[0]['role']!r}; valid: the assistant's")
    require_text(messages, name)
    return messages


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
    """`completions` with equal messages stored once (a rating keeps its first value), and the new index of each.

    Raises:
        RowError: fewer than two are left.
    """
    if len(completions) < 2:
        raise RowError("too_few_completions", f"completions: got {len(completions)}; at least 2 are needed")
    places: dict[bytes, int] = {}
    kept: list[Completion] = []
    index = []
    for messages, ratings in completions:
        place = places.setdefault(canonical(messages), len(kept))
        if place == len(kept):
            kept.append(Completion(messages, dict(ratings)))
        else:
            for key, rating in ratings.items():
                kept[place].ratings.setdefault(key, rating)
        index.append(place)
    if len(kept) < 2:
        raise RowError("identical_completions", f"all {len(completions)} completions are the same text")
    return kept, index


def mine(num_completions: int, aspect: str | None, margin: Margin) -> tuple[list[Preference], int]:
    """A preference for every two completions with a margin other than 0, and how many had 0."""
    preferences, ties = [], 0
    for first, second in combinations(range(num_completions), 2):
        value = margin(first, second)
        if value is None:
            continue
        if value == 0:
            ties += 1
        elif value > 0:
            preferences.append(Preference(first, second, aspect, value))
        else:
            preferences.append(Preference(second, first, aspect, -value))
    return preferences, ties
