"""Adam's moments of a finished training, whole and named as the weights: what preconditioned tangents and LESS need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor

from prefsel.errors import UserError
from prefsel.train.run_config import RunConfig
from prefsel.train.weight_decay import in_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square."""


def export_optimizer_state(
    config: RunConfig, engine: Any, output_dir: Path, *, step: int, learning_rate: float
) -> Path:
    """Write Adam's moments as `optimizer/exp_avg.safetensors` and `exp_avg_sq.safetensors`; every worker calls this.

    The tensors are fp32, whole, and named as the parameters of the exported model; `state.json` beside them holds
    `step`, `betas`, `eps`, and the `learning_rate` of the last step.

    Args:
        config: The run's options.
        engine: The engine, without adapters.
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
        values = _gather_moment(engine, moment, config.weight_decay)
        if is_writer:
            save_file(values, partial / f"{moment}.safetensors")
    if is_writer:
        state = {"step": step, "betas": config.adam_betas, "eps": config.adam_eps, "learning_rate": learning_rate}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    dist.barrier()
    return folder


def _gather_moment(engine: Any, moment: str, weight_decay: float) -> dict[str, Tensor]:
    """One of `MOMENTS` of every parameter, whole and fp32, on the CPU of worker 0 (elsewhere empty).

    Raises:
        UserError: As `export_optimizer_state`.
    """
    names = {parameter: name for name, parameter in engine.module.model.named_parameters()}
    # In the order in which the optimizer was given them.
    parameters = {names[one]: one for group in in_groups(names, weight_decay) for one in group}
    states: list[Mapping[str, Tensor]] = []
    if not engine.zero_optimization():
        # Stage 0 shards nothing: torch's own state, in bf16 that of fp32 copies in the order of the parameters.
        optimizer = engine.basic_optimizer
        states = [optimizer.state[copy] for group in optimizer.param_groups for copy in group["params"]]
    elif link := getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
        # Stages 1 and 2 find a parameter's state only after a step, and look for it once, after that of the first
        # group: where some weights decay, the others' was never found. A run resumed behind its last step takes none.
        engine.optimizer._hp_optimizer_states_linked = False
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
