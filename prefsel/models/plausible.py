"""What a model's `config.json` asks for, against the weights that lie beside it, before anything is built of either.

A model is built before its weights are read: a configuration of 10^6 layers takes hours and one of 10^9 tokens all
memory. No weights that exist are that large, so the numbers are compared with the files first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prefsel.errors import UserError, invalid

MAX_JSON_BYTES = 16 << 20
MAX_REPEATS = 1000
"""Layers, blocks or experts that any model may declare; more of them only as many as its weights have tensors."""
MAX_OUTPUTS = 1_000_000
"""Outputs of a classifier; transformers makes a name for each when it reads the configuration."""
MAX_ELEMENTS_A_BYTE = 8
"""Parameters that a byte of weights may stand for: one bit each, as of the smallest quantised models."""
FREE_ELEMENTS = 50_000_000
"""Parameters that need no weights: a reward head that is still to be trained, buffers."""
_REPEATED = re.compile(r"^(n|num|encoder|decoder)_.*(layers?|blocks?|experts?|stages?|hidden_groups)$|^depths?$")
_OUTPUTS = ("num_labels", "num_classes")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def json_table(file: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        UserError: It does not, it is no JSON, or it is too long or nested too deeply to be one's configuration.
    """
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{what}: its {file.name} has {size:,} bytes; valid: at most {MAX_JSON_BYTES:,}")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: its {file.name} is not a JSON table: {error}") from error
    except OSError as error:
        raise UserError(f"{what}: its {file.name} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise UserError(f"{what}: its {file.name} is not a JSON table: it is a {type(found).__name__}")
    return found


def check_declared(folder: Path, what: str) -> None:
    """Refuse a directory whose `config.json` declares what its weights cannot hold.

    Args:
        folder: With `config.json` and `*.safetensors`.
        what: How errors call the model.

    Raises:
        UserError: Names the key, its value, and what the weights have.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    _check(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files), what)


@lru_cache(maxsize=64)
def _check(files: tuple[tuple[str, int, int], ...], what: str) -> None:
    table = json_table(Path(files[0][0]), what)
    num_tensors = sum(_num_tensors(Path(name), what) for name, _, _ in files[1:])
    most = max(MAX_REPEATS, num_tensors)
    for key, value in _numbers(table):
        field = f"{what}: config.json: {key}"
        if key in _OUTPUTS and value > MAX_OUTPUTS:
            raise invalid(field, value, f"at most {MAX_OUTPUTS:,}")
        if _REPEATED.search(key) and not 0 <= value <= most:
            raise invalid(field, value, f"0 to {most:,}, as its weights have {num_tensors:,} tensors")
    for key in _IMPLEMENTATIONS:
        if re.search("[/:|]", str(table.get(key) or "")):
            raise invalid(f"{what}: config.json: {key}", table[key], "eager, sdpa: code of a repository is not run")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration with its key, those of lists with the key of the list."""
    waiting = [(key, value)]
    while waiting:
        name, one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += [(str(inner), inside) for inner, inside in one.items()]
        elif isinstance(one, list):
            waiting += [(name, inside) for inside in one]
        elif isinstance(one, int) and not isinstance(one, bool):
            yield name, one


def _num_tensors(file: Path, what: str) -> int:
    try:
        with safe_open(file, "pt") as opened:
            return len(list(opened.keys()))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: its {file.name} cannot be read as safetensors: {error}") from error


def check_size(model: Any, folder: str, what: str) -> None:
    """Refuse a model of more parameters than the weights in a directory can be.

    Args:
        model: Built on the `meta` device, where parameters take no memory.
        folder: Directory of the weights; of anything else nothing is known, and it passes.
        what: How the error calls the model.

    Raises:
        UserError: Names both numbers.
    """
    if not Path(folder).is_dir():
        return
    num_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    parameters: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    elements = sum(parameter.numel() for parameter in parameters)
    if elements > FREE_ELEMENTS + MAX_ELEMENTS_A_BYTE * num_bytes:
        raise UserError(
            f"{what}: its config.json describes {elements:,} parameters, and its weights are {num_bytes:,} bytes; copy "
            "the model again, whole"
        )
