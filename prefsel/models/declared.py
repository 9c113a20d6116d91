"""What a model's configuration declares, read without its weights; and whose code may run for that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prefsel.errors import UserError, invalid
from prefsel.models.adapters import find_adapter
from prefsel.models.directory import check_directory, reading
from prefsel.models.positions import num_positions, padded_version


def head_names(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> list[str]:
    """Names of a reward model's outputs, in order, from its `id2label`.

    Raises:
        UserError: The configuration cannot be had.
    """
    config = declared_config(path, revision, trust_remote_code)
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def max_positions(path: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that a model's configuration has positions for; None when it declares none.

    Raises:
        UserError: The configuration cannot be had.
    """
    return num_positions(declared_config(path, revision, trust_remote_code))


def padded_version_of(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, max_length: int | None
) -> int | None:
    """`positions.padded_version` of a model; errors as `max_positions`."""
    config = declared_config(path, revision, trust_remote_code)
    has_own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    return padded_version(config, max_length, has_own_code=has_own_code)


def vocabulary_size(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Rows of a model's embedding by its configuration, which its weights must agree with; None: it says nothing.

    Raises:
        UserError: The configuration cannot be had.
    """
    config = declared_config(path, revision, trust_remote_code).get_text_config()
    return getattr(config, "vocab_size", None)


def declared_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration, without its weights; of an adapter its base's, with the outputs that it brings along.

    Raises:
        UserError: It cannot be had.
    """
    check_directory(path, revision)
    if adapter := find_adapter(path, revision):
        config = full_config(adapter.base, adapter.base_revision, trust_remote_code)
        if num_labels := adapter.num_labels():
            config.num_labels = num_labels
        return config
    return full_config(path, revision, trust_remote_code)


def full_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """As `declared_config`, of a directory or hub id of full weights."""
    options = load_options(path, revision, trust_remote_code)
    with reading(f"model {path}: its configuration cannot be had"):
        return AutoConfig.from_pretrained(path, **options)  # nosec B615 # load_options has it


def load_options(path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What every loading call of transformers gets for a directory or hub id of full weights.

    Raises:
        UserError: Code may run, but which code is not fixed.
    """
    check_code(path, revision, trust_remote_code)
    is_local = Path(path).is_dir()
    return {"revision": revision or "main", "trust_remote_code": trust_remote_code, "local_files_only": is_local}


def check_code(path: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse to run code that nothing fixes: of a hub's branch, or of another repository that a directory names."""
    if trust_remote_code and Path(path).is_dir():
        for name in ("config.json", "tokenizer_config.json"):
            if elsewhere := _code_elsewhere(Path(path) / name):
                raise UserError(
                    f"model {path}: its {name} takes code from the repository {elsewhere!r}, at no fixed revision; "
                    "copy its *.py files into the directory and leave the repository out of auto_map"
                )
    if trust_remote_code and not Path(path).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise invalid(
            "revision",
            revision,
            f"the 40 hex digits of a commit, because trust_remote_code runs {path}'s code; for the base of an adapter "
            "<revision of the adapter>+<base>@<commit of the base>",
        )


def _code_elsewhere(file: Path) -> str | None:
    """The first repository that an `auto_map` names before `--`: transformers would run that one's newest code."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):  # no such file, or one that loading will complain about
        return None
    values = known.values() if isinstance(known, dict) else [known]
    names = [name for value in values for name in (value if isinstance(value, list | tuple) else [value])]
    return next((name.split("--")[0] for name in names if isinstance(name, str) and "--" in name), None)
