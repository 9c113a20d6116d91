"""Identity: ids of prompts, completions and pairs, digests of files, and the role a prompt's id gives it.

Ids are blake2b-128 over canonical bytes, so they depend on content alone: not on order, sharding, file or source.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from prefsel.errors import invalid
from prefsel.ingest import hub
from prefsel.ingest.locations import is_dataset_name, open_stream
from prefsel.ingest.remote import reachable

Message: TypeAlias = Mapping[str, Any]

ID_BYTES = 16
TRAIN, HOLDOUT, PROXY, VALIDATION = 0, 1, 2, 3

_CHUNK_BYTES = 1 << 20
# `json.dumps` with arguments builds an encoder per call, which cost a third of the time of an id.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def canonical(messages: Iterable[Message]) -> bytes:
    """The bytes that identify `messages`: compact JSON of `[[role, content], …]` in UTF-8.

    A message with further keys is `[role, content, {…}]`, keys sorted.

    Raises:
        UnicodeEncodeError: a message holds a lone surrogate.
    """
    return _encode([_parts(message) for message in messages]).encode("utf-8")


def _parts(message: Message) -> list[Any]:
    if len(message) == 2:
        return [message["role"], message["content"]]
    return [message["role"], message["content"], sorted_keys(rest_of(message))]


def rest_of(message: Message) -> dict[str, Any]:
    """What a message holds besides role and content."""
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def sorted_keys(value: Any) -> Any:
    """A JSON value whose objects have their keys in order, at every depth."""
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(one) for one in value] if isinstance(value, list) else value


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=ID_BYTES).digest()


def prompt_id(prompt: Iterable[Message]) -> bytes:
    """The 16-byte id of a prompt."""
    return _hash(canonical(prompt))


def completion_id(prompt: bytes, messages: Iterable[Message]) -> bytes:
    """The 16-byte id of a completion of the prompt with id `prompt`."""
    return _hash(prompt + canonical(messages))


def pair_id(prompt: bytes, chosen: bytes, rejected: bytes, aspect: str | None) -> bytes:
    """The 16-byte id of a labelled pair, or its mirror id when `chosen` and `rejected` are swapped."""
    return _hash(prompt + chosen + rejected + (aspect or "").encode("utf-8"))


def file_digest(uri: str, *, filesystem: pafs.FileSystem | None = None) -> str:
    """blake2b-128 over the stored bytes of a local or remote file, 32 hex digits, in one streaming read.

    For a `datasets:` name it covers the Arrow files of a local folder, or the revision of the repository on the hub.

    Raises:
        UserError: nothing lies at `uri`, or it may not be read.
        PrefselError: its server could not be reached.
    """
    digest = blake2b(digest_size=ID_BYTES)
    with reachable(uri):
        if is_dataset_name(uri):
            for block in hub.identity_blocks(uri):
                digest.update(block)
            return digest.hexdigest()
        with open_stream(uri, filesystem) as stream:
            while block := stream.read(_CHUNK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _fraction(field: str, value: Decimal | str | float) -> Decimal:
    # Through the decimal text: a fraction of 0.1 means one tenth, not the double nearest to it.
    fraction = Decimal(str(value))
    if not 0 <= fraction <= 1:
        raise invalid(field, value, "a fraction from 0 to 1")
    return fraction


def split_of(
    prompt_ids: Any,
    *,
    holdout: Decimal | str | float,
    proxy: Decimal | str | float,
    validation: Decimal | str | float = 0,
    salt: str = "split",
) -> np.ndarray:
    """The role of every prompt: 0 train, 1 holdout, 2 proxy, 3 validation.

    u = blake2b-64(salt + prompt_id) / 2⁶⁴ is uniform in [0, 1): holdout if u < holdout, proxy if u < holdout + proxy,
    and so on. The same prompt has the same role in every file, shard and run, and another salt gives an independent
    split.

    Args:
        prompt_ids: 16-byte ids, an Arrow `binary(16)` array or a sequence of bytes, length N.
        holdout: fraction of the prompts that are held out.
        proxy: fraction of the prompts that train proxies.
        validation: fraction of the prompts that influence is measured against.
        salt: text hashed before each id.

    Returns:
        uint8 codes of shape (N,).

    Raises:
        UserError: a fraction outside [0, 1], or a sum above 1.
    """
    parts = {"holdout": holdout, "proxy": proxy, "validation": validation}
    shares = [_fraction(name, value) for name, value in parts.items()]
    if sum(shares) > 1:
        raise invalid(" + ".join(parts), str(sum(shares)), "at most 1")
    if not any(shares):  # a refresh looks at every prompt again, and hashing is most of that
        return np.full(len(prompt_ids), TRAIN, np.uint8)
    # 63 of the 64 bits: a threshold of 1.0 is then 2⁶³, which a uint64 holds.
    uniform = hash_bits(prompt_ids, salt) >> np.uint64(1)
    edges = np.array([int(edge * 2**63) for edge in itertools.accumulate(shares)], np.uint64)
    place = np.searchsorted(edges, uniform, side="right")
    return np.array([HOLDOUT, PROXY, VALIDATION, TRAIN], np.uint8)[place]


def fold_of(prompt_ids: Any, *, folds: int, seed: int) -> np.ndarray:
    """The fold of every prompt, 0 to folds − 1, int64 (N,): the same in every file, shard and run.

    Args:
        prompt_ids: 16-byte ids, as for `split_of`.
        folds: how many.
        seed: another seed deals the prompts anew.
    """
    return (hash_bits(prompt_ids, f"fold {seed} ") % np.uint64(folds)).astype(np.int64)


def hash_bits(prompt_ids: Any, salt: str) -> np.ndarray:
    """blake2b-64 of `salt` and each id, uint64 (N,): numbers that are as good as random and the same in every run."""
    if isinstance(prompt_ids, pa.Array | pa.ChunkedArray):
        prompt_ids = prompt_ids.to_pylist()
    prefix = salt.encode("utf-8")
    digests = b"".join([blake2b(prefix + one, digest_size=8).digest() for one in prompt_ids])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
