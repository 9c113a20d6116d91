"""What a DPO run is configured with, and the DeepSpeed dictionary that follows from it. No torch here.

The user's own `deepspeed:` dictionary is merged over ours, except for keys whose value another option decides:
two sources for one number would let the trajectory differ from what the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class LoraOptions(BaseModel):
    """Low-rank adapters instead of full weights (needs `peft`); the adapter and the merged model are both exported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(gt=0)
    """Rank of the update."""
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""


class DpoConfig(BaseModel):
    """One DPO run. Batches are counted in pairs, memory in tokens; nothing depends on the number of workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_is_reference: bool
    """Whether the stored reference log-probs come from the very model that training starts from; switches on the
    step-0 check (loss is ln 2) and recomputes reference log-probs with the initial policy."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    max_length: int = Field(gt=1)
    """Longest prompt + completion, tokens; must be the one the reference log-probs were computed with."""
    dtype: Literal["fp32", "bf16"]
    """Weights, activations and communication; bf16 keeps fp32 master weights."""

    loss: Literal["dpo"] = "dpo"
    """A name of `prefsel.train.losses.LOSSES`."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature of the implicit reward."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""

    num_epochs: int = Field(default=1, gt=0)
    """Passes over the pairs."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps; the learning-rate schedule ends there too."""
    global_batch_pairs: int = Field(default=32, gt=0)
    """Pairs per optimizer step, over all workers; the last batch of an epoch may hold fewer and is averaged exactly."""
    micro_batch_pairs: int = Field(default=8, gt=0)
    """At most this many pairs per forward and backward pass of one worker."""
    token_budget: int = Field(default=8192, gt=0)
    """At most this many packed tokens per forward and backward pass (a longer pair goes alone)."""
    order: Literal["shuffled", "given"] = "shuffled"
    """A new seeded permutation every epoch, or the order of the table (easy to hard)."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the pairs and, with LoRA, the initial adapter."""

    warmup_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the steps with a linearly rising learning rate."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator offset."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Clip the global gradient norm here; 0 switches clipping off."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards: nothing, optimizer states, gradients too, weights too."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What lives in CPU memory between steps; weights need stage 3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: one more forward, far less memory."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own options, merged over ours; keys that another option decides are refused."""

    template: str = "auto"
    """Chat template, as in scoring."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a pair over max_length, as in scoring; `drop` leaves it out and counts it."""
    revision: str | None = None
    """Exact revision of the model, needed for `trust_remote_code`."""
    trust_remote_code: bool = False
    """Run the model repository's own code."""
    lora: LoraOptions | None = None
    """Train adapters instead of all weights."""

    eval_every_steps: int | None = Field(default=None, gt=0)
    """Evaluate on the held-out pairs this often, besides the start and the end."""
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    """Save a resumable checkpoint this often; None saves none."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Local checkpoints kept, the newest ones."""
    reference_check_pairs: int = Field(default=16, ge=0)
    """Pairs whose reference log-probs are recomputed before training."""
    reference_dir: str | None = None
    """Where the reference model lies when it is not the initial policy; only read for that check."""

    @model_validator(mode="after")
    def _consistent(self) -> DpoConfig:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload: got {self.offload!r} with zero_stage 0; valid: none, or zero_stage 1 to 3")
        if self.offload == "optimizer_and_weights" and self.zero_stage != 3:
            raise ValueError(
                f"offload: got {self.offload!r} with zero_stage {self.zero_stage}; weights need zero_stage 3"
            )
        return self


def build_deepspeed_config(config: DpoConfig, *, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Accumulation is ours: the loop marks the last micro-batch of a global batch itself and weights every pair, so
    DeepSpeed's own counters (micro batch 1, accumulation 1) never scale anything.

    Args:
        config: The run's options.
        world_size: Number of workers.

    Returns:
        A new dictionary; the user's `deepspeed` options are merged over it.

    Raises:
        UserError: When the user's options set a key that another option decides.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
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
    return merge(ours, config.deepspeed)


def refuse_owned(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a `UserError` for the first key in `options` that an option of `DpoConfig` decides."""
    for key, value in options.items():
        path = f"{prefix}{key}"
        if path in OWNED:
            raise invalid(f"deepspeed.{path}", value, f"set {OWNED[path]} instead")
        if isinstance(value, Mapping):
            refuse_owned(value, f"{path}.")


def merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "deepspeed") -> dict[str, Any]:
    """Nested dictionaries joined key by key, `over` winning.

    Raises:
        UserError: Where one side has a dictionary and the other a plain value.
    """
    merged = dict(base)
    for key, value in over.items():
        if key in base and isinstance(base[key], Mapping) != isinstance(value, Mapping):
            raise UserError(f"{prefix}.{key}: got {value!r}; valid: {type(base[key]).__name__}")
        merged[key] = merge(base[key], value, f"{prefix}.{key}") if isinstance(base.get(key), Mapping) else value
    return merged
