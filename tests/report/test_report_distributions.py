from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from committed import SCORES, commit_corpus
from hypothesis import given
from hypothesis import strategies as st

from prefsel.report import distributions
from prefsel.report.distributions import Drawn, Sketch, bin_edges, counts, histograms, sketch

SOME = st.lists(st.sampled_from([0.0, 1.0, -60.0]) | st.floats(-3, 3), min_size=1, max_size=200)


def of(scores: list[float], parts: int = 3) -> list[Sketch]:
    return [Sketch(len(part), np.sort(part)) for part in np.array_split(np.array(scores), parts)]


def test_a_sketch_is_all_scores_of_few_and_a_part_of_many(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = rng.normal(size=3_000).tolist()
    corpus = commit_corpus(tmp_path, [[3.0, None, 1.0], many, [None]])
    few, part, none = (sketch(shard, (corpus.storage, SCORES)) for shard in corpus.shards)
    assert (few.num_scores, few.score_K.tolist()) == (2, [1.0, 3.0])
    assert (part.num_scores, len(part.score_K)) == (3_000, distributions.SKETCH)
    assert (part.score_K[0], part.score_K[-1]) == (min(many), max(many))
    for share in (0.1, 0.5, 0.9):
        assert part.score_K[int(share * 255)] == pytest.approx(np.quantile(many, share), abs=0.05)
    assert none.num_scores == 0


def test_outliers_do_not_squash_the_others() -> None:
    rng = np.random.default_rng(0)
    scores = [*rng.normal(size=1_000), *([-60.0] * 10), *([55.0] * 10)]
    edges = bin_edges(of(scores))
    assert -8 < edges[0] < -5
    assert 5 < edges[-1] < 8
    # A sixth of the bins at least hold the middle 80 %; of plain min to max it would be one bin.
    assert ((edges > -1.3) & (edges < 1.3)).sum() >= len(edges) / 6


def test_nothing_of_a_normal_distribution_lies_beyond() -> None:
    scores = np.random.default_rng(1).normal(100, 0.5, 5_000).tolist()
    edges = bin_edges(of(scores))
    assert edges[0] == min(scores)
    assert edges[-1] == pytest.approx(max(scores))
    assert len(edges) - 1 == 35  # twice the cube root of 5,000


def test_a_cut_is_an_edge_to_the_last_digit() -> None:
    scores = np.random.default_rng(2).normal(size=2_000).tolist()
    cut = float(np.quantile(scores, 0.7))
    edges = bin_edges(of(scores), [cut])
    assert cut in edges
    assert edges[0] == pytest.approx(min(scores))
    low, high = (float(one) for one in np.quantile(scores, [0.2, 0.8]))
    edges = bin_edges(of(scores), [low, high])
    assert {low, high} <= set(edges.tolist())
    assert np.diff(edges) == pytest.approx(np.full(len(edges) - 1, edges[1] - edges[0]))


@given(SOME, st.lists(st.floats(-4, 4), max_size=3))
def test_edges_rise_evenly_over_the_scores(scores: list[float], marks: list[float]) -> None:
    edges = bin_edges(of(scores), marks)
    assert (np.diff(edges) > 0).all()
    assert 1 <= len(edges) - 1 <= distributions.MOST_BINS + 2
    assert np.diff(edges) == pytest.approx(np.full(len(edges) - 1, np.diff(edges).mean()), rel=1e-6)
    inside = [mark for mark in marks if edges[0] <= mark <= edges[-1]]
    assert not inside or any(mark in edges for mark in inside)


def test_counts_are_those_of_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scores = [[None if n % 7 == 0 else float(rng.integers(-30, 60)) / 10 for n in range(size)] for size in (25, 40, 1)]
    corpus = commit_corpus(tmp_path, scores)
    rule = {"kind": "top", "score": "score_s", "ratio": 0.4}
    kept = corpus.keep("selections/top", rule)
    edges = np.array([-1.0, 0.0, 1.0, 2.0, 3.0])
    drawn = Drawn(corpus.storage, SCORES, "selections/top", edges)
    found = histograms(drawn, [counts(shard, drawn) for shard in corpus.shards])

    def place(score: float) -> int:
        return max(0, min(3, sum(edge <= score for edge in edges) - 1))

    expected = {"all": [0] * 4, "kept": [0] * 4}
    for ids, part in zip(corpus.ids, corpus.scores):
        for one, score in zip(ids, part):
            if score is not None:
                expected["all"][place(score)] += 1
                expected["kept"][place(score)] += one in kept
    assert {name: one["counts"] for name, one in found.items()} == expected
    assert found["all"]["edges"] == edges.tolist()


def test_a_score_on_the_cut_lies_on_the_kept_side(tmp_path: Path) -> None:
    corpus = commit_corpus(tmp_path, [[0.0, 1.0, 1.0, 2.0]])
    edges = np.array([0.0, 1.0, 2.0])
    for is_closed_right, expected in ((False, [1, 3]), (True, [3, 1])):
        drawn = Drawn(corpus.storage, SCORES, None, edges, is_closed_right)
        found = histograms(drawn, [counts(corpus.shards[0], drawn)])
        assert found == {"all": {"edges": [0.0, 1.0, 2.0], "counts": expected}}
