"""Fences and brackets against a full sort, over any sharding: ties, offsets, signed zeros, ids that are no hashes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import IntegrityError, UserError
from prefsel.select import brackets, cuts, radix
from prefsel.select import fences as fenced
from prefsel.select.fences import MAX_FENCES, Bounds, fences, positions

anything = st.floats(allow_nan=False, allow_infinity=False)
tied = st.sampled_from([0.5, 0.5, 0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6])
scores = st.lists(st.one_of(tied, anything), min_size=1, max_size=80)


def sharded(num_rows: int, num_shards: int, seed: int) -> list[np.ndarray]:
    place_N = np.random.default_rng(seed).integers(0, num_shards, num_rows)
    return [np.flatnonzero(place_N == shard) for shard in range(num_shards)]


def bounds_of(parts: list[np.ndarray]) -> Bounds:
    return Bounds.of([(len(part), fences(part)) for part in parts if len(part)])


def test_positions_take_in_both_ends() -> None:
    assert positions(1).tolist() == [0]
    assert positions(5).tolist() == [0, 4]
    assert positions(520).tolist() == [0, 173, 346, 519]
    large = positions(100_000)
    assert (len(large), large[0], large[-1]) == (MAX_FENCES, 0, 99_999)
    assert np.diff(large).max() == 393


@settings(deadline=None, max_examples=300)
@given(scores, st.integers(1, 5), st.integers(0, 99))
def test_every_rank_lies_in_its_bracket(values: list[float], num_shards: int, seed: int) -> None:
    score_N = np.array(values)
    found = bounds_of([score_N[rows] for rows in sharded(len(values), num_shards, seed)])
    ordered = sorted(values)
    assert found.num_rows == len(values)
    for rank, score in enumerate(ordered):
        bracket = found.bracket(rank)
        assert bracket.low <= score <= bracket.high
        assert sum(bracket.low < value < bracket.high for value in values) <= bracket.most_inside


@pytest.mark.parametrize("shape", ["normal", "ties", "sorted"])
def test_a_sample_finds_the_bracket_that_all_fences_give(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    rng = np.random.default_rng(1)
    score_N = rng.standard_normal(60_000)
    score_N = np.sort(score_N) if shape == "sorted" else np.where(rng.random(60_000) < 0.4, 0.25, score_N)
    found = bounds_of(np.split(score_N, 30))
    ranks = [0, 1, 17_999, 29_000, 42_000, 59_998, 59_999]
    with monkeypatch.context() as all_fences:
        all_fences.setattr(Bounds, "_about", lambda *_: (-math.inf, math.inf))
        expected = [found.bracket(rank) for rank in ranks]
    narrow = 0
    for size in (2, 8, 200, 8192):
        monkeypatch.setattr(fenced, "SAMPLE", size)
        assert [found.bracket(rank) for rank in ranks] == expected
        narrow += sum(math.isfinite(found._about(rank)[0]) for rank in ranks)
    assert narrow >= 2 * len(ranks)


def test_the_sample_is_of_all_fences_of_a_shard() -> None:
    """1040 shards of 100 000 rows: so many fences of each that a fixed stride would meet the same places again."""
    rng, place_F = np.random.default_rng(2), positions(100_000)
    score_E = np.concatenate([np.sort(rng.standard_normal(MAX_FENCES)) for _ in range(1040)])
    least_E, most_E = np.tile(np.diff(place_F + 1, prepend=0), 1040), np.tile(np.diff(place_F, append=100_000), 1040)
    found = Bounds(1040 * 100_000, score_E, least_E, most_E)
    for share in np.linspace(0.01, 0.99, 50):
        first, last = found._about(int(share * found.num_rows))
        assert np.count_nonzero((score_E >= first) & (score_E <= last)) < len(score_E) / 8


def test_a_bracket_holds_few_rows_of_a_large_corpus() -> None:
    rng = np.random.default_rng(0)
    for score_N in (rng.standard_normal(200_000), 1e6 + rng.standard_normal(200_000)):
        found = bounds_of(np.split(score_N, 10))
        inside = [found.bracket(rank).most_inside for rank in range(0, 200_000, 5000)]
        assert max(inside) <= 2 * 10 * 257


def shards_of(score_N: np.ndarray, ids_NW: np.ndarray, parts: list[np.ndarray], code_N: np.ndarray | None, labels):
    return [
        cuts.ShardScores(score_N[rows], ids_NW[rows], None if code_N is None else code_N[rows], labels)
        for rows in parts
    ]


def naive(score_N, ids, member_N, k, reverse):
    sign = 1 if reverse else -1
    rows = sorted(np.flatnonzero(member_N).tolist(), key=lambda row: (sign * score_N[row], ids[row]))
    return set(rows[:k])


@settings(deadline=None, max_examples=300)
@given(scores, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.booleans(), st.booleans(), st.data())
def test_cuts_by_one_round_are_those_of_a_full_sort(
    values, num_shards, num_strata, seed, reverse, is_hash, data
) -> None:
    num_rows, rng = len(values), np.random.default_rng(seed)
    score_N, parts = np.array(values), sharded(len(values), num_shards, seed)
    ids = [int(n) for n in rng.permutation(num_rows)]
    if is_hash:
        ids = [(n * 0x9E3779B97F4A7C15 % 2**64) << 64 | n for n in ids]
    ids_NW = np.array([divmod(n, 2**64) for n in ids], ">u8").reshape(-1, 2)
    code_N = rng.integers(0, num_strata, num_rows) if num_strata > 1 else None
    labels = [(f"s{place}",) for place in range(num_strata)] if num_strata > 1 else [()]
    member = [np.ones(num_rows, bool) if code_N is None else code_N == place for place in range(num_strata)]
    shards = shards_of(score_N, ids_NW, parts, code_N, labels)
    asked: list[dict] = []

    def ask(queries):
        asked.append(queries)
        return [cuts.reply(queries, shard) for shard in shards]

    searches, bounds, histograms, wanted = {}, {}, {}, {}
    for label, member_N in zip(labels, member):
        if member_N.any():
            k = data.draw(st.integers(1, int(member_N.sum())))
            searches[label, 0], wanted[label] = (
                radix.top(k, descending=not reverse),
                naive(score_N, ids, member_N, k, reverse),
            )
            bounds[label] = bounds_of([score_N[rows][member_N[rows]] for rows in parts])
            histograms[label] = radix.histogram(score_N[member_N])
    found = cuts.solve(searches, histograms, bounds, ask)
    cut = cuts.Cut({label: cuts.threshold(found[label, 0]) for label in wanted})
    kept: dict = {label: set() for label in wanted}
    for rows, shard in zip(parts, shards):
        for row in rows[cuts.keep(cut, shard)].tolist():
            kept[labels[0 if code_N is None else code_N[row]]].add(row)
    assert kept == wanted
    assert len(asked) <= 2  # one round over scores, and one over ids where a threshold ties


def ties(num_rows, ids_NW, k, *, all_ties=16):
    asked = []

    def ask(queries):
        asked.append([type(query).__name__ for query in queries.values()])
        return [cuts.reply(queries, cuts.ShardScores(np.zeros(num_rows), ids_NW))]

    histogram = radix.histogram(np.zeros(num_rows))
    bounds = {(): bounds_of([np.zeros(num_rows)])}
    found = cuts.solve({((), 0): radix.top(k, max_candidates=16)}, {(): histogram}, bounds, ask)[(), 0]
    return cuts.threshold(found), asked


def test_hashes_take_one_round_over_ids() -> None:
    ids_NW = np.random.default_rng(0).integers(0, 2**64, (50_000, 2), np.uint64).astype(">u8")
    cut, asked = ties(50_000, ids_NW, 20_000)
    expected = sorted(int(a) << 64 | int(b) for a, b in ids_NW)[19_999]
    assert (cut.score, cut.pair_id) == (0.0, expected)
    assert asked == [["ScoreBracket"], ["IdBracket"]]


@pytest.mark.parametrize("k", [1, 20_000, 49_999])
def test_ids_that_are_no_hashes_are_found_digit_by_digit(k: int) -> None:
    ids_NW = np.stack([np.zeros(50_000), np.arange(50_000)[::-1]], axis=1).astype(">u8")
    cut, asked = ties(50_000, ids_NW, k)
    assert (cut.score, cut.pair_id) == (0.0, k - 1)
    assert asked[:2] == [["ScoreBracket"], ["IdBracket"]]
    assert {kind for kinds in asked[2:] for kind in kinds} == {"Query"}


def test_a_bracket_with_too_many_rows_is_left_to_the_digits() -> None:
    score_N, asked = np.random.default_rng(0).standard_normal(5000), []

    def ask(queries):
        asked.extend(type(query).__name__ for query in queries.values())
        return [cuts.reply(queries, cuts.ShardScores(score_N, np.zeros((5000, 2), ">u8")))]

    bounds, histograms = {(): bounds_of([score_N])}, {(): radix.histogram(score_N)}
    found = cuts.solve({((), 0): radix.order_statistic(2500, max_candidates=10)}, histograms, bounds, ask)
    assert radix.found_score(found[(), 0]) == np.sort(score_N)[2500]
    assert set(asked) == {"Query"}


def test_equal_ids_at_the_cut_are_refused() -> None:
    ids_NW = np.zeros((4, 2), ">u8")
    with pytest.raises(UserError, match=r"4 rows share the pair_id 0{32}"):
        ties(4, ids_NW, 2)


def test_rows_that_are_not_those_of_the_fences_are_refused() -> None:
    bounds = {(): bounds_of([np.arange(10.0)])}
    searches = {((), 0): radix.top(3)}
    with pytest.raises(IntegrityError, match="not those of the committed fences"):
        brackets.locate_scores(
            searches, bounds, lambda queries: [cuts.reply(queries, cuts.ShardScores(np.full(30, 99.0)))]
        )
