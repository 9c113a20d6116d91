"""Models and tokenizers from a directory or a hub: safetensors only, in evaluation mode, one attention function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from prefsel.errors import UserError, invalid
from prefsel.models.adapters import TASKS, Adapter, find_adapter, merge
from prefsel.models.architecture import PACKED_MODEL_TYPES, unwrapped
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.declared import check_code, full_config, load_options, max_positions
from prefsel.models.directory import check_directory, check_hub_index, reading
from prefsel.models.plausible import check_size

# Else transformers asks a bot on the hub to convert pickled weights, and loads what that put into a pull request.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_causal(
    path: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gpus_per_replica: int = 1,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        path: Local directory, or hub id.
        dtype: Of the weights: fp32, bf16, fp16, or torch's.
        device: Where the weights go; with several GPUs per replica they are spread over the visible ones.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run model code from the hub; needs the exact commit as `revision`.
        gpus_per_replica: GPUs that hold one copy.

    Raises:
        UserError: The directory lacks something (named), the hub id cannot be had, or the weights lack tensors.
    """
    return _load(AutoModelForCausalLM, path, dtype, device, revision, trust_remote_code, gpus_per_replica)


def load_reward(
    path: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gpus_per_replica: int = 1,
) -> PreTrainedModel:
    """A sequence classifier whose `num_labels` outputs are rewards; arguments and errors as `load_causal`."""
    return _load(AutoModelForSequenceClassification, path, dtype, device, revision, trust_remote_code, gpus_per_replica)


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory or hub id; an adapter's own where it has one, else that of its base.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    if adapter := find_adapter(path, revision):
        is_own = adapter.has_tokenizer(TOKENIZER_FILES)
        path, revision = (path, adapter.revision) if is_own else (adapter.base, adapter.base_revision)
    check_code(path, revision, trust_remote_code)
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model {path}: no tokenizer in the directory; expected one of {', '.join(TOKENIZER_FILES)}")
    with reading(f"model {path}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=Path(path).is_dir()
        )


def context_length(path: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The longest sequence a model and its tokenizer declare, in tokens; None: neither does.

    Raises:
        UserError: The configuration or the tokenizer cannot be had.
    """
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    declared = (max_positions(path, revision, trust_remote_code), getattr(tokenizer, "model_max_length", None))
    # A tokenizer without a limit says 1e30.
    return min((int(length) for length in declared if length and length < 1e9), default=None)


def _load(
    auto: Any,
    path: str,
    dtype: str | torch.dtype,
    device: torch.device | str,
    revision: str | None,
    trust_remote_code: bool,
    gpus_per_replica: int,
) -> PreTrainedModel:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise invalid("dtype", dtype, DTYPES)
    check_directory(path, revision)
    adapter = find_adapter(path, revision)
    if adapter is not None:
        _check_task(adapter, auto)
        path, revision = adapter.base, adapter.base_revision
    config = full_config(path, revision, trust_remote_code)
    options = load_options(path, revision, trust_remote_code)
    if adapter is not None:
        config.num_labels = adapter.num_labels() or config.num_labels
    runs_own_code = trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {})
    if config.model_type in PACKED_MODEL_TYPES and not runs_own_code:  # which need not know registered attention
        options["attn_implementation"] = IMPLEMENTATION
    # ZeRO 3 deals out whatever is built, also on `meta`; there the check of the directory's declarations has to do.
    if not runs_own_code and not is_deepspeed_zero3_enabled():
        _check_weights(auto, config, path, revision)
    if gpus_per_replica > 1:
        options |= _spread_over(gpus_per_replica)
    with reading(f"model {path}: cannot be loaded as {auto.__name__}"), no_bars():
        model, info = auto.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype] if isinstance(dtype, str) else dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name; else only a table on stderr names them
            **options,
        )
    # A reward model without its head, say, would be completed with random numbers and a warning.
    brought = set() if adapter is None else set(adapter.shapes())
    if wrong := sorted(key for key in info["mismatched_keys"] if key[0] not in brought):
        name, there, wanted = wrong[0]
        raise UserError(
            f"model {path}: {len(wrong)} tensors of its weights have another shape than its config.json says, the "
            f"first {name}: got {list(there)}; valid: {list(wanted)}"
        )
    if missing := sorted(set(map(str, info["missing_keys"])) - brought):
        name = f"model {path}:" if adapter is None else f"{adapter.name}, and"
        raise UserError(f"{name} its weights lack {len(missing)} tensors of {type(model).__name__}: {missing[:5]}")
    if adapter is not None:
        with torch.random.fork_rng(devices=[]):  # peft draws weights that it then replaces
            model = merge(model, adapter)
    if gpus_per_replica == 1:
        with reading(f"model {path}: cannot be put on {device}"):
            model = model.to(device)
    return model.eval()


def _check_weights(auto: Any, config: Any, path: str, revision: str | None) -> None:
    """Refuse weights that are no safetensors, or fewer than the configuration asks for.

    Raises:
        UserError: Says which.
    """
    if not Path(path).is_dir():
        check_hub_index(path, revision)
        return
    with reading(f"model {path}: cannot be built as {auto.__name__}"), torch.device("meta"):
        built = auto.from_config(config)
    check_size(built, path, f"model {path}")


def _check_task(adapter: Adapter, auto: Any) -> None:
    role = "policy" if auto is AutoModelForCausalLM else "reward model"
    if (task := adapter.settings.get("task_type")) not in TASKS[role]:
        raise UserError(f"{adapter.name}, trained for the task {task}; as a {role} it needs {TASKS[role][0]}")


def check_vocabulary(tokenizer: Any, model: nn.Module | None = None, *, path: str = "", rows: int = 0) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for; fewer tokens than rows are fine.

    Args:
        tokenizer: Of the model.
        model: Whose embedding counts; None: `rows` do.
        path: What the model is called, for the error; empty: what its configuration says.
        rows: Of the embedding, where no model is at hand.

    Raises:
        UserError: Names the model, the first such token with its id, and both sizes.
    """
    if model is not None:
        inner = unwrapped(model)
        weight = inner.get_input_embeddings().weight
        rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 no worker has all rows
        path = path or inner.config.name_or_path
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"model {path or type(model).__name__}: its tokenizer has {len(tokenizer):,} tokens and its embedding "
            f"{rows:,} rows, none for token {token!r} with id {number} ({len(beyond)} such tokens); resize the model's "
            "embedding (resize_token_embeddings) and save it, or use the tokenizer it was trained with"
        )


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, one per file, out of the block's output: a job's log is no terminal."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _spread_over(num_gpus: int) -> dict[str, Any]:
    if (visible := torch.cuda.device_count()) < num_gpus:
        raise UserError(f"gpus_per_replica: got {num_gpus}, but {visible} GPUs are visible")
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UserError("gpus_per_replica: more than 1 needs the package accelerate") from error
    return {"device_map": "auto"}


def default_device(device: str | None) -> str:
    """The device asked for; None: the GPU if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
