"""The trained weights as a folder that transformers loads, under its name only once it gave the engine's outputs.

Full weights become `model/`; adapters become `adapter/` (peft's format) and `merged/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prefsel.errors import IntegrityError
from prefsel.models.declared import declared_config
from prefsel.models.loading import DTYPES, load_causal, load_reward, no_bars
from prefsel.schema import TRAINED_ON
from prefsel.train.objective import Objective, Probe, Run
from prefsel.train.randomness import declared

SHARD_SIZE = "2GB"
"""Of a weights file: copying into the workspace holds one in memory."""
EXPORT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |difference| / max(1, largest |output|) between the engine's and the reloaded model's outputs."""


@dataclass(frozen=True)
class Export:
    """Where the trained weights lie and how far their outputs are from the engine's."""

    model_dir: Path
    adapter_dir: Path | None
    max_difference: float
    """Relative, as `EXPORT_TOLERANCE`."""


def export_model(
    run: Run,
    tokenizer: Any,
    base_dir: str,
    output_dir: Path,
    *,
    probe: Probe,
    prompt_ids: Sequence[bytes] | None,
) -> Export:
    """Write the engine's weights in Hugging Face layout and prove that they are the engine's; every worker calls this.

    Args:
        run: Engine and objective; the options' `dtype` is the one of the weights written.
        tokenizer: Saved beside the weights.
        base_dir: The initial model, into which an adapter is merged.
        output_dir: Receives `model/`, or `adapter/` and `merged/`.
        probe: What is compared.
        prompt_ids: Written to `trained_on.parquet` in the folder, sorted, each once; None: there is no such file.

    Returns:
        The folders and the largest difference, the same on every worker.

    Raises:
        IntegrityError: The reloaded model's outputs differ from the engine's.
    """
    objective, model = run.objective, run.engine.module.model
    run.engine.eval()
    with torch.no_grad():
        engine_outputs = run.engine(probe.batch.to(run.engine.device)).cpu().double().flatten()
    is_adapter = hasattr(model, "peft_config")
    weights = gather_weights(model, only_trainable=is_adapter)
    name, limit = "merged" if is_adapter else "model", EXPORT_TOLERANCE[objective.config.dtype]
    difference = 0.0
    if run.rank == 0:
        partial = output_dir / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with no_bars():
            if is_adapter:
                _save_adapter(model, weights, output_dir / "adapter")
                _save_merged(output_dir / "adapter", partial, objective, base_dir)
            else:
                code = objective.config.revision, objective.config.trust_remote_code
                with declared(model, declared_config(base_dir, *code)):
                    model.save_pretrained(partial, state_dict=weights, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(partial)
            if prompt_ids is not None:
                pq.write_table(
                    pa.table({"prompt_id": pa.array(sorted(set(prompt_ids)), pa.binary(16))}), partial / TRAINED_ON
                )
            difference = _difference(engine_outputs, _reloaded_outputs(objective, partial, probe.sequences))
        if difference <= limit:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            partial.replace(output_dir / name)
    shared: list[Any] = [difference]
    dist.broadcast_object_list(shared, src=0)
    if not shared[0] <= limit:
        raise IntegrityError(
            f"export: outputs of the reloaded model differ from the engine's by {shared[0]:.3g} relative, allowed "
            f"{limit:g}; left for inspection in {output_dir / name}.partial"
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


def _reloaded_outputs(objective: Objective, model_dir: Path, sequences: Sequence[Sequence[int]]) -> Tensor:
    """What transformers makes of the folder, one unpadded sequence after the other on a CPU, flat."""
    options = {"dtype": DTYPES[objective.config.dtype], "use_safetensors": True, "local_files_only": True}
    options["trust_remote_code"] = objective.config.trust_remote_code
    model = objective.auto_class.from_pretrained(model_dir, **options).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([list(ids)])).logits.double().flatten() for ids in sequences])


def _difference(engine_outputs: Tensor, reloaded_outputs: Tensor) -> float:
    """Largest |difference| / max(1, largest |output|); inf for another number of outputs."""
    if reloaded_outputs.shape != engine_outputs.shape:
        return float("inf")
    scale = max(1.0, engine_outputs.abs().max().item())
    return (reloaded_outputs - engine_outputs).abs().max().item() / scale


def _save_adapter(model: Any, weights: dict[str, Tensor], adapter_dir: Path) -> None:
    shutil.rmtree(adapter_dir, ignore_errors=True)
    model.save_pretrained(adapter_dir, state_dict=weights)


def _save_merged(adapter_dir: Path, merged_dir: Path, objective: Objective, base_dir: str) -> None:
    """Merge in fp32 on the CPU from the saved files, so that what is published is what the adapter folder says."""
    from peft import PeftModel

    load = load_causal if objective.auto_class is AutoModelForCausalLM else load_reward
    config = objective.config
    code: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    base = load(base_dir, dtype="fp32", device="cpu", **code)
    merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
    merged.to(DTYPES[objective.config.dtype]).save_pretrained(merged_dir, max_shard_size=SHARD_SIZE)
