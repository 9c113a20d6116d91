"""Which of several responses is better: by what a field says of two, or by their scores or ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefsel.config import FieldMap, FormatOptions, Verdict
from prefsel.ingest.example import Completion, Margin, Preference, difference, mine
from prefsel.ingest.fields import parsed_number, required
from prefsel.ingest.row_error import RowError, wrong_type


def by_rating(kept: list[Completion], fields: FieldMap, options: FormatOptions) -> tuple[list[Preference], int]:
    """The preferences among rated responses and how many ties: the best over the worst, or all with `pairs: all`."""
    name, sign = ("score", 1.0) if fields.scores is not None else ("rank", -1.0)
    rated = {k: sign * one.ratings[name] for k, one in enumerate(kept) if name in one.ratings}
    if options.pairs == "all":
        margin: Margin = lambda a, b: difference(rated[a], rated[b]) if a in rated and b in rated else None  # noqa: E731
        return mine(len(kept), None, margin)
    if len(rated) < 2:
        return [], 0
    best, worst = max(rated, key=rated.__getitem__), min(rated, key=rated.__getitem__)
    if rated[best] == rated[worst]:
        return [], 1
    return [Preference(best, worst, None, difference(rated[best], rated[worst]))], 0


def verdict_of(value: Mapping[str, Any], one: Verdict, index: list[int]) -> Preference | None:
    """The preference that a field tells; None of a tie."""
    if len(index) != 2:
        raise RowError("wrong_type", f"{one.field}: got {len(index)} responses; a preference is between two")
    found = required(value, one.field)
    if one.sign is not None:
        parsed = parsed_number(found)
        if _is_among(found, one.tie):
            return None
        if parsed is None:
            raise wrong_type(one.field, found, "a number")
        if one.range is not None and not one.range[0] <= parsed <= one.range[1]:
            raise RowError("wrong_type", f"{one.field}: got {found}; valid: {one.range[0]:g} to {one.range[1]:g}")
        strength = parsed - one.zero
        winner = int((strength > 0) == (one.sign == "second"))
        return None if strength == 0 else Preference(index[winner], index[1 - winner], one.aspect, abs(strength))
    for winner, values in enumerate((one.first, one.second)):
        if _is_among(found, values):
            return Preference(index[winner], index[1 - winner], one.aspect, None)
    if _is_among(found, one.tie):
        return None
    valid = ", ".join(repr(each) for each in (*one.first, *one.second, *one.tie))
    raise RowError("wrong_type", f"{one.field}: got {found!r}; valid: {valid}")


def _is_among(found: object, values: Iterable[Any]) -> bool:
    """Whether a value, or the number that it is the text of, is one of some; true and false are not 1 and 0."""
    for one in values:
        if isinstance(one, bool) or isinstance(found, bool):
            if found is one or (isinstance(found, str) and found.strip().lower() == str(one).lower()):
                return True
        elif isinstance(one, str):
            if isinstance(found, str) and found.strip().lower() == one.lower():
                return True
        elif parsed_number(found) == float(one):
            return True
    return False
