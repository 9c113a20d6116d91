"""Order statistics against a full sort of Python tuples: any sharding, ties, offsets, denormals, ids of any kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.numbers import order, ranges
from prefsel.numbers.order import Located, likely_ids, locate, target
from prefsel.numbers.quantiles import quantiles
from prefsel.numbers.ranges import (
    ALL_WORDS,
    EVERYTHING,
    Range,
    RangeCounts,
    RangeQuery,
    Summary,
    count_range,
    positions,
    summarise,
    summarise_for_ledger,
)
from prefsel.numbers.shard_values import ShardValues

EDGES = [0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1e9 + 1e-6, 1e9]
anything = st.floats(allow_nan=False, allow_infinity=False)
tied = st.sampled_from([0.5, 0.5, 0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6])
scores = st.lists(st.one_of(tied, anything, st.sampled_from(EDGES)), min_size=1, max_size=80)

Rows = Sequence[tuple[float, int]]
"""Score and pair_id."""


def deal(num_rows: int, num_shards: int, seed: int) -> list[np.ndarray]:
    """A random deal of the rows; some shards are empty, some have one row."""
    place_N = np.random.default_rng(seed).integers(0, num_shards, num_rows)
    return [np.flatnonzero(place_N == shard) for shard in range(num_shards)]


def words(ids: Sequence[int]) -> np.ndarray:
    return np.array([divmod(one, 1 << 64) for one in ids], ">u8").reshape(-1, 2)


def ids_of(kind: str, places: Sequence[int]) -> list[int]:
    """Distinct ids: hashes, counted ones, counted in the first word only, and in digits of both words."""
    if kind == "hash":
        return [((n * 0x9E3779B97F4A7C15 + 1) % 2**64) << 64 | n for n in places]
    if kind == "digits":
        return [(n % 3 * 0x0001_0001_0001_0001) << 64 | n * 0x0001_0001_0001_0001 for n in places]
    return [n << 64 if kind == "first" else n for n in places]


def in_order(rows: Rows, descending: bool) -> list[int]:
    """Row numbers by a full sort."""
    return sorted(range(len(rows)), key=lambda n: ((-1 if descending else 1) * rows[n][0], rows[n][1]))


class Shards:
    """Shards that count the rounds and what each of them looked at."""

    def __init__(self, shards: Sequence[ShardValues]) -> None:
        self.shards, self.rounds = shards, []

    def __call__(self, queries: Any) -> list[Any]:
        self.rounds.append(queries)
        return [shard.answer(queries) for shard in self.shards]

    @property
    def words(self) -> list[list[int]]:
        """Of every round, the words of the key that were asked about."""
        return [sorted({len(query.prefix) for asked in one.values() for query in asked}) for one in self.rounds]


def shards_of(rows: Rows, parts: Sequence[np.ndarray], code_N: np.ndarray | None = None, num_strata: int = 1) -> Shards:
    score_N, ids_NW = np.array([score for score, _ in rows]), words([one for _, one in rows])
    labels = [(f"s{place}",) for place in range(num_strata)] if code_N is not None else [()]
    codes = [None if code_N is None else code_N[part] for part in parts]
    return Shards([ShardValues(score_N[part], ids_NW[part], code, labels) for part, code in zip(parts, codes)])


def committed(score_N: np.ndarray, parts: Sequence[np.ndarray]) -> list[Summary]:
    """The Summaries of the shards, through the text of a ledger."""
    made = [summarise_for_ledger(score_N[part]) for part in parts]
    return [Summary.from_text(one.count, one.to_text()) for one in made]


def tell(patch: pytest.MonkeyPatch, num_values: int) -> None:
    patch.setattr(ranges, "FEW", num_values)
    patch.setattr(ranges, "MAX_VALUES", num_values)


def is_kept(found: Sequence[Located], row: tuple[float, int], descending: bool) -> bool:
    """Whether a row is at or before the located one."""
    score, place = row[0] + 0.0, tuple(word.value for word in found)
    if score != place[0]:
        return (score > place[0]) == descending
    return len(place) == 1 or divmod(row[1], 1 << 64) <= place[1:]


# ------------------------------------------------------------------------------------------------------- Summaries


def test_positions_take_in_both_ends() -> None:
    assert [len(summarise_for_ledger(np.arange(float(count))).values) for count in (0, 1, 2, 5, 520)] == [0, 1, 2, 2, 4]
    assert summarise_for_ledger(np.arange(520.0)).values.tolist() == [0, 173, 346, 519]
    large = summarise_for_ledger(np.arange(100_000.0)).values
    assert (len(large), large[0], large[-1]) == (256, 0, 99_999)
    assert np.diff(large).max() == 393
    assert positions(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_summary_is_all_values_or_order_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    value_M = np.array([3.0, 1.0, 2.0, 0.0, -1.0])
    assert summarise(value_M).values.tolist() == [-1, 0, 1, 2, 3]
    assert summarise(value_M).is_complete
    assert summarise(value_M, np.arange(5, dtype=np.uint64)).next_words.tolist() == [4, 3, 1, 2, 0]
    tell(monkeypatch, 3)
    assert summarise(value_M).values.tolist() == [-1, 1, 3]
    assert not summarise(value_M).is_complete


@settings(deadline=None)
@given(scores)
def test_the_text_of_a_ledger_gives_the_summary_back(values: list[float]) -> None:
    made = summarise_for_ledger(np.array(values))
    back = Summary.from_text(made.count, made.to_text())
    assert back.values.tolist() == made.values.tolist() == sorted(values)[:: max(1, len(values) - 1)]
    assert not np.signbit(back.values[back.values == 0]).any()


@settings(deadline=None, max_examples=300)
@given(scores, st.integers(1, 5), st.integers(0, 99), st.sampled_from([0, 3, 16, 100]))
def test_every_rank_lies_in_its_range(values: list[float], num_shards: int, seed: int, num_values: int) -> None:
    parts = deal(len(values), num_shards, seed)
    made = committed(np.array(values), parts)
    if num_values:
        with pytest.MonkeyPatch.context() as patch:
            tell(patch, num_values)
            made = [summarise(np.array(values)[part]) for part in parts]
    for rank, score in enumerate(sorted(values)):
        asked = target(made, rank + 1).start
        assert asked.low <= score <= asked.high
        assert asked == target(made, len(values) - rank, descending=True).start


def test_a_range_holds_few_rows_of_a_large_corpus() -> None:
    rng = np.random.default_rng(0)
    for value_N in (rng.standard_normal(200_000), 1e6 + rng.standard_normal(200_000)):
        made = committed(value_N, np.split(np.arange(200_000), 10))
        asked = [target(made, rank + 1).start for rank in range(0, 200_000, 5000)]
        assert max(np.count_nonzero((value_N > one.low) & (value_N < one.high)) for one in asked) <= 2 * 10 * 257


@settings(deadline=None, max_examples=200)
@given(scores, st.data())
def test_counts_of_a_range_are_those_of_a_loop(values: list[float], data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(st.sampled_from(values) | anything, st.sampled_from(values) | anything)))
    found = count_range(np.array(values), Range(low, high))
    inside = sorted(value for value in values if low < value < high)
    assert found.below == sum(value < low for value in values)
    assert found.at_low == values.count(low)
    assert found.at_high == (values.count(high) if low < high else 0)
    assert found.above == sum(value > high for value in values)
    assert found.inside.values.tolist() == inside
    assert found.total == len(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused_with_their_rows(bad: float) -> None:
    score_N = np.array([1.0, 2.0, bad, 3.0])
    with pytest.raises(NonFiniteError, match=r"1 values are NaN or infinite, first at rows \[2\]"):
        count_range(score_N, EVERYTHING)
    for code_N in (None, np.array([0, 0, 1, 1])):
        with pytest.raises(NonFiniteError, match=r"first at rows \[2\]"):
            ShardValues(score_N, None, code_N, ((), ("a",))).summaries()


# -------------------------------------------------------------------------------------------------------- searches


@settings(deadline=None, max_examples=400)
@given(
    values=scores,
    data=st.data(),
    num_shards=st.sampled_from([1, 2, 5, 50]),
    kind=st.sampled_from(["hash", "counted", "first", "digits"]),
    descending=st.booleans(),
    num_values=st.sampled_from([2, 3, 16, 256]),
    known=st.sampled_from(["ledger", "asked", "nothing"]),
)
def test_the_first_rows_are_those_of_a_full_sort(values, data, num_shards, kind, descending, num_values, known) -> None:
    count = data.draw(st.integers(1, len(values)))
    ids = ids_of(kind, data.draw(st.permutations(range(len(values)))))
    rows, parts = list(zip(values, ids)), deal(len(values), num_shards, seed=count)
    shards = shards_of(rows, parts)
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, num_values)
        made = {
            "ledger": lambda: committed(np.array(values), parts),
            "asked": lambda: [shard.summaries()[()] for shard in shards.shards],
            "nothing": lambda: [],
        }[known]()
        one = (
            target(made, count, descending=descending, by_id=True)
            if made
            else order.Target(count, len(values), descending=descending, by_id=True)
        )
        found = locate({((), 0): one}, shards)[(), 0]
    expected = in_order(rows, descending)[:count]
    assert [n for n, row in enumerate(rows) if is_kept(found, row, descending)] == sorted(expected)
    assert one.kept_S(found).tolist() == [len(set(part.tolist()) & set(expected)) for part in parts]
    if len(found) == 3:  # the last row kept, and no other
        assert (found[1].value, found[2].value) == divmod(rows[expected[-1]][1], 1 << 64)
    assert not math.copysign(1, found[0].value) < 0 or found[0].value < 0


@settings(deadline=None, max_examples=200)
@given(scores, st.integers(1, 4), st.integers(2, 4), st.integers(0, 99), st.booleans(), st.data())
def test_all_strata_are_searched_in_the_same_rounds(values, num_shards, num_strata, seed, descending, data) -> None:
    rng, num_rows = np.random.default_rng(seed), len(values)
    kind = data.draw(st.sampled_from(["hash", "counted"]))
    rows = list(zip(values, ids_of(kind, rng.permutation(num_rows).tolist())))
    code_N, parts = rng.integers(-1, num_strata, num_rows), deal(num_rows, num_shards, seed)
    shards = shards_of(rows, parts, code_N, num_strata)
    members = {place: np.flatnonzero(code_N == place).tolist() for place in range(num_strata)}
    targets, wanted = {}, {}
    for place, mine in members.items():
        if mine:
            key, count = ((f"s{place}",), 0), data.draw(st.integers(1, len(mine)))
            made = committed(np.array(values), [np.intersect1d(part, mine) for part in parts])
            targets[key] = target(made, count, descending=descending, by_id=True)
            wanted[key] = {mine[n] for n in in_order([rows[n] for n in mine], descending)[:count]}
    found = locate(targets, shards)
    for (label, number), expected in wanted.items():
        mine = members[int(label[0][1:])]
        assert {n for n in mine if is_kept(found[label, number], rows[n], descending)} == expected
    # One round about scores, one about ids where a cut ties; ids that share their first word take one about the second.
    assert len(shards.rounds) <= (2 if kind == "hash" else 3)


@settings(deadline=None, max_examples=100)
@given(scores, st.data(), st.sampled_from([1, 3, 50]), st.sampled_from([2, 5, 256]))
def test_several_ranks_at_once(values: list[float], data: st.DataObject, num_shards: int, num_values: int) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4, unique=True))
    parts = deal(len(values), num_shards, seed=0)
    shards = shards_of([(value, 0) for value in values], parts)
    made = committed(np.array(values), parts)
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, num_values)
        found = locate({((), rank): target(made, rank + 1) for rank in ranks}, shards)
    ordered = sorted(values)
    for rank in ranks:
        (one,) = found[(), rank]
        assert one.value == ordered[rank]
        assert (one.below, one.at) == (sum(v < ordered[rank] for v in values), values.count(ordered[rank]))
        assert one.above == len(values) - one.below - one.at
        assert one.at_S.tolist() == [[values[n] for n in part].count(ordered[rank]) for part in parts]


@settings(deadline=None, max_examples=200)
@given(scores, st.lists(st.floats(0, 1), min_size=1, max_size=3), st.sampled_from([1, 7]))
def test_quantiles_are_those_of_numpy(values: list[float], shares: list[float], num_shards: int) -> None:
    parts = deal(len(values), num_shards, seed=1)
    shards = shards_of([(value, 0) for value in values], parts)
    wanted = {place: ((), share) for place, share in enumerate(shares)}
    with np.errstate(over="ignore", invalid="ignore"):
        found = quantiles(wanted, {(): committed(np.array(values), parts)}, shards)
        expected = [np.quantile(np.array(values), share) for share in shares]
    # A difference of two floats near 1e308 overflows in numpy's quantiles; between one and itself it need not.
    for place, value in enumerate(expected):
        assert np.isnan(value) or found[place].value == value


# ---------------------------------------------------------------------------------------------- rounds, and their end


def rounds(
    value_N: np.ndarray, ids_NW: np.ndarray | None, count: int, num_shards: int, **how: Any
) -> tuple[list, Shards]:
    parts = np.array_split(np.arange(len(value_N)), num_shards)
    shards = Shards([ShardValues(value_N[part], None if ids_NW is None else ids_NW[part]) for part in parts])
    found = locate({((), 0): target(committed(value_N, parts), count, **how)}, shards)
    return found[(), 0], shards


def test_scores_without_ties_take_one_round_and_no_ids() -> None:
    rng = np.random.default_rng(0)
    for value_N in (rng.standard_normal(60_000), 1e6 + rng.standard_normal(60_000), rng.random(60_000) * 5e-324):
        (found, *_), shards = rounds(value_N, None, 18_000, 6, descending=True, by_id=len(set(value_N)) == 60_000)
        assert found.value == np.sort(value_N)[-18_000]
        assert shards.words == [[0]]


def test_a_tie_that_the_summaries_foresee_takes_one_round_over_scores_and_ids() -> None:
    rng = np.random.default_rng(1)
    value_N = np.where(rng.random(60_000) < 0.4, 0.25, rng.standard_normal(60_000))
    ids_NW = rng.integers(0, 2**64, (60_000, 2), np.uint64).astype(">u8")
    (score, *id_words), shards = rounds(value_N, ids_NW, 18_000, 6, descending=True, by_id=True)
    above = int((value_N > 0.25).sum())
    expected = sorted(int(a) << 64 | int(b) for a, b in ids_NW[value_N == 0.25])[18_000 - above - 1]
    assert score.value == 0.25
    assert tuple(word.value for word in id_words) == divmod(expected, 1 << 64)
    assert shards.words == [[0, 1]]


@pytest.mark.parametrize("count", [1, 20_000, 49_999, 50_000])
@pytest.mark.parametrize("kind", ["counted", "first", "constant"])
def test_ids_that_are_no_hashes_are_found_in_few_rounds(count: int, kind: str) -> None:
    numbers = np.arange(50_000)[::-1]
    first = {"counted": np.zeros(50_000), "first": numbers, "constant": np.full(50_000, 7)}[kind]
    ids_NW = np.stack([first, np.zeros(50_000) if kind == "first" else numbers], axis=1).astype(">u8")
    found, shards = rounds(np.zeros(50_000), ids_NW, count, 1, by_id=True)
    words_found = [word.value for word in found[1:]]
    expected = {"counted": [0, count - 1], "first": [count - 1, 0], "constant": [7, count - 1]}[kind]
    assert words_found == ([] if count == 50_000 else expected)
    assert len(shards.rounds) <= 5


@pytest.mark.parametrize("num_values", [16, 256])
@pytest.mark.parametrize("shape", ["normal", "sorted", "two values", "geometric", "one far away"])
def test_every_search_ends_soon(shape: str, num_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round leaves at most 2 of 255 parts of the open rows (of 15 here), as every shard summarises its own."""
    tell(monkeypatch, num_values)
    rng, num_rows = np.random.default_rng(3), 40_000
    value_N = {
        "normal": rng.standard_normal(num_rows),
        "sorted": np.arange(num_rows) - 1e6,
        "two values": rng.integers(0, 2, num_rows).astype(float),
        "geometric": np.ldexp(1.0, rng.integers(-1074, 1023, num_rows)),
        "one far away": np.where(np.arange(num_rows) == 7, 1e308, rng.random(num_rows)),
    }[shape]
    for rank in (0, 1, 13_333, num_rows // 2, num_rows - 1):
        (found,), shards = rounds(value_N, None, rank + 1, 8)
        assert found.value == np.sort(value_N)[rank]
        assert len(shards.rounds) <= (4 if num_values == 256 else 6)
        asked = [one[(), 0][0].range for one in shards.rounds]
        for wide, tight in itertools.pairwise(asked):
            assert wide.low < tight.low <= tight.high < wide.high


def test_nothing_is_asked_twice_without_knowing_more() -> None:
    """A shard whose rows all lie between two neighbouring floats of the others still ends the search."""
    near = np.nextafter(1.0, 2.0)
    value_N = np.concatenate([np.full(5000, 1.0), np.full(5000, near), np.full(5000, np.nextafter(near, 2.0))])
    for rank in (0, 4999, 5000, 9999, 10_000, 14_999):
        (found,), shards = rounds(value_N, None, rank + 1, 3)
        assert (found.value, len(shards.rounds)) == (value_N[rank], 1)


def test_a_wrong_guess_of_ids_is_followed_by_all_of_them() -> None:
    assert likely_ids(0, 1) == ALL_WORDS
    guess = likely_ids(50_000, 100_000)
    assert guess.low < 2**63 < guess.high < 2**63 * 1.1
    counts = RangeCounts(100, 0, Summary(0, np.empty(0, np.uint64)), 0, 0)
    assert order.narrow(5, 100, guess, [counts]) == ALL_WORDS
    with pytest.raises(IntegrityError, match="search for rank 5: it is not among all 100 rows"):
        order.narrow(5, 100, ALL_WORDS, [counts])
    assert likely_ids(99_999, 100_000).high == 2**64 - 1


# ------------------------------------------------------------------------------------------------------- refusals


def test_equal_ids_at_the_cut_are_refused() -> None:
    rows = [(1.0, 7), (1.0, 7), (0.0, 8)]
    with pytest.raises(UserError, match="2 rows share the pair_id 00000000000000000000000000000007 and their score"):
        locate({((), 0): order.Target(1, 3, descending=True, by_id=True)}, shards_of(rows, [np.arange(3)]))
    found = locate({((), 0): order.Target(2, 3, descending=True, by_id=True)}, shards_of(rows, [np.arange(3)]))
    assert [word.value for word in found[(), 0]] == [1.0]


def test_rows_that_are_not_those_of_the_summaries_are_refused() -> None:
    one = target(committed(np.arange(10.0), [np.arange(10)]), 3)
    with pytest.raises(IntegrityError, match="30 rows answered, expected 10: the scores have changed"):
        locate({((), 0): one}, Shards([ShardValues(np.full(30, 99.0))]))
    (found,) = locate({((), 0): one}, Shards([ShardValues(np.arange(10.0) + 50)]))[(), 0]
    assert found.value == 52  # the same number of rows, all outside what was asked about: everything is asked about


def test_queries_about_ids_need_them() -> None:
    with pytest.raises(ValueError, match="need the pair_ids"):
        ShardValues(np.zeros(2)).answer({((), 0): [RangeQuery(ALL_WORDS, (0.0,))]})
    assert not RangeQuery(EVERYTHING).needs_ids
    assert RangeQuery(ALL_WORDS, (0.0,)).needs_ids
