"""YAML as this package reads it: plain tables, lists and scalars, of bounded size, each key once.

A few hundred bytes of aliases of aliases stand for billions of values, which PyYAML builds. So the events of a text are
counted first, an alias as often as it stands for something, and nothing is built of a text that goes over a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from prefsel.errors import UserError

MAX_BYTES = 1 << 20
"""Of a text; a configuration that lists 10 000 files is about as long."""
MAX_VALUES = 100_000
"""Tables, lists, keys and scalars, aliases written out."""
MAX_DEPTH = 64
"""Tables and lists inside each other."""
MAX_DIGITS = 100
MAX_BITS = 64
"""Of a whole number: no key takes a larger one."""


_SURROGATE = re.compile("[\ud800-\udfff]")


def read_yaml(text: str | bytes, what: str) -> Any:
    """What a YAML text holds.

    Args:
        text: One document; bytes are UTF-8.
        what: How errors call it.

    Raises:
        UserError: Not YAML; a key that stands twice in one table; or more than the limits above.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{what}: it is {len(text):,} bytes long; valid: a YAML text of at most {MAX_BYTES:,}")
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        _check_events(plain, what)
        value = yaml.load(plain, Loader=_Loader)  # nosec B506 # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not YAML: {error}") from error
    # What PyYAML raises about a scalar that looks like a date or a number, or is tagged as one, and is none.
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{what} is not YAML: {type(error).__name__}: {error}") from error
    _check_scalars(value, what)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only."""

    def construct_yaml_int(self, node: Any) -> int:
        """As PyYAML's, of a text that a person can read: `1:1:1:…`, to base 60, takes minutes for a megabyte."""
        if len(str(node.value)) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(node.value):,} digits")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


@dataclass
class _Open:
    """A table or a list whose end was not seen yet."""

    is_table: bool
    anchor: str | None
    values: int = 1
    """It and all inside it, aliases written out."""
    children: int = 0
    keys: set[str] = field(default_factory=set)


def _check_events(text: str, what: str) -> None:
    """Refuse a text that would become too much, is its own part, or has a key twice."""
    around: list[_Open] = []
    sizes: dict[str, int] = {}
    total = 0
    for event in _events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            _note_key(around, None, what)
            around.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))
            if len(around) > MAX_DEPTH:
                raise UserError(f"{what}: tables and lists lie more than {MAX_DEPTH} deep in each other")
            size = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = around.pop()
            size = closed.values
            if closed.anchor:
                sizes[closed.anchor] = size
            if around:
                around[-1].values += size
            continue
        elif isinstance(event, yaml.AliasEvent):
            if any(one.anchor == event.anchor for one in around):
                raise UserError(f"{what}: *{event.anchor} stands inside of what it means, so it would have no end")
            _note_key(around, None, what)
            size = sizes.get(str(event.anchor), 1)  # of an unknown one PyYAML says so
        else:
            _note_key(around, event.value, what)
            size = 1
            if event.anchor:
                sizes[event.anchor] = 1
        total += max(size, 1)
        if around and size:
            around[-1].values += size
        if total > MAX_VALUES:
            raise UserError(f"{what}: with its aliases written out it holds more than {MAX_VALUES:,} values")


def _events(text: str) -> Iterator[Any]:
    """Starts and ends of tables and lists, scalars and aliases."""
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
                yield event
    except RecursionError as error:  # PyYAML's own parser goes deeper with every level
        raise UserError("YAML: tables and lists lie too deep in each other") from error


def _note_key(around: list[_Open], scalar: str | None, what: str) -> None:
    """Count a value of the table or list that is open; where it is a key, it must be a new one."""
    if not around:
        return
    inmost = around[-1]
    is_key = inmost.is_table and inmost.children % 2 == 0
    inmost.children += 1
    if is_key and scalar is not None:
        if scalar in inmost.keys:
            raise UserError(f"{what}: the key {scalar[:80]!r} stands twice in one table; valid: once")
        inmost.keys.add(scalar)


def _check_scalars(value: Any, what: str) -> None:
    """Refuse whole numbers that no machine word holds, and texts that nothing can write."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one
        elif isinstance(one, int) and one.bit_length() > MAX_BITS:
            raise UserError(f"{what}: a whole number of {one.bit_length():,} bits; valid: at most {MAX_BITS}")
        elif isinstance(one, str) and not one.isascii() and _SURROGATE.search(one):
            raise UserError(f"{what}: the text {one[:40]!r} holds half of a surrogate pair")
