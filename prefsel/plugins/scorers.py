"""Kinds of scorers from other packages, where a configuration's `scorers` are checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel

from prefsel.plugins.registry import find, names, require_one

BUILT_IN, ELSEWHERE = "built in", "plugin"
"""Tags of the two halves of the union."""


def scorer_origin(builtin: Collection[str]) -> Callable[[Any], str]:
    """What says to which half of the union an entry of `scorers`, a table or a record, belongs.

    Args:
        builtin: The kinds of this package.

    Returns:
        A function of the entry. It raises a `UserError` where two things have the name of its kind.
    """

    def origin(value: Any) -> str:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        if not isinstance(kind, str):
            return BUILT_IN
        require_one("scorers", kind, is_builtin=kind in builtin)
        return ELSEWHERE if kind in names("scorers") else BUILT_IN

    return origin


def plugin_scorer(value: Any) -> Any:
    """An entry of a kind from elsewhere as that kind's own record.

    Raises:
        UserError: The kind cannot be imported or does not satisfy its contract.
        ValidationError: The entry does not fit its record; pydantic puts where the entry stands before each problem.
    """
    if isinstance(value, BaseModel):
        return value
    plugin = find("scorers", value["kind"])
    assert plugin is not None, "`scorer_origin` sends only kinds that there are"
    record: type[BaseModel] = plugin.found.record
    return record.model_validate(value)
