"""Where a model's positions begin, and which padded numbers are others than before padding was left to the models.

Earlier versions gave padded models the positions 0, 1, 2, … and let rotary embeddings follow the longest row.
"""

from __future__ import annotations

from typing import Any

from prefsel.models.rotary import length_ropes, rope_parameters

POSITIONS_FROM_IDS = frozenset(
    (
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "data2vec-text"),
        *("mpnet", "longformer", "luke", "lilt", "ibert", "esm", "markuplm", "layoutlmv3"),
    )
)
"""Encoders that count positions from `pad_token_id + 1` (`create_position_ids_from_input_ids` in transformers)."""
OTHER_POSITIONS = frozenset(("nystromformer", "mra", "yoso"))
"""Encoders whose own positions begin at 2."""
PADDING_COUNTS = frozenset(("xlnet", "convbert", "fnet", "mobilebert", "funnel", "reformer", "big_bird"))
"""Models in which padding is read, averaged over or switches the attention; see `neighbours`."""

VERSION = 2


def num_positions(config: Any) -> int | None:
    """The longest sequence a configuration has positions for, in tokens; None: it declares none."""
    declared: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if declared and config.model_type in POSITIONS_FROM_IDS:
        return declared - config.pad_token_id - 1
    return declared


def padded_version(config: Any, max_length: int | None, *, has_own_code: bool) -> int | None:
    """What a recipe says where padded numbers changed; None, and nothing in the recipe, where they did not.

    Args:
        config: Of the model.
        max_length: Longest sequence, in tokens; None: no limit.
        has_own_code: Whether the repository's code runs, of which nothing is known.
    """
    text = config.get_text_config()
    changed = has_own_code or config.model_type in POSITIONS_FROM_IDS | OTHER_POSITIONS | PADDING_COUNTS
    if ropes := length_ropes(config):
        # Up to here every sequence has the same frequencies, whatever lies beside it.
        same = [getattr(text, "max_position_embeddings", None) or 0]
        if "longrope" in ropes:
            key = "original_max_position_embeddings"
            same += [one[key] for one in rope_parameters(config) if key in one]
        changed |= max_length is None or max_length > min(same)
    return VERSION if changed else None
