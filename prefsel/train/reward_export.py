"""From a Hugging Face folder, causal or classifier, to the reward model DeepSpeed trains, and back to a folder.

The folder gets its name only after `AutoModelForSequenceClassification` reloaded it and gave the engine's rewards, one
unpadded sequence at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from prefsel.errors import IntegrityError, UserError, invalid
from prefsel.models.loading import check_directory, load_reward
from prefsel.models.packing import PackedBatch
from prefsel.models.padded import PaddedBatch, padded_rewards
from prefsel.models.reward import packed_rewards
from prefsel.schema import TRAINED_ON
from prefsel.scratch.models import no_bars
from prefsel.train.deepspeed_config import build_deepspeed_config
from prefsel.train.export import DTYPES, SHARD_SIZE, gather_weights
from prefsel.train.reward_config import RewardConfig

OUTPUT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |difference| / max(1, largest |reward|) between the engine's and the reloaded model's rewards."""
HEAD = "score"


class RewardModule(nn.Module):
    """The classifier behind the one call DeepSpeed wraps, so that its hooks see every forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch | PaddedBatch) -> Tensor:
        """Rewards of the batch's completions, [C] float64; the model's own dtype decides what the head rounds to."""
        if isinstance(batch, PaddedBatch):
            return padded_rewards(self.model, batch)[:, 0]
        return packed_rewards(self.model, batch)[:, 0]


def choose_pad_token(model_config: Any, tokenizer: Any) -> int:
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


def load_start(config: RewardConfig, model_dir: str, tokenizer: Any, device: torch.device) -> nn.Module:
    """The initial reward model in training mode, without the model's own dropout.

    A classifier is taken as it is; of a causal language model the trunk is taken, with a seeded head in place of its
    own. Dropout is off so that a step is the same however it is spread over workers.

    Raises:
        UserError: As `load_reward`; a classifier with several outputs; a causal model that transformers has no
            classifier for; or ZeRO-3 without the package accelerate.
    """
    check_directory(model_dir)
    options: dict[str, Any] = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    options["local_files_only"] = Path(model_dir).is_dir()
    try:
        model_config = AutoConfig.from_pretrained(model_dir, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model_dir}: its configuration cannot be loaded: {error}") from error
    is_classifier = any(name.endswith("ForSequenceClassification") for name in model_config.architectures or [])
    if is_classifier and model_config.num_labels != 1:
        raise invalid(f"num_labels of model {model_dir}", model_config.num_labels, "1, or a causal language model")
    if config.zero_stage == 3:
        # While this object lives, transformers loads every weight straight into its shards.
        if not is_accelerate_available():
            raise UserError("zero_stage: got 3, which needs the package accelerate to load a model into shards")
        sharding = HfDeepSpeedConfig(build_deepspeed_config(config, world_size=dist.get_world_size()))
    if is_classifier:
        model: Any = load_reward(
            model_dir,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        model = _with_fresh_head(config, model_dir, model_config, options).to(device)
    if config.zero_stage == 3:
        del sharding
    choose_pad_token(model.config, tokenizer)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _with_fresh_head(config: RewardConfig, model_dir: str, model_config: Any, options: dict[str, Any]) -> nn.Module:
    """The trunk of a causal language model under a head of one output, drawn from the run's seed."""
    model_config.num_labels = 1
    try:
        with _quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                model_dir,
                config=model_config,
                dtype=DTYPES[config.dtype],
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {model_dir}: its trunk cannot be loaded as a classifier: {error}") from error
    missing = {str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])}
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


def export_reward_model(
    config: RewardConfig,
    engine: Any,
    tokenizer: Any,
    output_dir: Path,
    *,
    prompt_ids: Sequence[bytes],
    probe: PackedBatch | PaddedBatch,
    probe_tokens: Sequence[Sequence[int]],
) -> tuple[Path, float]:
    """Write the engine's weights in Hugging Face layout and prove that they are the engine's; every worker calls this.

    Args:
        config: The run's options; `dtype` is the one of the weights written.
        engine: The engine around a `RewardModule`.
        tokenizer: Saved beside the weights, with the model's pad token.
        output_dir: Receives `model/`.
        prompt_ids: Every prompt trained on or held out; written to `trained_on.parquet`, sorted, each once.
        probe: A batch of completions for the engine.
        probe_tokens: The same completions with their prompts, in the order of the batch's `completion_index`.

    Returns:
        The folder, and the largest relative difference of the rewards, the same on every worker.

    Raises:
        IntegrityError: The reloaded model's rewards differ from the engine's.
    """
    engine.eval()
    with torch.no_grad():
        engine_C = engine(probe.to(engine.device)).cpu()
    model = engine.module.model
    weights = gather_weights(model)
    difference = 0.0
    if dist.get_rank() == 0:
        partial = output_dir / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with no_bars():
            model.save_pretrained(partial, state_dict=weights, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(partial)
        ids = pa.array(sorted(set(prompt_ids)), pa.binary(16))
        pq.write_table(pa.table({"prompt_id": ids}), partial / TRAINED_ON)
        difference = _difference(engine_C, partial, probe_tokens, config)
        if difference <= OUTPUT_TOLERANCE[config.dtype]:
            shutil.rmtree(output_dir / "model", ignore_errors=True)
            partial.replace(output_dir / "model")
    shared: list[Any] = [difference]
    dist.broadcast_object_list(shared, src=0)
    if not shared[0] <= OUTPUT_TOLERANCE[config.dtype]:
        raise IntegrityError(
            f"export: rewards of the reloaded model differ from the engine's by {shared[0]:.3g} relative, allowed "
            f"{OUTPUT_TOLERANCE[config.dtype]:g}; left for inspection in {output_dir / 'model.partial'}"
        )
    return output_dir / "model", shared[0]


def _difference(
    engine_C: Tensor, model_dir: Path, probe_tokens: Sequence[Sequence[int]], config: RewardConfig
) -> float:
    """Largest |difference| / max(1, largest |reward|) of the model in `model_dir`, called as transformers is."""
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "trust_remote_code": config.trust_remote_code}
    with no_bars():
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, use_safetensors=True, **options).eval()
    with torch.no_grad():
        reloaded_C = torch.cat([model(torch.tensor([list(ids)])).logits[0].double() for ids in probe_tokens])
    scale = max(1.0, engine_C.abs().max().item())
    return (reloaded_C - engine_C).abs().max().item() / scale
