"""The DeepSpeed dictionary and the learning rates that follow from a training's options. No torch here.

The user's own `deepspeed:` dictionary is merged over ours, except for keys whose value another option decides:
two sources for one number would let the trajectory differ from what the configuration says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from prefsel.config import Optimization
from prefsel.errors import UserError, invalid

OWNED: Final[dict[str, str]] = {
    "train_batch_size": "global_batch_pairs",
    "train_micro_batch_size_per_gpu": "micro_batch_pairs and token_budget",
    "gradient_accumulation_steps": "global_batch_pairs, micro_batch_pairs and token_budget",
    "managed_gradient_accumulation": "global_batch_pairs, micro_batch_pairs and token_budget",
    "gradient_clipping": "max_grad_norm",
    "bf16": "dtype",
    "fp16": "dtype",
    "amp": "dtype",
    "torch_autocast": "dtype",
    "zero_optimization.stage": "zero_stage",
    "optimizer.type": "(always AdamW)",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_betas",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler": "warmup_ratio and min_lr_ratio",
}
"""DeepSpeed key -> the option of ours that decides it."""


BUCKET: Final = 500_000_000
"""DeepSpeed's own `reduce_bucket_size`: elements of the buffer in which it adds up gradients, whatever the model."""


def build_deepspeed_config(
    config: Optimization, *, world_size: int, num_parameters: int | None = None
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Accumulation is ours: the loop marks the last micro-batch of a global batch itself and weights every pair, so
    DeepSpeed's own counters (micro batch 1, accumulation 1) never scale anything.

    Args:
        config: The run's options.
        world_size: Number of workers.
        num_parameters: Of the model, which its bucket of gradients need not exceed: 2 GB for a model of any size
            otherwise; None: not known, DeepSpeed's own.

    Returns:
        A new dictionary; the user's `deepspeed` options are merged over it.

    Raises:
        UserError: When the user's options set a key that another option decides.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if num_parameters is not None:
        zero["reduce_bucket_size"] = min(BUCKET, num_parameters)
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "optimizer_and_weights":
        zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        # torch's AdamW everywhere: the fused ones need a compiler at run time and differ in the last bits.
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.adam_betas),
                "eps": config.adam_eps,
                "weight_decay": config.weight_decay,
                "torch_adam": True,
            },
        },
        "bf16": {"enabled": config.dtype == "bf16"},
    }
    if config.dtype == "bf16" and config.zero_stage > 0:
        # Stage 0 has no fp32 accumulation buffer: there many micro-batches add up in bf16.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    refuse_owned(config.deepspeed)
    return _merge(ours, config.deepspeed)


def refuse_owned(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a `UserError` for the first key in `options` that an option of ours decides."""
    for key, value in options.items():
        path = f"{prefix}{key}"
        if path in OWNED:
            raise invalid(f"deepspeed.{path}", value, f"set {OWNED[path]} instead")
        if isinstance(value, Mapping):
            refuse_owned(value, f"{path}.")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "deepspeed") -> dict[str, Any]:
    """Nested dictionaries joined key by key, `over` winning.

    Raises:
        UserError: Where one side has a dictionary and the other a plain value.
    """
    merged = dict(base)
    for key, value in over.items():
        if key in base and isinstance(base[key], Mapping) != isinstance(value, Mapping):
            raise UserError(f"{prefix}.{key}: got {value!r}; valid: {type(base[key]).__name__}")
        merged[key] = _merge(base[key], value, f"{prefix}.{key}") if isinstance(base.get(key), Mapping) else value
    return merged


def lr_factor(step: int, *, num_steps: int, num_warmup_steps: int, min_ratio: float) -> float:
    r"""Share of the peak learning rate of the update after `step` updates: linear rise, then half a cosine.

    The first update has 1/num_warmup_steps of the peak and no update has zero.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
