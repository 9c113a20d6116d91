"""How objects from other packages are found by name, carried to the workers, and named by recipes."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from prefsel.errors import UserError
from prefsel.plugins.contracts import CONTRACTS, SINGULAR, check, kind_of


@dataclass(frozen=True)
class Plugin:
    """An object from elsewhere."""

    found: Any
    origin: str
    """Where it comes from, for people: its module, or its entry point and package."""
    module: str
    """The module that named it."""


_REGISTERED: dict[str, dict[str, Plugin]] = {kind: {} for kind in CONTRACTS}
_LOADED: dict[str, None] = {}
_FOUND: dict[tuple[str, str], Plugin] = {}
"""Entry points that were imported in this process."""


def register_metric(metric: Any) -> None:
    """Make a metric known under its own name: to `score_table`, to configurations, and to workers that load its module.

    Args:
        metric: A `prefsel.metrics.Metric`, or what satisfies `MetricContract`.

    Raises:
        UserError: It does not satisfy the contract, or another metric has its name.
    """
    _register("metrics", getattr(metric, "name", "?"), metric)


def register_loss(name: str, loss: Any) -> None:
    """Make a preference loss known, by the name that a training gives as its `loss`.

    Args:
        name: What configurations call it.
        loss: A `prefsel.config.losses.Loss`, or what satisfies `LossContract`.

    Raises:
        UserError: It does not satisfy the contract, or another loss has its name.
    """
    _register("losses", name, loss)


def register_format(name: str, adapter: Any) -> None:
    """Make a format known, by the name that a source gives as its `format`. It is never chosen by `auto`.

    Args:
        name: What configurations call it.
        adapter: A function (row, options) to an `Example`, as `FormatContract` says.

    Raises:
        UserError: It cannot be called so, or another format has its name.
    """
    _register("formats", name, adapter)


def register_scorer(scorer: Any) -> None:
    """Make a kind of scorer known, by the `kind` of its record.

    Args:
        scorer: A `ScorerKind`, or what satisfies `ScorerContract`.

    Raises:
        UserError: It does not satisfy the contract, or another scorer has its name.
    """
    _register("scorers", kind_of(getattr(scorer, "record", None)) or "?", scorer)


def _register(kind: str, name: str, found: Any) -> None:
    module = sys._getframe(2).f_globals.get("__name__", "?")  # who called `register_…`
    plugin = Plugin(found, f"registered by {module}", module)
    check(kind, name, found, plugin.origin)
    known = _REGISTERED[kind].get(name)
    # A module that is imported anew, by a reload or in a notebook, replaces what it said before.
    if known is not None and known.module != module:
        raise UserError(f"{SINGULAR[kind]} {name!r}: it is already {known.origin}; rename one")
    _REGISTERED[kind][name] = plugin


def load(modules: Iterable[str]) -> None:
    """Import the modules that a configuration lists under `plugins`; what is imported already stays as it is.

    Raises:
        UserError: One cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError, ValueError) as error:
            raise UserError(
                f"plugins: cannot import {module!r}: {error}; it must be importable here and on every worker: install "
                "it, or set PYTHONPATH (for a Ray job, `py_modules` or `working_dir` of its runtime environment)"
            ) from error
        _LOADED[module] = None


def loaded() -> tuple[str, ...]:
    """The modules that `load` has imported in this process, for others to load before they work."""
    return tuple(_LOADED)


def known_plugins() -> dict[tuple[str, str], Plugin]:
    """What has come from elsewhere into this process, by kind and name."""
    registered = {(kind, name): one for kind, named in _REGISTERED.items() for name, one in named.items()}
    return _FOUND | registered


# -------------------------------------------------------------------------------------------------------- finding


def names(kind: str) -> list[str]:
    """What is known from elsewhere, by name, without importing any of it."""
    return list(dict.fromkeys([*_REGISTERED[kind], *_entry_points(kind, tuple(sys.path))]))


def find(kind: str, name: str) -> Plugin | None:
    """An object from elsewhere, imported and checked; None where there is none of this name.

    Raises:
        UserError: Its package cannot be imported, it does not satisfy its contract, or two have this name.
    """
    require_one(kind, name)
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name]
    entries = _entry_points(kind, tuple(sys.path)).get(name, ())
    return _loaded_entry(kind, entries[0]) if entries else None


