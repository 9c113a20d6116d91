"""Text on its way to a person: without secrets, without control characters, and a message of bounded length.

anything that is printed, logged or stored beside a run ─▶ redact
anything that a terminal shows                          ─▶ printable
the one message that a failed command ends with         ─▶ message
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

MAX_MESSAGE = 600
"""Characters of an error message; of a longer one the start and the end are shown."""
_KEPT_AT_THE_END = 180
_MIN_SECRET = 8
"""A variable of the environment that is shorter is no secret worth the mess of taking it out of every text."""

_IN_URI = re.compile(r"\b(\w+://)(?:[^\s'\"/:]{0,200}:[^\s'\"]{0,1500}|[^\s'\"/]{0,1500})@")
"""Credentials before a host: after a colon up to the last @, because secrets hold slashes; the @ of an artifact's name
stands after a slash. Every repetition has an end, so that a text made for it costs no more than its length."""
_IN_QUERY = re.compile(
    r"((?:secret|token|passwd|password|access_?key|api_?key|signature|credential|authorization|\bsig)[\w-]{0,40}=)[^&\s'\"]+",
    re.IGNORECASE,
)
_IN_TABLE = re.compile(
    r"((?<![A-Za-z0-9])[\"']?(?:\w{1,30}[_-])?(?:secret|passwd|password|access_?key|api_?key|private_?key|secret_?key"
    r"|(?:access|auth|session|bearer|hub|hf|security)_?token|authorization)[\"']?[ ]?:[ ]?)"
    r"(?!null\b|[\"']?\*\*\*)[^\s,}\]]+",
    re.IGNORECASE,
)
"""`password: …`, `"api_key": "…"`: of names that are only ever those of secrets (`batch_tokens` is none)."""
_IN_HEADER = re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}")
_BY_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{12,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"
)
"""Tokens of hubs and of clouds, known by how they begin."""
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_ID)?$")
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""What moves a terminal's cursor, changes its title, turns text around or cannot be written; not tab and newline."""


def redact(text: str) -> str:
    """`text` without secrets: in URIs (`s3://KEY:SECRET@bucket`), in query fields, under names of secrets, of known
    shapes (`hf_…`), and whatever the environment's own secrets are."""
    for value in _environment_secrets():
        text = text.replace(value, "***")
    text = _IN_URI.sub(r"\1***@", text)
    text = _IN_HEADER.sub(r"\1***", _IN_QUERY.sub(r"\1***", text))
    return _BY_SHAPE.sub("***", _IN_TABLE.sub(r"\1***", text))


def redacted(value: Any) -> Any:
    """Plain values (tables, lists, texts) with `redact` in every text, and nothing under a key that names a secret."""
    if isinstance(value, Mapping):
        return {key: "***" if _names_secret(key, one) else redacted(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def _names_secret(key: object, value: object) -> bool:
    return isinstance(value, str) and isinstance(key, str) and _IN_TABLE.match(f"{key}: x") is not None


def _environment_secrets() -> list[str]:
    """Values of variables that are called like secrets, the longest first, so that none leaves a part of another."""
    named = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name.upper())}
    return sorted((value for value in named if len(value) >= _MIN_SECRET), key=len, reverse=True)


def printable(text: str) -> str:
    """`text` with every character that acts on a terminal, or cannot be written to it, as its escape (`\\x1b`).

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def shown(text: str) -> str:
    """What a terminal may show of any text: without secrets, printable."""
    return printable(redact(text))


def message(text: str, limit: int = MAX_MESSAGE) -> str:
    """An error as it is shown: `shown`, and of a long one the start and the end, with how much is left out between.

    Args:
        text: Any length; what lies far from both ends is dropped before anything looks at it.
        limit: Characters of the result at most.
    """
    whole = len(text)
    if whole > 64 * limit:  # a secret at the seam would be cut in two, so the pieces looked at are far larger
        text = f"{text[: 32 * limit]}{text[-32 * limit :]}"
    text = shown(text).strip()
    if len(text) <= limit and whole <= 64 * limit:
        return text
    between = f" … ({whole:,} characters, cut here) … "
    head = limit - len(between) - _KEPT_AT_THE_END
    return f"{text[:head].rstrip()}{between}{text[-_KEPT_AT_THE_END:].lstrip()}"


def say(text: str) -> None:
    """Print a line for a person: names, paths and texts in it come from data and act on no terminal."""
    print(shown(text))


def show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: print the traceback of a fault that nobody foresaw; it may quote data and secrets."""
    sys.stderr.write(shown("".join(traceback.format_exception(kind, error, trace))))
