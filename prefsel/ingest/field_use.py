"""Which fields of a row an adapter looks at: known by watching it, so that what nobody reads can be named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.example import Adapter, Example
from prefsel.ingest.fields import is_empty, top_field
from prefsel.ingest.ratings import rating_name
from prefsel.ingest.row_error import RowError

USED, KEPT, IGNORED = "used", "kept", "ignored"
"""Read for text or label; a number kept beside a completion, or a field beside a pair; looked at by nobody."""


class Asked(dict[str, Any]):
    """A row that remembers which of its fields were asked for by name, in itself and in the rows of its lists."""

    def __init__(self, value: Mapping[str, Any], asked: set[str], prefix: str = "") -> None:
        """Wrap a row; `asked` collects the names, `list[].name` for those inside a list."""
        super().__init__({key: self._inside(found, asked, f"{prefix}{key}[].") for key, found in value.items()})
        self._asked, self._prefix = asked, prefix

    @staticmethod
    def _inside(found: Any, asked: set[str], prefix: str) -> Any:
        if not isinstance(found, list):
            return found
        return [Asked(one, asked, prefix) if isinstance(one, dict) else one for one in found]

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's."""
        self._asked.add(f"{self._prefix}{key}")
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        """As a dictionary's."""
        self._asked.add(f"{self._prefix}{key}")
        return super().__getitem__(key)


class FieldUse:
    """What becomes of the fields of many rows; an adapter is watched once for every set of filled fields."""

    def __init__(self, adapt: Adapter, options: FormatOptions, carry: Sequence[str] = ()) -> None:
        """Begin to count; `carry` are the paths that go along with pairs."""
        self._adapt, self._options = adapt, options
        self._carried = {top_field(path) for path in carry} | set(carry)
        self._rows: Counter[frozenset[str]] = Counter()
        self._uses: dict[frozenset[str], dict[str, str]] = {}

    def count(self, value: Mapping[str, Any]) -> None:
        """Add a row that was accepted."""
        filled = frozenset(key for key, found in value.items() if found is not None and found != "")
        self._rows[filled] += 1
        if filled not in self._uses:
            self._uses[filled] = self._watch(value)

    def _watch(self, value: Mapping[str, Any]) -> dict[str, str]:
        asked: set[str] = set()
        try:
            found = self._adapt(Asked(value, asked), self._options)
        except RowError:
            return {}
        examples = [found] if isinstance(found, Example) else found
        ratings = {name for one in examples for completion in one.completions for name in completion.ratings}
        uses = {}
        for key, inside in value.items():
            if not is_empty(inside):
                (_, named) = rating_name(key) or (0, key)
                is_rating = named in ratings and isinstance(inside, int | float | str | Decimal | dict)
                is_kept = is_rating or (key in self._carried and key not in asked)
                uses[key] = KEPT if is_kept else USED if key in asked else IGNORED
        return uses

    def totals(self) -> dict[str, dict[str, int]]:
        """Rows in which each field was used, kept or ignored."""
        found: dict[str, dict[str, int]] = {}
        for filled, count in self._rows.items():
            for key, use in self._uses[filled].items():
                uses = found.setdefault(key, {})
                uses[use] = uses.get(use, 0) + count
        return dict(sorted(found.items()))
