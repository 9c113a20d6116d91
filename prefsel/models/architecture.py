"""What follows from a model's class and configuration: its size, and whether packed rows give exactly its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from prefsel.models.packing import ModelShape

PACKED_MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo", "olmo2", "phi", "phi3", "starcoder2"),
    *("gpt2", "gpt_neox"),
)
"""Decoders whose packed log-probs are tested against one sequence at a time. Every other model is padded."""
STATELESS_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that depend on a token's position alone, not on the longest sequence of the batch."""
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping")


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


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block, and every module back afterwards: a model at hand may be in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
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
