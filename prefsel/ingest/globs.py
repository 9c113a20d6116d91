"""Globs: `*`, `?`, `[abc]` within a name and `**` across folders, matched in time that no pattern makes explode."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable

from prefsel.errors import UserError

WILDCARD = re.compile(r"(\*{2,}|\*|\?|\[[^\]/]+\])")
"""What makes a path a glob."""
MAX_ACROSS = 4
"""How often `**` may stand beside other characters of one name."""
_ANY_FOLDERS = None
"""Stands for a part `**`: any number of folders, none too."""

Step = re.Pattern[str] | None


def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """What says whether a path matches.

    A pattern is matched name by name, and within a name a star takes the shortest text that what follows it allows and
    is not asked again. So nothing is tried twice, while one regular expression for `*a*a*a*a*a*b` tries every way to
    share a name out among its stars.

    Raises:
        UserError: A range in brackets runs backwards, or `**` stands too often within one name.
    """
    *above, name = pattern.split("/")
    parts = [_ways(part, is_last=False) for part in above] + [_ways(name, is_last=True)]

    def matches(path: str) -> bool:
        names = path.split("/")
        ends = {0}  # how many names what came before may have taken
        for ways in parts:
            ends = set().union(*(_after(steps, ends, names) for steps in ways))
        return len(names) in ends

    return matches


def _after(steps: Iterable[Step], ends: set[int], names: list[str]) -> set[int]:
    for step in steps:
        if step is _ANY_FOLDERS:
            ends = set(range(min(ends), len(names))) if ends else ends
        else:
            ends = {end + 1 for end in ends if end < len(names) and step.fullmatch(names[end])}
    return ends


def _ways(part: str, *, is_last: bool) -> list[list[Step]]:
    """What a part of a pattern may stand for: `a**b` for `a*b`, and for `a*`, any folders, `*b`."""
    if re.fullmatch(r"\*\*+", part) and not is_last:
        return [[_ANY_FOLDERS]]
    pieces = re.split(r"\*\*+", part)
    if len(pieces) - 1 > MAX_ACROSS:
        raise UserError(f"source: the glob {part[:80]!r}: ** stands in it more than {MAX_ACROSS} times; valid: **/")
    found: list[list[Step]] = []
    for joints in itertools.product(("*", "*\0*"), repeat=len(pieces) - 1):
        text = "".join(itertools.chain(*zip(pieces, [*joints, ""])))
        names: list[list[Step]] = [[_expression(name)] for name in text.split("\0")]
        found.append([step for name in names for step in (_ANY_FOLDERS, *name)][1:])
    return found


def _expression(part: str) -> re.Pattern[str]:
    """One name of a pattern. `(?>.*?x)` is the shortest text up to an x, for good: an atomic group.

    What follows the last star must end the name, so that one star alone is tried at every place.
    """
    head, *rest = ["".join(map(_fixed, WILDCARD.split(piece))) for piece in re.split(r"\*+", _hidden(part))]
    between = "".join(f"(?>.*?{text})" for text in rest[:-1] if text)
    try:
        return re.compile(head + between + (f".*{rest[-1]}" if rest else ""), re.DOTALL)
    except re.error as error:
        raise UserError(f"source: the glob {part[:80]!r}: {error}; valid: ranges such as [a-z]") from error


def _hidden(part: str) -> str:
    """A part whose stars within brackets, which stand for themselves, are written otherwise."""
    return re.sub(r"\[[^\]/]+\]", lambda match: match[0].replace("*", "\1"), part)


def _fixed(token: str) -> str:
    """Text, or one character, as a regular expression."""
    token = token.replace("\1", "*")
    if token == "?":  # nosec B105 # a wildcard
        return "."
    if not re.fullmatch(r"\[[!^]?[^\]/]+\]", token, re.DOTALL):
        return re.escape(token)
    is_negated = token[1] in "!^" and len(token) > 3
    inside = token[2:-1] if is_negated else token[1:-1]
    characters = re.sub(r"[^\w-]", lambda match: re.escape(match[0]), inside)
    return f"[{'^' if is_negated else ''}{characters}]"
