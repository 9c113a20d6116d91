"""The `proxy` part of a corpus → the small models a configuration asks for (`scratch_policy`, `scratch_reward`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config import ScratchPolicy, ScratchReward
from prefsel.errors import UserError
from prefsel.pairs.export import export_rows
from prefsel.pairs.reader import PairReader
from prefsel.scratch.models import RewardPair, save, train_policy, train_reward, train_tokenizer
from prefsel.workspace.catalog import ShardRef

MAX_PAIRS = 20_000
"""Pairs read at most: these models are for trials, and their training must not grow with the corpus."""


def proxy_pairs(reader: PairReader, shards: Sequence[ShardRef]) -> list[dict[str, Any]]:
    """The first `MAX_PAIRS` pairs whose prompts are set aside for proxies: prompt, chosen, rejected, aspect."""
    found: list[dict[str, Any]] = []
    for rows in _proxy_rows(reader, shards):
        found += rows
        if len(found) >= MAX_PAIRS:
            break
    return found[:MAX_PAIRS]


def _proxy_rows(reader: PairReader, shards: Sequence[ShardRef]) -> Iterator[list[dict[str, Any]]]:
    for shard in shards:
        pairs = reader.pairs(shard)
        is_proxy = pc.equal(reader.dropped(shard, pairs), "proxy").fill_null(False)
        rows = np.flatnonzero(is_proxy.to_numpy(zero_copy_only=False))
        if len(rows):
            source = pa.table({"source": pa.repeat(pa.scalar(shard.source), pairs.num_rows)})
            yield export_rows(rows, pairs, reader.groups(shard), source, {}).to_pylist()


def make_model(spec: ScratchPolicy | ScratchReward, pairs: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train one small model and write it, with its tokenizer, in Hugging Face layout.

    Returns:
        What the stage reports: `num_pairs` used, and for a reward model the accuracy on held-out pairs per head.

    Raises:
        UserError: a head without a single pair of its aspect.
    """
    texts = (m["content"] for pair in pairs for side in ("prompt", "chosen", "rejected") for m in pair[side])
    tokenizer = train_tokenizer(texts, kind=spec.tokenizer.kind, vocab_size=spec.tokenizer.vocab_size)
    shape = {
        key: getattr(spec, key)
        for key in ("hidden_size", "num_layers", "num_heads", "steps", "batch_tokens", "lr", "seed", "max_length")
    }
    facts: dict[str, Any] = {"num_pairs": len(pairs)}
    if isinstance(spec, ScratchPolicy):
        model: Any = train_policy(tokenizer, [pair["prompt"] + pair["chosen"] for pair in pairs], **shape)
    else:
        labelled = _reward_pairs(spec, pairs)
        heads, union = (spec.heads, None) if spec.heads else ([], spec.name)
        model, accuracy = train_reward(tokenizer, labelled, heads=heads, union_head=union, **shape)
        facts |= {"num_pairs": len(labelled), "heldout_accuracy": accuracy}
    save(model, tokenizer, folder)
    return facts


def _reward_pairs(spec: ScratchReward, pairs: Sequence[dict[str, Any]]) -> list[RewardPair]:
    """Pairs as whole conversations; with named heads only the pairs of those aspects."""
    labelled = [
        RewardPair(pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"], pair["aspect"])
        for pair in pairs
        if not spec.heads or pair["aspect"] in spec.heads
    ]
    seen = {pair.head for pair in labelled}
    for head in spec.heads:
        if head not in seen:
            raise UserError(f"models.{spec.name}.heads: no pair of the proxy part has aspect {head!r}")
    if not spec.heads:  # one head for all: the aspect is not looked at
        return [RewardPair(pair.chosen, pair.rejected, None) for pair in labelled]
    return labelled
