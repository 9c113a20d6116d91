"""What a score's report says of it, against NumPy over all rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from prefsel.pairs.score_report import correlation
from prefsel.pairs.score_shards import score_table, shard_info


def infos(chosen_N: np.ndarray, rejected_N: np.ndarray, score_N: np.ndarray, num_shards: int) -> list[dict]:
    """The ledgers of a corpus that is dealt over shards; pairs without a score are dropped."""
    found = []
    for shard in range(num_shards):
        at = slice(shard, None, num_shards)
        lengths = (chosen_N[at], rejected_N[at])
        num_rows = len(score_N[at])
        like = {
            "pair_id": pa.array([bytes([shard, n]) * 8 for n in range(num_rows)], pa.binary(16)),
            "source": pa.array(["uf"] * num_rows),
            "aspect": pa.array([None] * num_rows, pa.string()),
        }
        dropped = pa.array([None if known else "missing_x" for known in np.isfinite(score_N[at])], pa.string())
        found.append(shard_info(score_table(like, score_N[at], dropped, lengths), lengths))
    return found


@pytest.mark.parametrize("num_shards", [1, 3])
def test_length_correlation_is_with_chosen_minus_rejected(num_shards: int) -> None:
    rng = np.random.default_rng(0)
    chosen_N, rejected_N = (rng.integers(1, 90, 60).astype(float) for _ in range(2))
    score_N = 0.1 * chosen_N - 0.3 * rejected_N + rng.standard_normal(60)
    score_N[::7] = np.nan  # dropped
    chosen_N[5] = np.nan  # of unknown length
    known_N = np.isfinite(score_N) & np.isfinite(chosen_N)
    expected = np.corrcoef(score_N[known_N], (chosen_N - rejected_N)[known_N])[0, 1]
    assert expected > 0.5  # long answers score high, so that a turned sign, or one length alone, is another number
    assert abs(expected - np.corrcoef(score_N[known_N], chosen_N[known_N])[0, 1]) > 0.1
    found = correlation(info["length"] for info in infos(chosen_N, rejected_N, score_N, num_shards) if info["length"])
    assert found == pytest.approx(expected, rel=1e-12)


def test_length_correlation_by_hand() -> None:
    # Differences 2, 0, -2 and scores 1, 0, -1: they rise together; with -scores they fall.
    chosen_N, rejected_N, score_N = np.array([3.0, 1.0, 1.0]), np.array([1.0, 1.0, 3.0]), np.array([1.0, 0.0, -1.0])
    for sign in (1.0, -1.0):
        (info,) = infos(chosen_N, rejected_N, sign * score_N, 1)
        assert correlation([info["length"]]) == pytest.approx(sign)
    (info,) = infos(chosen_N, rejected_N, np.ones(3), 1)
    assert correlation([info["length"]]) is None