def require_one(kind: str, name: str, *, is_builtin: bool = False) -> None:
    """Refuse a name that several objects have.

    Raises:
        UserError: Says where each of them comes from.
    """
    registered = [_REGISTERED[kind][name].origin] if name in _REGISTERED[kind] else []
    entries = map(_origin, _entry_points(kind, tuple(sys.path)).get(name, ()))
    origins = [*(["built in"] if is_builtin else []), *registered, *entries]
    if len(origins) > 1:
        raise UserError(f"{SINGULAR[kind]} {name!r}: several things have this name: {'; '.join(origins)}; rename one")


@functools.cache
def _entry_points(kind: str, path: tuple[str, ...]) -> dict[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """Entry points by name; `path` is what they were looked for on."""
    found: dict[str, dict[Any, importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=f"prefsel.{kind}"):
        # A package that stands on the path twice is one package.
        found.setdefault(entry.name, {})[entry.value, entry.dist.name if entry.dist else ""] = entry
    return {name: tuple(many.values()) for name, many in found.items()}


@functools.cache
def _loaded_entry(kind: str, entry: importlib.metadata.EntryPoint) -> Plugin:
    origin = _origin(entry)
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{SINGULAR[kind]} {entry.name!r} ({origin}): cannot be imported: {error}") from error
    check(kind, entry.name, found, origin)
    plugin = _FOUND[kind, entry.name] = Plugin(found, origin, entry.module)
    return plugin


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return f"entry point {entry.value}{package}"


Part = TypeVar("Part")


class Registry(Mapping[str, Part], Generic[Part]):
    """The built-in objects of a kind and those from elsewhere, by name."""

    def __init__(self, kind: str, builtin: Mapping[str, Part]) -> None:
        """Begin with the built-in ones.

        Args:
            kind: A key of `CONTRACTS`.
            builtin: Name → object.
        """
        self._kind, self._builtin = kind, dict(builtin)

    def __getitem__(self, name: str) -> Part:
        if name in self._builtin:
            require_one(self._kind, name, is_builtin=True)
            return self._builtin[name]
        plugin = find(self._kind, name)
        if plugin is None:
            raise KeyError(name)
        return plugin.found

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in names(self._kind)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._builtin, *names(self._kind)]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def builtin(self) -> Mapping[str, Part]:
        """Those of this package alone."""
        return self._builtin


# ----------------------------------------------------------------------------------------------------------- recipes


def code_of(kind: str, name: str) -> dict[str, str]:
    """What the recipe of something made by an object from elsewhere says about its code; nothing for a built-in one.

    Returns:
        `{"code": hash}`, over the source files of the module that named it and of its functions; those of this package,
        whose outputs have versions, are left out. Files that these import are not read.

    Raises:
        UserError: Its code lies in no file.
    """
    plugin = find(kind, name)
    if plugin is None:
        return {}
    what = f"{SINGULAR[kind]} {name!r} ({plugin.origin})"
    return {"code": code_hash([sys.modules.get(plugin.module), *code_parts(plugin.found)], what)}


def code_hash(parts: Iterable[Any], what: str) -> str:
    """The hash over the source files of some modules, functions and classes; those of this package are left out.

    Args:
        parts: See `code_parts`.
        what: What an error calls them.

    Raises:
        UserError: Their code lies in no file.
    """
    files = {file for one in parts if (file := _source_file(one))}
    if not files:
        raise UserError(f"{what}: its code lies in no file, and a recipe must name it; put it into a module")
    hashes = sorted(hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files)
    return hashlib.blake2b(" ".join(hashes).encode(), digest_size=16).hexdigest()


def code_parts(found: Any) -> Iterator[Any]:
    """The functions and classes that an object consists of."""
    if isinstance(found, functools.partial):
        yield from code_parts(found.func)
    elif inspect.isroutine(found) or isinstance(found, type):
        yield found
    elif is_dataclass(found):
        yield type(found)
        for part in fields(found):
            yield from code_parts(getattr(found, part.name))
    elif callable(found) or not isinstance(found, str | int | float | Iterable):
        yield type(found)


def _source_file(found: Any) -> Path | None:
    """The file of a module, function or class outside this package."""
    module = str(getattr(found, "__module__", None) or getattr(found, "__name__", "builtins"))
    if module.partition(".")[0] in ("prefsel", "builtins"):
        return None
    try:
        file = inspect.getsourcefile(inspect.unwrap(found) if callable(found) else found)
    except TypeError:  # a module of a notebook, or what was compiled
        return None
    return Path(file) if file and Path(file).is_file() else None
