"""What code from elsewhere raised, as one message: which plugin, which error, and the lines of its own behind it."""

from __future__ import annotations

import functools
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from prefsel.errors import PrefselError
from prefsel.plugins.contracts import SINGULAR
from prefsel.plugins.registry import Plugin, code_parts, known_plugins, load, loaded

MAX_FRAMES = 5


def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for another process: it first loads the modules that were loaded here, and names a plugin that fails.

    An exception leaves its traceback behind when it travels, so whose it was must be told where it was raised.
    """
    modules = loaded()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        load(modules)
        with naming_plugins():
            return function(*args, **kwargs)

    return call


@contextmanager
def naming_plugins() -> Iterator[None]:
    """Raise what a plugin raised in the block as `failure_of_plugin`; everything else as it is."""
    try:
        yield
    except PrefselError:
        raise
    except Exception as error:
        told = failure_of_plugin(error)
        if told is None:
            raise
        raise told from error


def failure_of_plugin(error: BaseException) -> PrefselError | None:
    """An error that passed through code of a plugin, as a message with the lines of that code; None: it did not.

    What was noted on the error (`add_note`), such as the row of a file, is part of the message.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    by_code = {code: key for key, plugin in known_plugins().items() for code in _codes(plugin)}
    first = next((number for number, (frame, _) in enumerate(frames) if frame.f_code in by_code), None)
    if first is None:
        return None
    kind, name = key = by_code[frames[first][0].f_code]
    package = _package(frames[first][0].f_globals)
    own = [(frame.f_code, line) for frame, line in frames[first:] if _package(frame.f_globals) == package]
    shown = [
        f"\n  {code.co_filename}, line {line}, in {code.co_name}: {linecache.getline(code.co_filename, line).strip()}"
        for code, line in own[-MAX_FRAMES:]
    ]
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    what = f"{SINGULAR[kind]} {name!r} ({known_plugins()[key].origin})"
    return PrefselError(f"{what}: {type(error).__name__}: {error}{notes}{''.join(shown)}")


def _codes(plugin: Plugin) -> Iterator[CodeType]:
    """The code objects of a plugin's functions and methods."""
    for part in code_parts(plugin.found):
        functions = vars(part).values() if isinstance(part, type) else [part]
        for one in functions:
            code = getattr(inspect.unwrap(one) if callable(one) else one, "__code__", None)
            if isinstance(code, CodeType):
                yield code


def _package(names: dict[str, Any]) -> str:
    """The top-level package of a module, by its globals."""
    return str(names.get("__name__", "")).partition(".")[0]
