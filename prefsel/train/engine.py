"""The DeepSpeed engine around a model, and the process group it lives in."""

from __future__ import annotations

import math
import os
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from prefsel.models.architecture import model_shape, unwrapped
from prefsel.models.neighbours import require_causal, require_padding
from prefsel.models.packing import ModelShape
from prefsel.models.pair_batch import Batch
from prefsel.models.reward import own_pad_token
from prefsel.train import draws
from prefsel.train.deepspeed_config import build_deepspeed_config, lr_factor
from prefsel.train.objective import Objective, Run
from prefsel.train.weight_decay import optimizer_groups


class EngineModule(nn.Module):
    """A model behind the one call DeepSpeed wraps, so that its hooks see every forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """The objective's outputs of a batch, [C] float64; or logits, [1, T, V], of plain token ids, [1, T]."""
        if isinstance(batch, Tensor):
            logits: Tensor = self.model(input_ids=batch, use_cache=False).logits
            return logits
        return self.objective.outputs(self.model, batch)


def start_worker() -> torch.device:
    """Join the process group that exists or that the launcher's variables describe, or make one of a single worker."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # A launcher shows every worker either all GPUs of its machine or exactly its own one.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return device


def start_run(objective: Objective, model: nn.Module, device: torch.device, *, num_pairs: int) -> Run:
    """A DeepSpeed engine around a model with AdamW and the warm-up and cosine schedule.

    Args:
        objective: What is trained; its options decide the engine's.
        model: On `device`, or under ZeRO-3 in shards.
        device: This worker's.
        num_pairs: Draws of one epoch, from which the number of steps follows.

    Raises:
        UserError: The model cannot be packed, and its numbers depend on what pads them, or a policy is not causal.
    """
    config, world_size = objective.config, dist.get_world_size()
    num_steps = draws.num_steps(
        num_pairs, **config.model_dump(include={"global_batch_pairs", "num_epochs", "max_steps"})
    )
    factor = partial(
        lr_factor,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(config.warmup_ratio * num_steps),
        min_ratio=config.min_lr_ratio,
    )
    shape, module = _shape_of(model), EngineModule(model, objective)
    # Under ZeRO-3 this worker's shard has fewer numbers than the whole.
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=optimizer_groups(
            (parameter for parameter in module.parameters() if parameter.requires_grad), config.weight_decay
        ),
        config=build_deepspeed_config(config, world_size=world_size, num_parameters=num_parameters),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
    )
    is_packed, reason = objective.supports_packing(model)
    pad_token_id = own_pad_token(model) or 0
    if not is_packed:
        engine.eval()
        require_padding(model, lambda batch: engine(batch.to(device)), pad_token_id, what="training")
        if objective.auto_class is AutoModelForCausalLM:
            require_causal(model, lambda batch: engine(batch.to(device)))
        engine.train()
    return Run(
        objective=objective,
        engine=engine,
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        num_steps=num_steps,
        padding_reason=None if is_packed else reason,
        pad_token_id=pad_token_id,
        shape=shape,
    )


def _shape_of(model: nn.Module) -> ModelShape:
    """What a model's FLOPs follow from, adapters left out, even where weights are sharded: read off an empty copy."""
    inner = unwrapped(model)
    with torch.device("meta"):
        return model_shape(type(inner)(inner.config))
