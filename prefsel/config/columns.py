"""Names of columns: which completion column a flat one is read from, and which kinds of scorer make it."""

from __future__ import annotations

import re

from prefsel.config.scorers import BUILT_IN_SCORERS
from prefsel.plugins.contracts import kind_of

SUFFIXES = ("_chosen", "_rejected", "_max", "_min", "_mean", "_var")
"""What a flat column adds to the name of a completion column."""


def completion_column(flat_name: str) -> str:
    """The completion column that a flat column is read from."""
    return next((flat_name[: -len(suffix)] for suffix in SUFFIXES if flat_name.endswith(suffix)), flat_name)


def maker_of(name: str) -> str | None:
    """Who makes a column, in words for errors: the kinds of this package whose `makes` has it; None: none of them."""
    column = completion_column(name)
    makers = []
    for record in BUILT_IN_SCORERS:
        settings = [setting for pattern, setting in record.makes.items() if re.fullmatch(pattern, column)]
        if settings:
            makers.append(f"{kind_of(record)}{settings[0]}")
    return f"a scorer of kind {', or '.join(makers)}" if makers else None
