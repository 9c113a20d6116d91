"""Models and tokenizers from a directory or a hub: safetensors only, in evaluation mode, with one attention function.

Also: what a directory's weights are called (`model_identity`), and which models may be packed (`supports_packing`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from prefsel.errors import PrefselError, UserError, invalid
from prefsel.models.adapters import CONFIG as ADAPTER_CONFIG
from prefsel.models.adapters import TASKS, Adapter, find_adapter, merge
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.packing import ModelShape
from prefsel.models.positions import num_positions, padded_version

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PACKED_MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo", "olmo2", "phi", "phi3", "starcoder2"),
    *("gpt2", "gpt_neox"),
)
"""Decoders whose packed log-probs are tested against one sequence at a time. Every other model is padded."""
STATELESS_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that depend on a token's position alone, not on the longest sequence of the batch."""
DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
"""Errors of a machine, which are no word on a model's files; `AcceleratorError` is newer than the oldest torch here."""
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping")

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
    _check_code(path, revision, trust_remote_code)
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model {path}: no tokenizer in the directory; expected one of {', '.join(TOKENIZER_FILES)}")
    with _reading(f"model {path}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=Path(path).is_dir()
        )


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
    config = _full_config(path, revision, trust_remote_code)
    options = load_options(path, revision, trust_remote_code)
    if adapter is not None:
        config.num_labels = adapter.num_labels() or config.num_labels
    if config.model_type in PACKED_MODEL_TYPES:
        options["attn_implementation"] = IMPLEMENTATION
    if gpus_per_replica > 1:
        options |= _spread_over(gpus_per_replica)
    with _reading(f"model {path}: cannot be loaded as {auto.__name__}"), no_bars():
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
        with _reading(f"model {path}: cannot be put on {device}"):
            model = model.to(device)
    return model.eval()


def load_options(path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What every loading call of transformers gets for a directory or hub id of full weights.

    Raises:
        UserError: Code may run, but which code is not fixed.
    """
    _check_code(path, revision, trust_remote_code)
    is_local = Path(path).is_dir()
    return {"revision": revision or "main", "trust_remote_code": trust_remote_code, "local_files_only": is_local}


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


def _check_code(path: str, revision: str | None, trust_remote_code: bool) -> None:
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
        _check_shards(path, folder / SAFE_WEIGHTS_INDEX_NAME)


def _check_shards(path: str, index: Path) -> None:
    """Refuse weights in several files of which the index, if there is one, names some that are not there."""
    if not index.is_file():
        return
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model {path}: its {index.name} cannot be read: {type(error).__name__}: {error}") from error
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
        return bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))
    except OSError as error:
        raise UserError(f"model {path}: cannot be found: {_reason(error)}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"model {path}: its config.json is not a JSON table: {error}") from error


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
        names = {"*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"}
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


def head_names(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> list[str]:
    """Names of a reward model's outputs, in order, from its `id2label`.

    Raises:
        UserError: The configuration cannot be had.
    """
    config = declared_config(path, revision, trust_remote_code)
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def context_length(path: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The longest sequence a model and its tokenizer declare, in tokens; None: neither does.

    Raises:
        UserError: The configuration or the tokenizer cannot be had.
    """
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    declared = (max_positions(path, revision, trust_remote_code), getattr(tokenizer, "model_max_length", None))
    # A tokenizer without a limit says 1e30.
    return min((int(length) for length in declared if length and length < 1e9), default=None)


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
        config = _full_config(adapter.base, adapter.base_revision, trust_remote_code)
        if num_labels := adapter.num_labels():
            config.num_labels = num_labels
        return config
    return _full_config(path, revision, trust_remote_code)


def _full_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    options = load_options(path, revision, trust_remote_code)
    with _reading(f"model {path}: its configuration cannot be had"):
        return AutoConfig.from_pretrained(path, **options)


def model_shape(model: nn.Module) -> ModelShape:
    """What a decoder's FLOPs follow from; a classifier's head counts as none."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    head = inner.get_output_embeddings()
    return ModelShape(
        trunk_parameters=sum(
            parameter.numel()
            for module in inner.base_model.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.ndim == 2
        ),
        head_parameters=0 if head is None else head.weight.numel(),
        num_layers=config.num_hidden_layers,
        attention_width=heads * head_size,
    )


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a peft wrapper, its adapters still in place."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def supports_packing(model: nn.Module) -> tuple[bool, str]:
    """Whether packed rows give exactly this model's numbers, and if not, why.

    Returns:
        (True, "") or (False, reason).
    """
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False, "its adapter adds prompt tokens of its own"
    model = unwrapped(model)
    config = model.config
    if config.model_type not in PACKED_MODEL_TYPES:
        return False, f"model type {config.model_type!r} is not among the tested: {', '.join(PACKED_MODEL_TYPES)}"
    if not type(model).__module__.startswith("transformers."):
        return False, f"{type(model).__name__} is not transformers' own code"
    if not getattr(config, "is_causal", True):
        return False, "its attention is bidirectional"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False, f"sliding-window or hybrid layers ({', '.join(sorted(layers))})"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATELESS_ROPE:
        return False, f"its {rope!r} rotary embedding follows the length of a sequence"
    if changed := [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]:
        return False, f"its logits are changed after the head ({', '.join(changed)})"
    return True, ""


@contextmanager
def _reading(failed: str) -> Iterator[None]:
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
