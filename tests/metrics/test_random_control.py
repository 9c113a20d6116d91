"""The random control: reproducible, independent of order, close to uniform."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from prefsel.errors import UserError
from prefsel.metrics import score_table
from prefsel.metrics.random_control import mix


def ids(num_rows: int) -> list[bytes]:
    return [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in range(num_rows)]


def naive(pair_id: bytes, seed: int) -> float:
    """SplitMix64 in Python integers, chained over seed, second and first half of the id."""

    def step(state: int) -> int:
        mask = (1 << 64) - 1
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    first, second = (int.from_bytes(pair_id[half : half + 8], "big") for half in (0, 8))
    return (step(step(step(seed) ^ second) ^ first) >> 11) / 2**53


def test_mix_is_splitmix64() -> None:
    # First three outputs of the reference implementation for seed 1234567.
    states = np.array([(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(3)], np.uint64)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_equals_a_plain_implementation() -> None:
    table = pa.table({"pair_id": pa.array(ids(50), pa.binary(16))})
    for seed in (0, 7, 2**64 - 1):
        assert score_table(table, "random", seed=seed).tolist() == [naive(pair_id, seed) for pair_id in ids(50)]


def test_depends_on_id_and_seed_alone() -> None:
    table = pa.table({"pair_id": pa.array(ids(100), pa.binary(16))})
    whole = score_table(table, "random")
    assert whole.tolist()[40:60] == score_table(table[40:60], "random").tolist()
    assert len(set(whole.tolist())) == 100
    assert not set(whole.tolist()) & set(score_table(table, "random", seed=1).tolist())


def test_is_close_to_uniform_even_for_counted_ids() -> None:
    score_N = score_table(pa.table({"pair_id": list(range(20_000))}), "random")
    # Twenty bins of 1 000 expected rows each: six standard deviations are about 190.
    counts, _ = np.histogram(score_N, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 190
    assert abs(np.corrcoef(np.arange(20_000), score_N)[0, 1]) < 0.04


def test_needs_pair_ids_and_a_valid_seed() -> None:
    with pytest.raises(UserError, match="missing columns pair_id"):
        score_table(pa.table({"x": [1]}), "random")
    with pytest.raises(UserError, match="seed: got -1"):
        score_table(pa.table({"pair_id": [1]}), "random", seed=-1)
