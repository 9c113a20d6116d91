"""Radix search against a full sort in Python, over any sharding, with ties, offsets and signed zeros."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.select import cuts, radix

EDGES = [0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1e9 + 1e-6, 1e9]
anything = st.floats(allow_nan=False, allow_infinity=False)
tied = st.sampled_from([0.5, 0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6])
scores = st.lists(st.one_of(tied, anything, st.sampled_from(EDGES)), min_size=1, max_size=60)


def ids_of(order: list[int], spread: bool) -> np.ndarray:
    """Distinct ids in two words; `spread` makes both words and all their digits of 16 bits differ."""
    digits = 0x0001_0001_0001_0001
    return np.array([(n % 3 * digits, n * digits) if spread else (0, n) for n in order], ">u8").reshape(-1, 2)


def shards_of(num_rows: int, num_shards: int, seed: int) -> list[np.ndarray]:
    """A random deal of the rows; some shards are empty."""
    place_N = np.random.default_rng(seed).integers(0, num_shards, num_rows)
    return [np.flatnonzero(place_N == shard) for shard in range(num_shards)]


@settings(deadline=None)
@given(anything, anything)
def test_order_keys_order_as_floats(a: float, b: float) -> None:
    key_a, key_b = (int(key) for key in radix.order_keys(np.array([a, b])))
    assert (key_a < key_b) == (a < b)
    assert (key_a == key_b) == (a == b)
    assert radix.key_score(key_a) == a


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused_with_their_rows(bad: float) -> None:
    score_N = np.array([1.0, 2.0, bad, 3.0])
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        radix.order_keys(score_N)
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        radix.histogram(score_N)
    with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
        radix.stratum_histograms(score_N, np.array([0, 0, 1, 1]), 2)


@settings(deadline=None)
@given(scores)
def test_histogram_counts_the_top_sixteen_bits(values: list[float]) -> None:
    score_N = np.array(values)
    expected: dict[int, int] = {}
    for key in radix.order_keys(score_N).tolist():
        expected[key >> 48] = expected.get(key >> 48, 0) + 1
    found = radix.histogram(score_N)
    assert dict(zip(found.bins.tolist(), found.counts.tolist())) == expected
    assert found.bins.tolist() == sorted(expected)
    back = radix.Histogram.from_json(found.to_json())
    assert back.bins.tolist() == found.bins.tolist()
    assert back.bins.dtype == np.uint16
    halves = [radix.histogram(score_N[: len(values) // 2]), radix.histogram(score_N[len(values) // 2 :])]
    assert radix.Histogram.merge(halves).to_json() == found.to_json()


@settings(deadline=None)
@given(scores, st.integers(1, 130), st.integers(0, 9))
def test_stratum_histograms_are_those_of_the_stratum(values: list[float], num_strata: int, seed: int) -> None:
    score_N = np.array(values)
    code_N = np.random.default_rng(seed).integers(-1, num_strata, len(values))
    found = radix.stratum_histograms(score_N, code_N, num_strata)
    assert len(found) == num_strata
    for code, histogram in enumerate(found):
        assert histogram.to_json() == radix.histogram(score_N[code_N == code]).to_json()


def test_histograms_of_several_blocks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    score_N = np.random.default_rng(0).standard_normal(1000)
    code_N = np.arange(1000) % 3
    whole = radix.histogram(score_N).to_json()
    strata = [histogram.to_json() for histogram in radix.stratum_histograms(score_N, code_N, 3)]
    monkeypatch.setattr(radix.blocks, "__defaults__", (7,))
    monkeypatch.setattr(radix, "BLOCK", 7)
    assert radix.histogram(score_N).to_json() == whole
    assert [histogram.to_json() for histogram in radix.stratum_histograms(score_N, code_N, 3)] == strata
    found = radix.solve({0: radix.top(300)}, lambda q: [{0: radix.answer(q[0], score_N)}])
    kept_N = cuts.keep_mask(score_N, None, [cuts.threshold(found[0])])
    assert sorted(score_N[kept_N]) == sorted(score_N)[-300:]


def test_percentile_is_the_middle_of_the_bin() -> None:
    # 1.0 and 1.01 share a bin (a sixteenth of a power of two), 2.0 and 4.0 have their own.
    histogram = radix.histogram(np.array([1.0, 1.01, 2.0, 4.0]))
    assert histogram.percentile(np.array([1.0, 1.01, 2.0, 4.0, 0.5, 9.0])).tolist() == [25, 25, 62.5, 87.5, 0, 100]


@settings(max_examples=300, deadline=None)
@given(
    values=scores,
    data=st.data(),
    num_shards=st.sampled_from([1, 2, 50]),
    max_candidates=st.sampled_from([0, 1, 3, 1000]),
    descending=st.booleans(),
    spread=st.booleans(),
    is_committed=st.booleans(),
)
def test_top_equals_a_full_sort(
    values: list[float],
    data: st.DataObject,
    num_shards: int,
    max_candidates: int,
    descending: bool,
    spread: bool,
    is_committed: bool,
) -> None:
    k = data.draw(st.integers(1, len(values)))
    order = data.draw(st.permutations(range(len(values))))
    score_N, ids_NW = np.array(values), ids_of(order, spread)
    key = [(-v if descending else v, tuple(i)) for v, i in zip(values, ids_NW.tolist())]
    expected = set(sorted(range(len(values)), key=lambda row: key[row])[:k])

    shards = shards_of(len(values), num_shards, seed=k)
    search = radix.top(k, descending=descending, max_candidates=max_candidates)
    if is_committed:
        search = radix.begin(search, radix.Histogram.merge(radix.histogram(score_N[rows]) for rows in shards))

    def ask(queries: dict[str, radix.Query]) -> list[dict[str, radix.Answer]]:
        # Shards only get their ids when the query says so.
        query = queries["x"]
        return [{"x": radix.answer(query, score_N[rows], ids_NW[rows] if query.needs_ids else None)} for rows in shards]

    cut = cuts.threshold(radix.solve({"x": search}, ask)["x"])
    kept = set()
    for rows in shards:
        kept.update(rows[cuts.keep_mask(score_N[rows], ids_NW[rows] if cut.needs_ids else None, [cut])].tolist())
    assert kept == expected
    assert cut.score == (min if descending else max)(values[row] for row in expected)


@settings(deadline=None)
@given(scores, st.data(), st.sampled_from([1, 50]), st.sampled_from([0, 3, 1000]))
def test_order_statistics_equal_a_full_sort(
    values: list[float], data: st.DataObject, num_shards: int, max_candidates: int
) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4, unique=True))
    score_N, shards = np.array(values), shards_of(len(values), num_shards, seed=0)
    found = radix.solve(
        {rank: radix.order_statistic(rank, max_candidates=max_candidates) for rank in ranks},
        lambda queries: [{rank: radix.answer(q, score_N[rows]) for rank, q in queries.items()} for rows in shards],
    )
    assert [radix.found_score(found[rank]) for rank in ranks] == [sorted(values)[rank] for rank in ranks]


def test_ids_are_only_read_where_the_threshold_score_is_cut() -> None:
    score_N = np.array([3.0, 2.0, 2.0, 1.0])

    def needed(k: int) -> bool:
        found = radix.solve(
            {0: radix.top(k)}, lambda q: [{0: radix.answer(q[0], score_N, ids_of([0, 1, 2, 3], False))}]
        )
        return cuts.threshold(found[0]).needs_ids

    assert [needed(k) for k in (1, 2, 3, 4)] == [False, True, False, False]


def test_equal_ids_that_straddle_the_cut_are_refused() -> None:
    score_N, ids_NW = np.array([1.0, 1.0, 0.0]), ids_of([7, 7, 8], False)
    for max_candidates in (0, 100):
        search = radix.top(1, max_candidates=max_candidates)
        with pytest.raises(UserError, match="2 rows share the pair_id 00000000000000000000000000000007"):
            radix.solve({0: search}, lambda q: [{0: radix.answer(q[0], score_N, ids_NW)}])


def test_rows_that_change_between_rounds_are_noticed() -> None:
    search = radix.begin(radix.top(2), radix.histogram(np.array([1.0, 1.0, 1.0])))
    with pytest.raises(IntegrityError, match="2 rows answered, expected 3"):
        radix.advance(search, [np.zeros(2, np.uint64)])
    with pytest.raises(IntegrityError, match="3 rows answered"):
        radix.begin(radix.top(4), radix.histogram(np.array([1.0, 1.0, 1.0])))


def test_id_words_read_bytes_in_place_and_in_order() -> None:
    raw = [bytes([n]) + bytes(14) + bytes([255 - n]) for n in (3, 1, 2)]
    array = pa.array([b"\xff" * 16, *raw], pa.binary(16))
    words_NW = radix.id_words(array[1:])
    assert words_NW.tolist() == [[n << 56, 255 - n] for n in (3, 1, 2)]
    assert words_NW.base is not None
    assert np.shares_memory(words_NW, np.frombuffer(array.buffers()[1], np.uint8))
    chunked = pa.chunked_array([array[:2], array[2:]])
    assert radix.id_words(chunked)[1:].tolist() == words_NW.tolist()
    assert radix.id_words(pa.array([], pa.binary(16))).shape == (0, 2)
    for bad in (pa.array([None], pa.binary(16)), pa.array(["x"]), pa.array([b"x"], pa.binary(1))):
        with pytest.raises(UserError, match="valid: 16 bytes"):
            radix.id_words(bad)
