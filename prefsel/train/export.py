"""From a Hugging Face folder to the module DeepSpeed trains, and back to folders `AutoModelForCausalLM` loads.

Full weights become `model/`; adapters become `adapter/` (peft's format) and `merged/`. A folder gets its name only
after the reloaded model agreed with the engine. Adam's moments become `optimizer/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_accelerate_available

from prefsel.config import Lora
from prefsel.errors import IntegrityError, UserError
from prefsel.models.loading import load_causal, model_shape, unwrapped
from prefsel.models.logps import packed_logps
from prefsel.models.packing import ModelShape, PackedBatch
from prefsel.models.padded import PaddedBatch, padded_logps
from prefsel.train.deepspeed_config import DpoConfig, build_deepspeed_config

SHARD_SIZE = "2GB"
"""Of a weights file: copying into the workspace holds one in memory."""
LOGIT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |difference| / max(1, largest |logit|) between the engine's and the reloaded model's logits."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Policy(nn.Module):
    """The language model behind the one call DeepSpeed wraps, so that its hooks see every forward pass."""

    def __init__(self, model: nn.Module, *, shares_weights: bool = False) -> None:
        """Wrap a model.

        Args:
            model: What computes; may be a peft model.
            shares_weights: Whether every call of a module gathers its weights from all workers (ZeRO-3), so that all
                of them must call it equally often.
        """
        super().__init__()
        self.model = model
        self.shares_weights = shares_weights

    def forward(self, batch: PackedBatch | PaddedBatch | Tensor) -> Tensor:
        """Log-probs of the batch's completions, [C] float64; or logits, [1, T, V], of plain token ids, [1, T]."""
        if isinstance(batch, Tensor):
            return self.model(input_ids=batch, use_cache=False).logits
        if isinstance(batch, PaddedBatch):
            return padded_logps(self.model, batch)
        return self._with_equal_head_calls(batch) if self.shares_weights else packed_logps(self.model, batch)

    def _with_equal_head_calls(self, row: PackedBatch) -> Tensor:
        """The head runs once per chunk of response tokens; workers with fewer chunks call it again with weight zero.

        The extra calls come last in the forward pass and so first in the backward pass, as other workers' last chunks.
        The workers agree on the number of calls just before the first: between two calls it would deadlock.
        """
        sample: list[Tensor] = []
        num_extra: list[int] = []

        def agree(module: nn.Module, arguments: tuple[Tensor]) -> None:
            if not sample:
                num_calls = -(-row.head_rows // len(arguments[0]))
                most = torch.tensor(num_calls, device=arguments[0].device)
                dist.all_reduce(most, op=dist.ReduceOp.MAX)
                sample.append(arguments[0][:1])
                num_extra.append(int(most) - num_calls)

        head = unwrapped(self.model).get_output_embeddings()
        hook = head.register_forward_pre_hook(agree, prepend=True)
        logps_C = packed_logps(self.model, row)
        hook.remove()
        for _ in range(num_extra[0]):
            logps_C = logps_C + 0.0 * head(sample[0]).double().sum()
        return logps_C


@dataclass(frozen=True)
class Export:
    """Where the trained weights lie and how far their logits are from the engine's."""

    model_dir: Path
    adapter_dir: Path | None
    max_logit_difference: float


def load_policy(config: DpoConfig, model_dir: str, device: torch.device) -> nn.Module:
    """The initial policy in training mode, without the model's own dropout, with adapters and checkpointing if asked.

    Dropout is off because the stored reference log-probs were computed without it (so is it in TRL).

    Raises:
        UserError: As `load_causal` and `attach_lora`; or ZeRO-3 without the package accelerate.
    """
    if config.zero_stage == 3:
        # While this object lives, transformers loads every weight straight into its shards: no worker holds the whole
        # model, on the GPU or in host memory.
        if not is_accelerate_available():
            raise UserError("zero_stage: got 3, which needs the package accelerate to load a model into shards")
        sharding = HfDeepSpeedConfig(build_deepspeed_config(config, world_size=dist.get_world_size()))
    model = load_causal(
        model_dir,
        dtype=DTYPES[config.dtype],
        device=device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if config.zero_stage == 3:
        del sharding
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return attach_lora(model, config.lora) if config.lora else model


def shape_of(model: nn.Module) -> ModelShape:
    """What a model's FLOPs follow from, adapters left out, even where weights are sharded: read off an empty copy."""
    inner = unwrapped(model)
    with torch.device("meta"):
        return model_shape(type(inner)(inner.config))


def attach_lora(model: nn.Module, options: Lora) -> nn.Module:
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


def export_policy(
    config: DpoConfig, engine: Any, tokenizer: Any, base_dir: str, output_dir: Path, *, probe_tokens: list[int]
) -> Export:
    """Write the engine's weights in Hugging Face layout and prove that they are the engine's; every worker calls this.

    Args:
        config: The run's options; `dtype` is the one of the weights written.
        engine: The engine, its module a `Policy`.
        tokenizer: Saved beside the weights.
        base_dir: The initial policy, into which an adapter is merged.
        output_dir: Receives `model/`, or `adapter/` and `merged/`.
        probe_tokens: Token ids of one sequence whose logits are compared.

    Returns:
        The folders and the largest logit difference, the same on every worker.

    Raises:
        IntegrityError: The reloaded model's logits differ from the engine's.
    """
    engine_logits_TV = _engine_logits(engine, probe_tokens)
    model = engine.module.model
    is_adapter = hasattr(model, "peft_config")
    weights = gather_weights(model, only_trainable=is_adapter)
    name = "merged" if is_adapter else "model"
    difference = 0.0
    if dist.get_rank() == 0:
        partial = output_dir / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if is_adapter:
            _save_adapter(model, weights, output_dir / "adapter")
            _save_merged(output_dir / "adapter", partial, config=config, base_dir=base_dir)
        else:
            model.save_pretrained(partial, state_dict=weights, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        difference = _difference(engine_logits_TV, partial, probe_tokens, config=config)
        if difference <= LOGIT_TOLERANCE[config.dtype]:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            partial.replace(output_dir / name)
    shared: list[Any] = [difference]
    dist.broadcast_object_list(shared, src=0)
    if not shared[0] <= LOGIT_TOLERANCE[config.dtype]:
        raise IntegrityError(
            f"export: logits of the reloaded model differ from the engine's by {shared[0]:.3g} relative, allowed "
            f"{LOGIT_TOLERANCE[config.dtype]:g}; left for inspection in {output_dir / name}.partial"
        )
    return Export(output_dir / name, output_dir / "adapter" if is_adapter else None, shared[0])


def gather_weights(model: nn.Module, *, only_trainable: bool = False) -> dict[str, Tensor]:
    """Full weights and persistent buffers on the CPU of worker 0 (elsewhere empty), one parameter in flight at a time.

    Under ZeRO-3 a parameter exists in full only inside `GatheredParameters`, on every worker at once.
    """
    is_writer = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if only_trainable and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if is_writer:
                weights[name] = parameter.detach().cpu().clone()
    if is_writer and not only_trainable:
        persistent = set(model.state_dict())
        weights |= {name: value.detach().cpu() for name, value in model.named_buffers() if name in persistent}
    return weights


def export_optimizer_state(
    config: DpoConfig, engine: Any, output_dir: Path, *, step: int, learning_rate: float
) -> Path:
    """Write Adam's moments as `optimizer/exp_avg.safetensors` and `exp_avg_sq.safetensors`; every worker calls this.

    The tensors are fp32, whole, and named as the parameters of the exported model; `state.json` beside them holds
    `step`, `betas`, `eps`, and the `learning_rate` of the last step.

    Args:
        config: The run's options.
        engine: The engine, its module a `Policy` without adapters.
        output_dir: Receives `optimizer/`.
        step: Optimizer steps taken.
        learning_rate: Of the last step.

    Returns:
        The folder; worker 0 has written it.

    Raises:
        UserError: DeepSpeed's options choose an optimizer whose moments are not kept per parameter.
    """
    folder, partial = output_dir / "optimizer", output_dir / "optimizer.partial"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    for moment in MOMENTS:  # one at a time: each is as large as the model in fp32
        values = gather_moment(engine, moment)
        if is_writer:
            save_file(values, partial / f"{moment}.safetensors")
    if is_writer:
        state = {"step": step, "betas": config.adam_betas, "eps": config.adam_eps, "learning_rate": learning_rate}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    dist.barrier()
    return folder


def gather_moment(engine: Any, moment: str) -> dict[str, Tensor]:
    """One of `MOMENTS` of every parameter, whole and fp32, on the CPU of worker 0 (elsewhere empty).

    Raises:
        UserError: As `export_optimizer_state`.
    """
    parameters = dict(engine.module.model.named_parameters())
    states: list[Mapping[str, Tensor]] = []
    if not engine.zero_optimization():
        # Stage 0 shards nothing: torch's own state, in bf16 that of fp32 copies in the order of the parameters.
        optimizer = engine.basic_optimizer
        states = [optimizer.state[copy] for group in optimizer.param_groups for copy in group["params"]]
    elif link := getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
        # Stages 1 and 2 find a parameter's state only after a step; a run resumed behind its last one takes none.
        link()
    values: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        if engine.zero_optimization():
            value = safe_get_full_optimizer_state(parameter, moment)
        else:
            value = states[number].get(moment) if len(states) == len(parameters) else None
        if value is None or value.shape != getattr(parameter, "ds_shape", parameter.shape):
            raise UserError(
                f"keep_optimizer_state: DeepSpeed has no {moment} of {name}; valid: torch's AdamW, the default"
            )
        if dist.get_rank() == 0:
            values[name] = value.detach().float().cpu().contiguous()
    return values


@torch.no_grad()
def _engine_logits(engine: Any, probe_tokens: list[int]) -> Tensor:
    engine.eval()
    return engine(torch.tensor([probe_tokens], device=engine.device))[0].float().cpu()


def _difference(engine_logits_TV: Tensor, model_dir: Path, probe_tokens: list[int], *, config: DpoConfig) -> float:
    """Largest |difference| / max(1, largest |logit|) of the model in `model_dir`; inf for another shape."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, **_load_options(config, config.dtype)).eval()
    with torch.no_grad():
        logits_TV = model(torch.tensor([probe_tokens])).logits[0].float()
    if logits_TV.shape != engine_logits_TV.shape:
        return float("inf")
    scale = max(1.0, engine_logits_TV.abs().max().item())
    return (logits_TV - engine_logits_TV).abs().max().item() / scale


def _save_adapter(model: Any, weights: dict[str, Tensor], adapter_dir: Path) -> None:
    shutil.rmtree(adapter_dir, ignore_errors=True)
    model.save_pretrained(adapter_dir, state_dict=weights)


def _save_merged(adapter_dir: Path, merged_dir: Path, *, config: DpoConfig, base_dir: str) -> None:
    """Merge in fp32 on the CPU from the saved files, so that what is published is what the adapter folder says."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_dir, **_load_options(config, "fp32"), revision=config.revision)
    merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
    merged.to(DTYPES[config.dtype]).save_pretrained(merged_dir, max_shard_size=SHARD_SIZE)


def _load_options(config: DpoConfig, dtype: str) -> dict[str, Any]:
    return {"dtype": DTYPES[dtype], "use_safetensors": True, "trust_remote_code": config.trust_remote_code}
