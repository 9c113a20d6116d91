"""From a Hugging Face folder to the model that DeepSpeed trains: a policy, with adapters if asked; a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from prefsel.config import Lora
from prefsel.errors import UserError, invalid
from prefsel.models.adapters import find_adapter
from prefsel.models.declared import declared_config, load_options
from prefsel.models.loading import DTYPES, load_causal, load_reward, no_bars
from prefsel.train.deepspeed_config import build_deepspeed_config
from prefsel.train.randomness import silence
from prefsel.train.run_config import DpoConfig, RewardConfig, RunConfig

HEAD = "score"
"""The layer that transformers' classifiers have in place of a language model's head."""


def load_policy(config: DpoConfig, model_dir: str, device: torch.device) -> nn.Module:
    """The initial policy in training mode, without the model's own dropout, with adapters and checkpointing if asked.

    Raises:
        UserError: As `load_causal`; adapters without peft, or for layers that the model lacks; or ZeRO-3 without the
            package accelerate.
    """
    with _loading_into_shards(config, model_dir):
        model = load_causal(
            model_dir,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    _prepare(model, config)
    return _attach_lora(model, config.lora) if config.lora else model


def load_reward_start(config: RewardConfig, model_dir: str, tokenizer: Any, device: torch.device) -> nn.Module:
    """The initial reward model in training mode, without the model's own dropout; settles the tokenizer's pad token.

    A classifier is taken as it is; of a causal language model the trunk is taken, with a seeded head in place of its
    own.

    Raises:
        UserError: As `load_reward`; a classifier with several outputs; a causal model that transformers has no
            classifier for; or ZeRO-3 without the package accelerate.
    """
    model_config = declared_config(model_dir, config.revision, config.trust_remote_code)
    adapter = find_adapter(model_dir, config.revision)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in model_config.architectures or [])
    if adapter is not None and adapter.settings.get("task_type"):
        is_classifier = adapter.settings["task_type"] == "SEQ_CLS"
    if is_classifier and model_config.num_labels != 1:
        raise invalid(f"num_labels of model {model_dir}", model_config.num_labels, "1, or a causal language model")
    with _loading_into_shards(config, model_dir):
        model: Any
        if is_classifier:
            model = load_reward(
                model_dir,
                dtype=config.dtype,
                device=device,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
            )
        else:
            model = _with_fresh_head(config, model_dir, model_config).to(device)
    _choose_pad_token(model.config, tokenizer)
    _prepare(model, config)
    return model


@contextmanager
def _loading_into_shards(config: RunConfig, model_dir: str) -> Iterator[None]:
    """Under ZeRO-3, no worker holds the whole model, on the GPU or in host memory; but one that an adapter is merged
    into is loaded whole and sharded by DeepSpeed when the engine starts.

    Raises:
        UserError: The package accelerate, which does it, is not there.
    """
    sharding = None
    if config.zero_stage == 3:
        if not is_accelerate_available():
            raise UserError("zero_stage: got 3, which needs the package accelerate to load a model into shards")
        if find_adapter(model_dir, config.revision) is not None:
            yield
            return
        # While this object lives, transformers loads every weight straight into its shards.
        sharding = HfDeepSpeedConfig(build_deepspeed_config(config, world_size=dist.get_world_size()))
    yield
    del sharding


def _prepare(model: Any, config: RunConfig) -> None:
    """All weights train, dropout is off, activations are recomputed if asked."""
    silence(model)
    model.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _attach_lora(model: nn.Module, options: Lora) -> nn.Module:
    """Freeze the model and add low-rank adapters that start as the identity.

    Raises:
        UserError: `peft` is not installed, or no layer has one of the target names.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("lora: needs peft, install prefsel[peft]") from error
    targets = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    adapter = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=targets,
        lora_dropout=options.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter, autocast_adapter_dtype=False)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"lora.target_modules: got {targets}; valid: all-linear, {', '.join(linear)}") from error


def _choose_pad_token(model_config: Any, tokenizer: Any) -> int:
    """Agree on one pad token and write it into both the model's configuration and the tokenizer.

    A classifier reads the last token that is not its pad token, so the two must name the same: the model's own if it
    has one, else the tokenizer's, else the end of sequence. Of the last, which usually also ends a completion, the
    token before it is read, in training, in scoring and in transformers alike.

    Raises:
        UserError: None of the three is a token that both know.
    """
    text_config = model_config.get_text_config()
    candidates = {
        "the model's pad_token_id": text_config.pad_token_id,
        "the tokenizer's pad_token_id": tokenizer.pad_token_id,
        "the tokenizer's eos_token_id": tokenizer.eos_token_id,
    }
    for token_id in candidates.values():
        if token_id is not None and 0 <= token_id < text_config.vocab_size:
            token = tokenizer.convert_ids_to_tokens(token_id)
            if token is not None:
                tokenizer.pad_token = token
                model_config.pad_token_id = text_config.pad_token_id = token_id
                return int(token_id)
    raise UserError(f"pad token: a reward model needs one, and none of these is known to both: {candidates}")


def _with_fresh_head(config: RewardConfig, model_dir: str, model_config: Any) -> nn.Module:
    """The trunk of a causal language model under a head of one output, drawn from the run's seed."""
    model_config.num_labels = 1
    try:
        with _quiet():
            if find_adapter(model_dir, config.revision) is None:
                model, missing = _trunk_of_folder(config, model_dir, model_config)
            else:
                model, missing = _trunk_of_adapter(config, model_dir, model_config)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {model_dir}: its trunk cannot be loaded as a classifier: {error}") from error
    if missing != {f"{HEAD}.weight"}:
        raise UserError(
            f"model {model_dir}: as a classifier it must lack {HEAD}.weight and nothing else, and lacks "
            f"{sorted(missing)[:5]}"
        )
    weight = getattr(model, HEAD).weight
    # As transformers draws it, but from a generator of its own: the same head for every number of workers.
    spread = getattr(model_config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(config.seed)
    with (
        deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=hasattr(weight, "ds_id")),
        torch.no_grad(),
    ):
        if weight.numel():
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model


def _trunk_of_folder(config: RewardConfig, model_dir: str, model_config: Any) -> tuple[Any, set[str]]:
    """A classifier with the weights of a folder or a hub, and the names of those that it lacks."""
    model, info = AutoModelForSequenceClassification.from_pretrained(  # nosec B615 # load_options has it
        model_dir,
        config=model_config,
        dtype=DTYPES[config.dtype],
        use_safetensors=True,
        output_loading_info=True,
        **load_options(model_dir, config.revision, config.trust_remote_code),
    )
    return model, {str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])}


def _trunk_of_adapter(config: RewardConfig, model_dir: str, model_config: Any) -> tuple[Any, set[str]]:
    """The same of a language model that an adapter is merged into first."""
    code: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    merged = load_causal(model_dir, dtype=config.dtype, device="cpu", **code)
    model = AutoModelForSequenceClassification.from_config(
        model_config, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
    )
    weights = {name: weight for name, weight in merged.state_dict().items() if name in model.state_dict()}
    return model, set(model.load_state_dict(weights, strict=False).missing_keys)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warning that the head is new, which is meant, and its bars, which a log cannot show."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
