"""Random: the control that every selector is held against."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prefsel.config import Options
from prefsel.metrics.statistics import Columns, Fitted, Metric

# SplitMix64 (Steele, Lea, Flood 2014): increment and multipliers of its mixing function.
INCREMENT = 0x9E37_79B9_7F4A_7C15
MULTIPLIERS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)


class RandomControl(Options):
    """Parameters of `random`."""

    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Another seed gives other scores; the score of a pair depends on the seed and its pair_id alone."""


def mix(word_N: np.ndarray) -> np.ndarray:
    """SplitMix64's next output for each state; a bijection of uint64."""
    word_N = word_N + np.uint64(INCREMENT)
    word_N = (word_N ^ (word_N >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    word_N = (word_N ^ (word_N >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return word_N ^ (word_N >> np.uint64(31))


def columns(params: RandomControl) -> tuple[str, ...]:
    """Only the identifier."""
    return ("pair_id",)


def score(columns: Columns, params: RandomControl, fitted: Fitted) -> np.ndarray:
    """A number in [0, 1) that depends on pair_id and seed alone: the same for any order and sharding; float64 [N]."""
    ids_NW = columns["pair_id"].astype(np.uint64)
    hash_N = mix(np.array([params.seed], np.uint64))
    hash_N = mix(hash_N ^ ids_NW[:, 1])
    hash_N = mix(hash_N ^ ids_NW[:, 0])
    # The 53 leading bits are what a float64 holds.
    return (hash_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


METRIC = Metric("random", RandomControl, columns, score, paper="control")
