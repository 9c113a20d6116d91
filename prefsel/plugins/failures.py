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
    plugins = known_plugins()
    by_code = {code: key for key, plugin in plugins.items() for code in _codes(plugin)}
    packages = {_package(plugin.module) for plugin in plugins.values()} - {"prefsel"}
    frames = [
        (frame.f_code, _package(str(frame.f_globals.get("__name__"))), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    first = next((n for n, (code, package, _) in enumerate(frames) if code in by_code or package in packages), None)
    if first is None:
        return None
    package = frames[first][1]
    own = [(code, line) for code, whose, line in frames[first:] if whose == package][-MAX_FRAMES:]
    shown = [
        f"\n  {code.co_filename}, line {line}, in {code.co_name}: {linecache.getline(code.co_filename, line).strip()}"
        for code, line in own
    ]
    # A function that a plugin gives later, as a metric its rounds, is no part of it: there its package alone tells.
    keys = [by_code[code] for code, _, _ in frames[first:] if code in by_code]
    keys = keys[:1] or [key for key, plugin in plugins.items() if _package(plugin.module) == package]
    what = _named(*keys[0], plugins[keys[0]]) if len(keys) == 1 else f"plugin {package!r}"
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return PrefselError(f"{what}: {type(error).__name__}: {error}{notes}{''.join(shown)}")


def _named(kind: str, name: str, plugin: Plugin) -> str:
    return f"{SINGULAR[kind]} {name!r} ({plugin.origin})"


def _codes(plugin: Plugin) -> Iterator[CodeType]:
    """The code objects of a plugin's functions and methods."""
    for part in code_parts(plugin.found):
        if _package(str(getattr(part, "__module__", ""))) == "prefsel":
            continue  # what its record has by default
        for one in vars(part).values() if isinstance(part, type) else [part]:
            code = getattr(inspect.unwrap(one) if callable(one) else one, "__code__", None)
            if isinstance(code, CodeType):
                yield code


def _package(module: str) -> str:
    return module.partition(".")[0]
