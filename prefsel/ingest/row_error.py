"""A row that its format does not allow, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_FIELDS_NAMED = 20


class RowError(Exception):
    """A row that its format does not allow; `reason` is a key of `reasons.QUARANTINE`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def wrong_type(name: str, got: object, valid: str) -> RowError:
    """The error for a field that holds another type than it should."""
    return RowError("wrong_type", f"{name}: got {type(got).__name__}; valid: {valid}")


def missing(value: Mapping[str, Any], what: str) -> RowError:
    """The error for a field that a row lacks; names those that it has."""
    present = ", ".join(list(value)[:_MAX_FIELDS_NAMED]) or "nothing"
    return RowError("missing_field", f"{what}: absent or null; the row has {present}")
