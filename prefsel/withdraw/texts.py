"""Many texts, looked for in many others at once: what is taken back, in rows that were never used."""

from __future__ import annotations

from collections.abc import Collection

SHORT_TEXT = 24
"""Characters; a shorter text inside another one may be a coincidence."""


class Texts:
    """Texts by their first characters, so that looking for them costs the length of a row and not their number."""

    def __init__(self, texts: Collection[str]) -> None:
        """Keep what is not empty."""
        self.whole = frozenset(texts) - {""}
        self._by_begin: dict[str, list[str]] = {}
        for text in self.whole:
            self._by_begin.setdefault(text[:SHORT_TEXT], []).append(text)
        self._short_lengths = sorted({len(begin) for begin in self._by_begin} - {SHORT_TEXT})

    def within(self, text: str, *, short: bool) -> bool:
        """Whether one of them stands somewhere in `text`; one shorter than `SHORT_TEXT` counts only where `short`."""
        for length in (*(self._short_lengths if short else ()), SHORT_TEXT):
            for place in range(len(text) - length + 1):
                found = self._by_begin.get(text[place : place + length], ())
                if any(text.startswith(one, place) for one in found):
                    return True
        return False
