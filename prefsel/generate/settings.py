"""What a model's own generation settings say: which tokens end a response, and what nobody applies here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from prefsel.models.architecture import unwrapped

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(
        ("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "top_k", "min_p", "no_repeat_ngram_size"), (0,)
    ),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("length_penalty", "num_beams", "num_beam_groups", "guidance_scale", "renormalize_logits"), (0, 1)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings", "constraints"), ([],)
    ),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "penalty_alpha", "dola_layers"), ()),
    **dict.fromkeys(("top_h", "token_healing"), (0,)),
}
"""Generation settings that change what is drawn, with the values besides None that change nothing."""


def own_settings(model: Any) -> Any:
    """The generation settings that a loaded model came with; None: it has none."""
    return getattr(unwrapped(model), "generation_config", None)


def declared_settings(folder: str, config: Any) -> Any:
    """The generation settings that a model of a directory will have, without its weights.

    Args:
        folder: The directory.
        config: Its configuration, whose settings count where it has no `generation_config.json`, as in transformers.
    """
    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)  # nosec B615 # a folder
    return GenerationConfig.from_model_config(config)


def stop_tokens(settings: Any, tokenizer: Any, ending: str | None = None) -> list[int]:
    """The tokenizer's end token, those that generation settings add, and the one that ends a turn of the template.

    Many a base model that was tuned under ChatML names its old end token alone: it would say `<|im_end|>`, which is no
    part of the stored text, and go on with turns that it makes up.

    Args:
        settings: The model's own.
        tokenizer: Of the model.
        ending: What the template writes after an answer; its first token counts where it is one of its own, and no
            text.
    """
    declared = getattr(settings, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    last = tokenizer(ending.strip(), add_special_tokens=False)["input_ids"][:1] if ending and ending.strip() else []
    of_turn = [token for token in last if token in tokenizer.added_tokens_decoder]
    return sorted({token for token in (tokenizer.eos_token_id, *declared, *of_turn) if token is not None})


def ignored_settings(settings: Any) -> dict[str, Any]:
    """The generation settings that would change what is drawn: a temperature of its own, penalties, bars."""
    found = {name: getattr(settings, name, None) for name in NEUTRAL}
    return {name: value for name, value in found.items() if value is not None and value not in NEUTRAL[name]}
