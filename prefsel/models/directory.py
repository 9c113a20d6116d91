"""What a model's directory or hub id holds: refused where something lacks, and what its bytes are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from prefsel.errors import PrefselError, UserError, invalid
from prefsel.models.adapters import CONFIG as ADAPTER_CONFIG
from prefsel.models.adapters import find_adapter
from prefsel.models.plausible import check_declared, json_table


def check_directory(path: str, revision: str | None = None) -> None:
    """Refuse a model directory that lacks its configuration or safe weights; a hub id passes. Of an adapter, its base.

    Raises:
        UserError: Names the directory and what is missing.
    """
    if adapter := find_adapter(path, revision):
        if find_adapter(adapter.base, adapter.base_revision):
            raise UserError(f"{adapter.name}, which is an adapter itself; merge that one, or name its base")
        try:
            check_directory(adapter.base, adapter.base_revision)
        except UserError as error:
            raise UserError(f"{adapter.name}, which cannot be used: {error}") from error
        if _is_quantised(adapter.base, adapter.base_revision):
            raise UserError(
                f"{adapter.name}, whose weights are quantised, so that nothing can be merged into them; name the "
                f"full-precision model as base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        return
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith("."):
            raise UserError(f"model {path}: no such directory")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model {path}: no config.json in the directory")
    if not any(folder.glob("*.safetensors")):
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"; found {others[:3]}, which is not read because it can run code" if others else ""
        raise UserError(f"model {path}: no *.safetensors in the directory{found}")
    if not (folder / SAFE_WEIGHTS_NAME).is_file():  # beside that one transformers reads no index
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            _check_shards(path, index)
    check_declared(folder, f"model {path}")


def check_hub_index(path: str, revision: str | None) -> None:
    """Refuse the index of a hub's repository that names other files than safetensors of its own folder.

    Raises:
        UserError: Names the first such file.
    """
    try:
        found = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, revision=revision or "main", **_QUIETLY)
    except OSError:  # who loads the weights next says what is wrong
        return
    if found is not None:
        _shard_names(path, Path(found))


_QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def _shard_names(path: str, index: Path) -> list[str]:
    """The files that an index names, each once.

    Raises:
        UserError: One of them is no safetensors, which transformers would unpickle, or lies elsewhere.
    """
    weight_map = json_table(index, f"model {path}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"model {path}: its {index.name} has no table weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise invalid(f"model {path}: its {index.name}", name, "names of *.safetensors files beside it")
    return names


def _check_shards(path: str, index: Path) -> None:
    """Refuse weights in several files of which the index names some that are not there."""
    names = _shard_names(path, index)
    if lacking := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"model {path}: {len(lacking)} of the {len(names)} files of weights that its {index.name} names are not "
            f"there, the first {lacking[0]}; copy the model again, whole"
        )


def _is_quantised(path: str, revision: str | None) -> bool:
    """Whether a model's `config.json`, read as text because its code need not be trusted for that, says so."""
    local = Path(path) / "config.json"
    try:
        file = local if Path(path).is_dir() else Path(cached_file(path, "config.json", revision=revision or "main"))
    except OSError as error:
        raise UserError(f"model {path}: cannot be found: {_reason(error)}") from error
    return bool(json_table(file, f"model {path}").get("quantization_config"))


def model_identity(path: str, *, revision: str | None = None) -> str:
    """What a model's numbers depend on: a hash of its directory, or the hub's commit.

    The hash covers weights, configuration, tokenizer, chat template and code; an adapter's those of its base too.

    Raises:
        UserError: The directory lacks weights or configuration, or the hub id cannot be resolved.
    """
    check_directory(path, revision)
    if adapter := find_adapter(path, revision):
        own = _own_identity(adapter.path, adapter.revision)
        base = model_identity(adapter.base, revision=adapter.base_revision)
        return hashlib.blake2b(f"adapter {own} on {base}".encode(), digest_size=16).hexdigest()
    return _own_identity(path, revision)


def pinned_revision(path: str, revision: str | None) -> str | None:
    """The revision under which workers load what the identity was taken of: of a hub id its commit, of an adapter also
    where its base was found, and that one's commit; None for a directory of full weights."""
    if adapter := find_adapter(path, revision):
        return adapter.pinned(_commit(adapter.path, adapter.revision), _commit(adapter.base, adapter.base_revision))
    return _commit(path, revision)


def _commit(path: str, revision: str | None) -> str | None:
    return None if Path(path).is_dir() else _own_identity(path, revision)


def _own_identity(path: str, revision: str | None) -> str:
    if Path(path).is_dir():
        names = {"*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "additional_chat_templates/*.jinja"}
        files = sorted({file for pattern in names for file in Path(path).glob(pattern)})
        return _content(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return str(revision)
    is_adapter = find_adapter(path, revision) is not None
    try:
        config = cached_file(path, ADAPTER_CONFIG if is_adapter else "config.json", revision=revision or "main")
    except OSError as error:
        raise UserError(f"model {path}: cannot be found: {_reason(error)}") from error
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise UserError(f"model {path}: its commit is unknown; give `revision` as 40 hex digits")
    return commit


@lru_cache(maxsize=64)
def _content(files: tuple[tuple[str, int, int], ...]) -> str:
    """blake2b-128 over names and bytes; sizes and times only decide whether to hash again."""
    total = hashlib.blake2b(digest_size=16)
    for name, size, _ in files:
        total.update(f"{Path(name).name}\0{size}\0".encode())
        with open(name, "rb") as file:
            while chunk := file.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()


DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
"""Errors of a machine, which are no word on a model's files; `AcceleratorError` is newer than the oldest torch here."""


@contextmanager
def reading(failed: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a model's files is about these files, so it is the user's error.

    Its class says little: of a broken `tokenizer.json` it is a bare `Exception`, of a broken configuration a KeyError,
    a TypeError or an error of a validator. What is about memory or the device is a fault.

    Args:
        failed: Begins the message.
    """
    try:
        yield
    except PrefselError:
        raise
    except DEVICE_ERRORS as error:
        raise PrefselError(f"{failed}: {type(error).__name__}: {_reason(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{failed}: {_reason(error)}") from error
    except Exception as error:
        raise UserError(f"{failed}: {type(error).__name__}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, with the next where it ends in a colon; and how to allow code where that lacks."""
    text = str(error)
    hint = "; to run it, set the model's trust_remote_code: true" if "trust_remote_code" in text else ""
    first, *more = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    told = f"{first} {more[0]}" if more and first.endswith(":") else first
    return told.rstrip(" .") + hint
