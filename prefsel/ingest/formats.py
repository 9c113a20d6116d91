"""The formats a row can have: a line for each file that holds some; the first that a row looks like is taken."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from prefsel.config import FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.example import Adapter, Completion, Example, Format, Preference, RowError, field, prompt_of
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
    "prompt_adapter",
]

FILES = (
    "pair_formats",
    "ranking_formats",
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
        UserError: none of them; lists the fields seen and the formats.
    """
    for name, one in FORMATS.builtin.items():
        if isinstance(one, Format) and one.matches(value):
            return name
    fields = ", ".join(f"{key} ({type(found).__name__})" for key, found in value.items()) or "none"
    raise UserError(f"format: cannot tell from the fields {fields}; name one of {', '.join(FORMATS)}")


def prompt_adapter(name: str | None) -> Adapter:
    """An adapter that keeps a row's prompt only: as format `name` (None: the row's own) finds it, else a prompt field.

    For sets of prompts to leave out of a corpus: such a row may have no completions, or useless ones.
    """

    def adapt(value: Mapping[str, Any], options: FormatOptions) -> Example:
        try:
            return Example(FORMATS[name or detect(value)](value, options).prompt, [], [])
        except (UserError, RowError):
            return Example(prompt_of(field(value, "prompt", "question", "instruction"), "prompt"), [], [])

    return adapt
