"""Reading a configuration: YAML file, `--set` overrides, and one readable message when something is wrong."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prefsel.config import Config
from prefsel.config.models import DEFAULT_MODEL
from prefsel.config.problems import SHOWN_CHARACTERS, problem
from prefsel.config.training import DEFAULT_TRAINING
from prefsel.config.yaml_text import read_yaml
from prefsel.errors import UserError
from prefsel.plugins.registry import find as find_plugin
from prefsel.plugins.registry import load as load_plugins
from prefsel.plugins.registry import names as plugin_names
from prefsel.plugins.scorers import BUILT_IN, ELSEWHERE

DEFAULT_KINDS = {"models": DEFAULT_MODEL, "train": DEFAULT_TRAINING}
"""What entries without a `kind` are."""


_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path`, with `dotted.key=value` overrides applied.

    A key `base: other.yaml` takes that file, beside this one, as the ground that this file's keys are laid over.
    Relative local paths inside the file stay relative to the working directory; `~/` is the home of who runs it.

    Raises:
        UserError: no such file, not YAML, an unknown key or an invalid value; names field, value and valid ones.
    """
    table = read_table(Path(path).expanduser())
    for override in overrides:
        apply_override(table, override)
    return parse_config(_with_home(table))


def _with_home(value: Any) -> Any:
    """`value`, a table as read from YAML, with the home directory for `~/` at the beginning of every text in it."""
    if isinstance(value, dict):
        return {key: _with_home(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_with_home(inside) for inside in value]
    if isinstance(value, str) and value.removeprefix("datasets:").startswith("~/"):
        kind = "datasets:" if value.startswith("datasets:") else ""
        return kind + os.path.expanduser(value.removeprefix(kind))
    return value


def read_table(file: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The table in a YAML file, laid over that of its `base`.

    Raises:
        UserError: no such file, not a YAML table, or a base that leads back to itself.
    """
    if not file.is_file():
        raise UserError(f"config: no such file: {file}")
    if file.resolve() in below:
        raise UserError(f"config: base: {file} is laid over itself")
    try:
        table = read_yaml(file.read_bytes(), f"config: {file}")
    except OSError as error:
        raise UserError(f"config: cannot read {file}: {error.strerror}") from error
    if not isinstance(table, dict):
        raise UserError(f"config: {file} must hold a table of keys, got {type(table).__name__}")
    base = table.pop("base", None)
    if base is None:
        return table
    return _laid_over(read_table(file.parent / Path(str(base)).expanduser(), (*below, file.resolve())), table)


def _laid_over(base: Any, over: Any) -> Any:
    """`over` on top of `base`: tables key by key, everything else replaced as a whole, lists too."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    joined = {key: _laid_over(base[key], over[key]) if key in over else base[key] for key in base}
    return joined | {key: value for key, value in over.items() if key not in base}


def parse_config(table: dict[str, Any]) -> Config:
    """`table` as a `Config`.

    Raises:
        UserError: with one line per problem, or a module under `plugins` cannot be imported.
    """
    modules = table.get("plugins")
    # Before anything is checked: the names of what they register are valid values.
    is_names = isinstance(modules, list) and all(isinstance(one, str) and _MODULE.fullmatch(one) for one in modules)
    load_plugins(modules if isinstance(modules, list) and is_names else [])
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        problems = [_problem(details, table) for details in error.errors()]
        raise UserError("configuration: " + "\n  ".join(problems)) from None


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in `table` in place; a list element is named by its index or by its `name`.

    The value is read as YAML: `train.0.lr=1e-4`, `sources.uf.paths=[a.jsonl, b.jsonl]`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set: got {override!r}; valid: dotted.key=value")
    *parents, last = key.split(".")
    node: Any = table
    for part in parents:
        node = _child(node, part, key)
    value = _yaml_value(text, f"--set {key}: {text[:SHOWN_CHARACTERS]!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {key}: {parents[-1]!r} holds {node!r}, not a table")


def _yaml_value(text: str, what: str) -> Any:
    value = read_yaml(text, what)
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as a string; people mean the number.
            return float(value)
        except ValueError:
            return value
    return value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise UserError(f"--set {key}: {part!r} lies under {node!r}, which is not a table")


def _index(items: list[Any], part: str, key: str) -> int:
    names = [_name_of(item) for item in items]
    if part in names:
        return names.index(part)
    if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < len(items):
        return int(part)
    valid = [name for name in names if name] + [f"0..{len(items) - 1}"]
    raise UserError(f"--set {key}: got {part!r}; valid: {', '.join(valid)}")


def _problem(details: Any, table: Any) -> str:
    location = details["loc"]
    field = ".".join(_as_written(location, table)) or "configuration"
    valid: Collection[str] = ()
    if details["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1], table)
    elif details["type"].startswith("union_tag"):
        valid = _kinds(location, table)
    return problem(details, field, valid) + _default_hint(details, table)


def _default_hint(details: Any, table: Any) -> str:
    """For an unknown or a missing key of an entry without a `kind`: which kind it was taken for, and why."""
    location = details["loc"]
    if details["type"] not in ("extra_forbidden", "missing") or len(location) < 3:
        return ""
    entries = table.get(location[0])
    entry = entries[location[1]] if isinstance(entries, list) and isinstance(location[1], int) else None
    if location[0] not in DEFAULT_KINDS or not isinstance(entry, dict) or "kind" in entry:
        return ""
    others = [kind for kind in _kinds(location[:2], table) if location[-1] in _valid_keys((*location[:2], kind), table)]
    having = f"; kinds with this key: {', '.join(others)}" if details["type"] == "extra_forbidden" and others else ""
    return f" (`kind` is missing, so it is {DEFAULT_KINDS[location[0]]!r}{having})"


def _as_written(location: Sequence[Any], table: Any) -> list[str]:
    """A location as the user wrote it, the members of a list by their names where they have some.

    Pydantic names the member of a union on the way, which stands in no file.
    """
    shown: list[str] = []
    node = table
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if part in (BUILT_IN, ELSEWHERE):
            continue
        if isinstance(node, dict) and part not in node and (not is_last or part in _kinds(location[:number], table)):
            continue
        inside: Any = None
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node))):
            inside = node[part]
        name = _name_of(inside) if isinstance(node, list) else None
        shown.append(name or str(part))
        node = inside
    return shown


