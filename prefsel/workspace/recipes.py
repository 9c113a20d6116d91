"""Recipes: why two artifacts are, or are not, the same thing.

A fingerprint is the first 16 hex digits of blake2b over the canonical JSON of stage, output version, configuration
slice, model identities and upstream recipes; never of sources or shards. What depends on the whole corpus (moments,
selections, trained models) also carries the corpus fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# Raise when a stage's output for the same configuration changes meaning.
KINDS = (
    *("score", "tangent", "eligible", "metric", "selection", "dataset", "model", "scratch"),
    *("prompts", "generate", "pairs", "evaluate", "verdicts"),
)
OUTPUT_VERSIONS = dict.fromkeys(KINDS, 1) | {"metric": 2, "selection": 2}


def canonical(value: Any) -> bytes:
    """`value` as canonical JSON: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


def hash_hex(*parts: str) -> str:
    """blake2b-128 over several strings, order kept."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def recipe(
    stage: str,
    settings: Mapping[str, Any],
    *,
    models: Mapping[str, str] | None = None,
    upstream: Mapping[str, str] | None = None,
    corpus: str | None = None,
) -> dict[str, Any]:
    """The recipe of an artifact.

    Args:
        stage: key of `OUTPUT_VERSIONS`.
        settings: the configuration slice that changes the output.
        models: model name → identity (weights hash or hub revision).
        upstream: artifact name → fingerprint.
        corpus: the corpus fingerprint, for what depends on all rows.
    """
    made_of = {"stage": stage, "version": OUTPUT_VERSIONS[stage], "settings": dict(settings)}
    optional = {"models": models, "upstream": upstream, "corpus": corpus}
    return made_of | {key: value for key, value in optional.items() if value is not None}


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """The 16 hex digits that stand after `@` in artifact names."""
    return hashlib.blake2b(canonical(made_of), digest_size=32).hexdigest()[:16]


def corpus_fingerprint(shards: Iterable[tuple[str, str, str]]) -> str:
    """Hash over the sorted (source, shard, content) triples a whole-corpus artifact saw."""
    return hash_hex(*(":".join(shard) for shard in sorted(shards)))
