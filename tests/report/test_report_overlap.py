from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from committed import commit_corpus

from prefsel.report.overlap import overlaps, shared_pairs

RULES = {
    "top": {"kind": "top", "score": "score_s", "ratio": 0.3},
    "few": {"kind": "top", "score": "score_s", "count": 2},
    "bottom": {"kind": "top", "score": "score_s", "ratio": 0.5, "reverse": True},
    "mid": {"kind": "band", "score": "score_s", "low": 10, "high": 60},
}


@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_what_two_selections_share_is_that_of_sets_of_ids(tmp_path: Path, num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    scores = [None if n % 9 == 0 else float(rng.integers(0, 12)) for n in range(60)]
    corpus = commit_corpus(tmp_path, [list(part) for part in np.array_split(np.array(scores, object), num_shards)])
    kept = {name: corpus.keep(f"selections/{name}", rule) for name, rule in RULES.items()}
    folders = [f"selections/{name}" for name in RULES]
    counts = [shared_pairs(shard, (corpus.storage, folders)) for shard in corpus.shards]
    num_eligible = sum(score is not None for score in scores)
    found = overlaps([{"name": name, "num_eligible": num_eligible} for name in RULES], counts)
    assert [(one["first"], one["second"]) for one in found] == list(combinations(RULES, 2))
    for one in found:
        first, second = kept[one["first"]], kept[one["second"]]
        assert (one["num_first"], one["num_second"]) == (len(first), len(second))
        assert one["num_shared"] == len(first & second)
        assert one["jaccard"] == len(first & second) / len(first | second)
        assert one["expected"] == len(first) * len(second) / num_eligible


def test_the_expectation_is_that_of_drawing_at_random() -> None:
    rng = np.random.default_rng(0)
    ours = set(range(30))
    shared = [len(ours & set(rng.choice(100, 20, replace=False))) for _ in range(4_000)]
    counts = [np.array([[30, 6], [6, 20]])]
    (found,) = overlaps([{"name": "a", "num_eligible": 60}, {"name": "b", "num_eligible": 100}], counts)
    # Where one could choose from fewer pairs, the other is drawn from all 100.
    assert found["expected"] == 6.0 == pytest.approx(np.mean(shared), abs=0.1)


def test_shards_without_kept_pairs_count_nothing(tmp_path: Path) -> None:
    corpus = commit_corpus(tmp_path, [[1.0, 2.0], [None], []])
    corpus.keep("selections/a", {"kind": "top", "score": "score_s", "count": 1})
    found = [shared_pairs(shard, (corpus.storage, ["selections/a"])).tolist() for shard in corpus.shards]
    assert found == [[[1]], [[0]], [[0]]]