def _name_of(item: Any) -> str | None:
    """What `--set` may call an element of a list."""
    name = item.get("name", item.get("model")) if isinstance(item, dict) else None
    return name if isinstance(name, str) else None


def _valid_keys(location: Sequence[Any], table: Any) -> set[str]:
    """Keys of the record at `location` of a configuration (list indices and union tags included in the path)."""
    return {key for record in _records_at(location, table) for key in _fields(record)}


def _kinds(location: Sequence[Any], table: Any) -> list[str]:
    """Values that `kind` may have at `location`, those of plugins last."""
    kinds = [record.model_fields["kind"] for record in _records_at(location, table) if "kind" in record.model_fields]
    own = [kind for one in kinds for kind in typing.get_args(one.annotation)]
    is_scorer = len(location) in (2, 3) and location[0] == "scorers"
    return list(dict.fromkeys([*own, *(plugin_names("scorers") if is_scorer else ())]))


def _records_at(location: Sequence[Any], table: Any) -> list[Any]:
    records: list[Any] = [Config]
    for number, part in enumerate(location):
        step: list[Any] = []
        if part == ELSEWHERE:
            plugin = find_plugin("scorers", table[location[0]][location[number - 1]]["kind"])
            assert plugin is not None, "the entry was sent to it"
            records = [plugin.found.record]
            continue
        for record in records:
            if isinstance(part, int):
                step.append(record)
            elif isinstance(record, type) and issubclass(record, BaseModel) and part in _fields(record):
                step.extend(_records_in(_fields(record)[part]))
            else:  # the tag of a discriminated union: keep the record whose `kind` it is
                kind = record.model_fields.get("kind")
                if kind is not None and part in typing.get_args(kind.annotation):
                    step.append(record)
        records = step or records
    return records


def _fields(record: type[BaseModel]) -> dict[str, Any]:
    return {(info.alias or name): info.annotation for name, info in record.model_fields.items()}


def _records_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        return [record for inner in typing.get_args(annotation) for record in _records_in(inner)]
    return []
