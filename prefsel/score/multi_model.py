"""Several causal models over one pass: a shard is read, tokenised and packed once, then goes forward through each.

    groups ─ windows ─┬─ policy ────► its columns
                      └─ reference ─► its columns

Each window meets every model before the next one, so nothing is kept; numbers, bit for bit, are those of each alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from prefsel.models.declared import declared_config
from prefsel.models.loading import DTYPES
from prefsel.score.contract import ScoredShard
from prefsel.score.engine import Engine, EngineResult
from prefsel.score.scorers import CausalLogpsScorer
from prefsel.score.windows import Windows


class MultiModelScorer:
    """Scorers whose encoders give the same tokens."""

    def __init__(self, scorers: Sequence[CausalLogpsScorer]) -> None:
        """Take over loaded scorers; the first one tokenises for all.

        The row is what the device still holds beside all of them, the same for each: its activations are freed before
        the next model runs.
        """
        self.scorers = scorers
        budget = min(engine.token_budget for engine in self.engines)
        for engine in self.engines:
            engine.token_budget = budget

    @property
    def engines(self) -> list[Engine]:
        """One per scorer."""
        return [scorer.engine for scorer in self.scorers]

    def begin(self, groups: pa.Table) -> Windows:
        """The windows of a table of `schema.GROUPS`, in preparation."""
        return self.engines[0].begin(groups)

    def score(self, windows: Windows) -> list[ScoredShard]:
        """One `ScoredShard` per scorer; what tokenising took is counted with the first."""
        results = [EngineResult() for _ in self.scorers]
        for window in windows:
            results[0].count_tokenised(window)
            for engine, result in zip(self.engines, results):
                engine.add(window, result)
        return [scorer.shard(result) for scorer, result in zip(self.scorers, results)]


def tokenizer_key(tokenizer: Any) -> str | None:
    """What a fast tokenizer's output follows from, template and special tokens included; None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rest = [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.blake2b(f"{backend.to_str()}\n{json.dumps(rest)}".encode(), digest_size=16).hexdigest()


def weights_bytes(path: str, dtype: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Memory of a causal model's weights, from its configuration alone: nothing is downloaded or read."""
    config = declared_config(path, revision, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPES[dtype].itemsize
