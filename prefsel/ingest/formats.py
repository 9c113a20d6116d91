"""The formats a row can have: a line for each file that holds some; the first that a row looks like is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from prefsel.config import FieldMap, FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.example import Adapter, Completion, Example, Format, Preference, prompt_of
from prefsel.ingest.fields import is_empty, lookup, top_field
from prefsel.ingest.mapping import read
from prefsel.ingest.messages import Messages
from prefsel.ingest.row_error import RowError, missing
from prefsel.ingest.surroundings import PROMPTS, with_surroundings
from prefsel.plugins.registry import Registry

__all__ = [
    "FORMATS",
    "Completion",
    "Example",
    "Format",
    "FormatOptions",
    "Preference",
    "RowError",
    "detect",
    "mixed",
    "prompt_adapter",
]

FILES = (
    "pair_formats",
    "ranking_formats",
    "comparison_formats",
    "response_formats",
    "tree_formats",
)
"""The files of this folder that hold `FORMATS`, in the order in which they are tried."""

_BUILT_IN: list[Format] = [one for file in FILES for one in import_module(f"prefsel.ingest.{file}").FORMATS]

if len(_names := [one.name for one in _BUILT_IN]) > len(set(_names)):
    raise UserError(f"formats: {max(_names, key=_names.count)!r} stands in two files; names differ")

FORMATS: Registry[Adapter] = Registry("formats", {one.name: one for one in _BUILT_IN})
"""Every format by name, in the order in which they are tried; those of plugins, which are never tried, included."""


def detect(value: Mapping[str, Any]) -> str:
    """The format a row looks like.

    Raises:
        UserError: none of them; shows the fields seen, the nearest format with what it lacks, and a map to start from.
    """
    for name, one in FORMATS.builtin.items():
        if isinstance(one, Format) and one.matches(value):
            return name
    fields = ", ".join(f"{key} ({type(found).__name__})" for key, found in value.items()) or "none"
    holder = next((key for key, found in value.items() if _are_rows(found)), None)
    if holder is not None:
        raise UserError(
            f"format: cannot tell from the fields {fields}. The rows seem to stand inside of {holder!r}; make them the "
            f"rows of the file, for example with jq -c '.{holder}[]'"
        )
    raise UserError(
        f"format: cannot tell from the fields {fields}.{_nearest(value)} Name one of {', '.join(FORMATS)}; or say "
        f"which field is what, such as\n  map: {_first_map(value)}"
    )


def _are_rows(found: object) -> bool:
    """Whether a field holds what could be the rows of a file."""
    if not isinstance(found, list) or not found or not isinstance(found[0], Mapping):
        return False
    return any(isinstance(one, Format) and one.matches(found[0]) for one in FORMATS.builtin.values())


def mixed(name: str) -> Adapter:
    """A built-in format for a file that may be a mixture: a row that lacks a field of it is read as what it looks like.

    A row that looks like nothing keeps the error of the file's format.
    """
    main = FORMATS[name]

    def adapt(value: Mapping[str, Any], options: FormatOptions) -> Example | Sequence[Example]:
        try:
            return main(value, options)
        except RowError as error:
            others = (one for one in FORMATS.builtin.values() if isinstance(one, Format) and one.pair_up is None)
            other = next((one for one in others if one.name != name and one.matches(value)), None)
            if other is None or (isinstance(main, Format) and main.matches(value) and error.reason != "missing_field"):
                raise
            return other(value, options)

    return replace(main, adapt=adapt) if isinstance(main, Format) else adapt


def _nearest(value: Mapping[str, Any]) -> str:
    """The format that lacks the smallest share of its fields, as a sentence; empty where a row has none of any."""
    found = []
    for name, one in FORMATS.builtin.items():
        needs = one.needs if isinstance(one, Format) else ()
        lacking = [path for path in needs if lookup(value, path) is None]
        if needs and len(lacking) < len(needs):
            found.append((len(lacking) / len(needs), name, lacking))
    if not found:
        return ""
    _, name, lacking = min(found, key=lambda one: one[0])
    if not lacking:
        return f" The nearest is {name}, but a field of it holds another type."
    return f" The nearest is {name}, which lacks {', '.join(lacking)}."


GUESSES = {
    "prompt": (
        *("prompt", "question", "instruction", "query", "input", "context", "post", "messages", "conversation"),
        *("dialog", "text", "title", "body"),
    ),
    "chosen": ("chosen", "preferred", "better", "winner", "accepted", "positive", "good", "win", "up"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "negative", "bad", "lose", "down"),
}
"""What fields are called in data that no format fits, for a first map."""


_NO_TEXT = re.compile(r"(^|_)(id|winner|label|model|preference|choice|rank|score|rating)$")
_VERDICTS = re.compile(r"winner|label|prefer|better|choice|verdict")


def _first_map(value: Mapping[str, Any]) -> str:
    """A map that may fit a row: fields whose names hint at it, else the names to fill in."""
    if (several := _several(value)) is not None:
        return several
    names = [key for key, found in value.items() if isinstance(found, str | list | Mapping) and not is_empty(found)]
    names = [key for key in names if not _NO_TEXT.search(key.lower())]
    found: dict[str, str] = {}
    if two := _two_alike(names):
        prompt = next((one for hint in GUESSES["prompt"] for one in names if hint in one.lower()), "FIELD_OF_PROMPT")
        verdict = next((key for key in value if _VERDICTS.search(key.lower())), "FIELD_OF_VERDICT")
        told = f"{{field: {verdict}, first: [VALUE], second: [VALUE], tie: [VALUE]}}"
        return f"{{prompt: {prompt}, responses: [{', '.join(two)}], preference: {told}}}"
    for role in ("chosen", "rejected", "prompt"):
        near = (name for hint in GUESSES[role] for name in names if hint in name.lower() and name not in found.values())
        found[role] = next(near, f"FIELD_OF_{role.upper()}")
    return "{" + ", ".join(f"{role}: {found[role]}" for role in GUESSES) + "}"


def _several(value: Mapping[str, Any]) -> str | None:
    """A map for a row with a list of responses and their numbers: objects of both, or a list of each."""
    lists = {key: found for key, found in value.items() if isinstance(found, list) and len(found) > 1}
    texts: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for key, found in lists.items():
        inside = {f"{key}[].{name}": one for name, one in found[0].items()} if isinstance(found[0], Mapping) else {}
        for path, one in (inside or {key: found[0]}).items():
            if isinstance(one, str) and not _NO_TEXT.search(path.lower()):
                texts[path] = len(found)
            elif isinstance(one, int | float) and not isinstance(one, bool):
                numbers[path] = len(found)
    both = ((text, number) for text in texts for number in numbers if texts[text] == numbers[number])
    text, number = next(both, ("", ""))
    if not text:
        return None
    prompts = (key for hint in GUESSES["prompt"] for key in value if hint in key.lower() and key not in lists)
    role = "ranks" if "rank" in number.lower() else "scores"
    return f"{{prompt: {next(prompts, 'FIELD_OF_PROMPT')}, responses: '{text}', {role}: '{number}'}}"


def _two_alike(names: Sequence[str]) -> tuple[str, str] | None:
    """Two fields whose names differ in the mark of a side alone, such as `answer_a` and `answer_b`."""
    for one in names:
        for first, second in (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2")):
            if one.endswith(first) and f"{one[:-1]}{second}" in names:
                return one, f"{one[:-1]}{second}"
    return None


def prompt_adapter(name: str | None, fields: FieldMap | None = None) -> Adapter:
    """An adapter that keeps a row's prompts: as the map, or format `name`, or the row's own, finds them.

    For sets of prompts to leave out of a corpus: such a row may have no completions, or useless ones. The prompt is
    then the field that is called so, with what stands beside it, as it would be in the corpus.

    Args:
        name: Of a format; None: that of the first row that looks like one.
        fields: Which field is what, instead of a format.

    Returns:
        The adapter, whose examples have no completions.

    Raises:
        RowError: From the adapter: a row without a prompt.
    """

    def adapt(value: Mapping[str, Any], options: FormatOptions) -> list[Example]:
        try:
            adapter = FORMATS[name or detect(value)] if fields is None else partial(read, fields=fields)
            found = adapter(value, options)
            return [Example(one.prompt, [], []) for one in ([found] if isinstance(found, Example) else found)]
        except (UserError, RowError):
            return [Example(_prompt_alone(value, fields, options), [], [])]

    return adapt


def _prompt_alone(value: Mapping[str, Any], fields: FieldMap | None, options: FormatOptions) -> Messages:
    path = None if fields is None else fields.prompt
    names = (*PROMPTS, "input.messages") if path is None else (path,)
    if path is None and isinstance(turns := value.get("turns"), list) and len(turns) == 1:
        names = (*names, "turns[0].content")  # a question of Arena-Hard, as it was written until 2025
    path = next((one for one in names if not is_empty(lookup(value, one))), None)
    if path is None:
        raise missing(value, " or ".join(names))
    return with_surroundings(value, prompt_of(lookup(value, path), path), options, used={top_field(path)})
