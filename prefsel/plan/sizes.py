"""How large a model is, from its configuration alone, and what memory scoring and training with it takes.

config.json ─▶ a model without weights ─▶ ModelSize ─▶ bytes of weights, activations, logits, optimizer states
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefsel.config import ScratchPolicy, ScratchReward
from prefsel.config.training import Optimization
from prefsel.models.architecture import model_shape
from prefsel.models.declared import declared_config
from prefsel.models.directory import reading
from prefsel.models.head import LOGITS_BYTES
from prefsel.models.packing import ModelShape

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CONTEXT_GIB = 1.5
"""What a process takes of a GPU before any weight lies there: context, kernels, blocks that the allocator keeps."""
ROW_TOKENS = 8192
"""Tokens of a row where the configuration says none: what a CPU takes, and the least that is worth a GPU."""


@dataclass(frozen=True)
class ModelSize:
    """What FLOPs and bytes follow from."""

    shape: ModelShape
    parameters: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


@lru_cache(maxsize=64)
def model_size(path: str, revision: str | None, trust_remote_code: bool, role: str) -> ModelSize:
    """The size of a model of a directory or a hub, whose weights are neither read nor fetched.

    Args:
        path: Directory or hub id.
        revision: Of a hub id.
        trust_remote_code: Whether its code may run.
        role: `policy` for a language model, `reward` for a classifier.

    Raises:
        UserError: Its configuration cannot be had.
    """
    config = declared_config(path, revision, trust_remote_code)
    auto = AutoModelForCausalLM if role == "policy" else AutoModelForSequenceClassification
    with reading(f"model {path}: cannot be built"), torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    parameters = sum(one.numel() for one in model.parameters())
    return ModelSize(model_shape(model), parameters, hidden, int(inner), int(text.vocab_size))


def scratch_size(spec: ScratchPolicy | ScratchReward, vocab_size: int) -> ModelSize:
    """The size of a model that is made on the spot (`scratch.models`): a Llama, embeddings and head apart."""
    d, inner = spec.hidden_size, 8 * spec.hidden_size // 3
    trunk = spec.num_layers * (4 * d * d + 3 * d * inner)
    head = vocab_size * d if spec.role == "policy" else 0
    shape = ModelShape(trunk, head, spec.num_layers, d)
    return ModelSize(shape, trunk + head + vocab_size * d, d, inner, vocab_size)


@dataclass(frozen=True)
class Memory:
    """What one GPU must hold, GiB."""

    weights: float
    activations: float
    """Of one row, logits and the process's own memory included."""
    optimizer: float = 0.0
    """Gradients and optimizer states."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations + self.optimizer


def scoring_memory(sizes: list[tuple[ModelSize, str]], *, token_budget: int | None, gpus: int) -> Memory:
    """Of one replica on each of its GPUs: weights by dtype, and one layer's activations of a row at a time.

    Args:
        sizes: Every model that it loads, with its dtype.
        token_budget: Tokens of a row; None: `ROW_TOKENS`.
        gpus: That a replica is spread over.
    """
    weights = sum(size.parameters * ITEM_BYTES[dtype] for size, dtype in sizes) / gpus
    # Of one layer: the residual stream, its normed copy, and queries, keys, values and output or the gated product.
    row = max(
        (3 * size.hidden_size + max(4 * size.shape.attention_width, 3 * size.intermediate_size)) * ITEM_BYTES[dtype]
        for size, dtype in sizes
    )
    heads = [size.vocab_size for size, _ in sizes if size.shape.head_parameters]
    logits = min(LOGITS_BYTES, 1024 * max(heads, default=0) * 10)
    return Memory(_gib(weights), _gib((token_budget or ROW_TOKENS) * row + logits) + CONTEXT_GIB)


def training_memory(size: ModelSize, options: Optimization, *, workers: int, lora_rank: int | None = None) -> Memory:
    """Of one worker: the model's states as ZeRO shares them out, and the activations of one micro-batch.

    Per weight: 2 bytes and 2 of gradient in bf16, 12 of fp32 weight and Adam's moments; 4, 4 and 8 in fp32. Stage 1
    shares the optimizer's over the workers, 2 the gradients too, 3 the weights too. Activations per token and layer
    after Korthikanti et al. (arXiv 2205.05198), without the square of the length that packed attention never holds;
    with checkpointing one hidden state a layer, and one layer whole.
    """
    item = ITEM_BYTES[options.dtype]
    trained = size.parameters
    if lora_rank is not None:
        # Two thin matrices beside each linear one: a share r (in + out) / (in · out) of it, taken at width hidden_size.
        trained = math.ceil(2 * lora_rank / size.hidden_size * size.shape.trunk_parameters)
    stage, offload = options.zero_stage, options.offload
    weights = size.parameters * item / (workers if stage == 3 else 1)
    gradients = trained * item / (workers if stage >= 2 else 1)
    states = trained * (12 if item == 2 else 8) / (workers if stage >= 1 else 1)
    if offload != "none":
        states = 0.0
    if offload == "optimizer_and_weights":
        weights = 2 * size.parameters * item / max(1, size.shape.num_layers)  # the layer at work and the next one
    layer = (10 * size.hidden_size + 4 * size.shape.attention_width + 4 * size.intermediate_size) * item
    layers = size.shape.num_layers
    kept = layers * size.hidden_size * item + layer if options.gradient_checkpointing else layers * layer
    bucket = min(500_000_000, trained) * item if stage else 0
    activations = options.token_budget * kept + (LOGITS_BYTES if size.shape.head_parameters else 0) + bucket
    return Memory(_gib(weights), _gib(activations) + CONTEXT_GIB, _gib(gradients + states))


def _gib(num_bytes: float) -> float:
    return num_bytes / 2**30
