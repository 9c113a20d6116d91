"""Models and tokenizers from a directory or a hub: safetensors only, in evaluation mode, with one attention function.

Also: what a directory's weights are called (`model_identity`), and which models may be packed (`supports_packing`).
"""

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
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from prefsel.errors import UserError, invalid
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
    """The tokenizer of a directory or hub id.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    _check_code(path, revision, trust_remote_code)
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model {path}: no tokenizer in the directory; expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=Path(path).is_dir()
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {path}: its tokenizer cannot be loaded: {_reason(error)}") from error


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
    _check_code(path, revision, trust_remote_code)
    check_directory(path)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    options["local_files_only"] = Path(path).is_dir()
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if config.model_type in PACKED_MODEL_TYPES:
            options["attn_implementation"] = IMPLEMENTATION
        if gpus_per_replica > 1:
            options |= _spread_over(gpus_per_replica)
        with no_bars():
            model, info = auto.from_pretrained(
                path,
                config=config,
                dtype=DTYPES[dtype] if isinstance(dtype, str) else dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {path}: cannot be loaded as {auto.__name__}: {_reason(error)}") from error
    # A reward model without its head, say, would be completed with random numbers and a warning.
    if missing := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(
            f"model {path}: its weights lack {len(missing)} tensors of {type(model).__name__}: {missing[:5]}"
        )
    if gpus_per_replica == 1:
        model = model.to(device)
    return model.eval()


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
    if trust_remote_code and not Path(path).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise invalid(
            "revision", revision, f"the 40 hex digits of a commit, because trust_remote_code runs {path}'s code"
        )


def check_directory(path: str) -> None:
    """Refuse a model directory that lacks its configuration or safe weights; a hub id passes.

    Raises:
        UserError: Names the directory and what is missing.
    """
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


def model_identity(path: str, *, revision: str | None = None) -> str:
    """What a model's numbers depend on: a hash of its directory, or the hub's commit.

    The hash covers weights, configuration, tokenizer, chat template and code.

    Raises:
        UserError: The directory lacks weights or configuration, or the hub id cannot be resolved.
    """
    check_directory(path)
    if Path(path).is_dir():
        names = {"*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"}
        files = sorted({file for pattern in names for file in Path(path).glob(pattern)})
        return _content(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return str(revision)
    try:
        config = cached_file(path, "config.json", revision=revision or "main")
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
    config = _declared_config(path, revision, trust_remote_code)
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
    return num_positions(_declared_config(path, revision, trust_remote_code))


def padded_version_of(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, max_length: int | None
) -> int | None:
    """`positions.padded_version` of a model; errors as `max_positions`."""
    config = _declared_config(path, revision, trust_remote_code)
    has_own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    return padded_version(config, max_length, has_own_code=has_own_code)


def vocabulary_size(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Rows of a model's embedding by its configuration, which its weights must agree with; None: it says nothing.

    Raises:
        UserError: The configuration cannot be had.
    """
    config = _declared_config(path, revision, trust_remote_code).get_text_config()
    return getattr(config, "vocab_size", None)


def _declared_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration, without its weights.

    Raises:
        UserError: It cannot be had.
    """
    check_directory(path)
    _check_code(path, revision, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            path,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=Path(path).is_dir(),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {path}: its configuration cannot be had: {_reason(error)}") from error


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


def _reason(error: Exception) -> str:
    """The first line of an error; where code of its own is what the model lacks, how to allow it."""
    text = str(error)
    hint = "; to run it, set the model's trust_remote_code: true" if "trust_remote_code" in text else ""
    return text.split("\n")[0].rstrip(" .") + hint
