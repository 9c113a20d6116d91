"""Rules: parsing, budgets, and cuts over shards against naive definitions."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel import rules
from prefsel.errors import UserError
from prefsel.numbers import ranges
from prefsel.numbers.shard_values import ShardValues
from prefsel.rules import budget, largest_remainder, parse_rule
from prefsel.select.thresholds import Thresholds, decide, keep, label_text


def decide_over_shards(rule: dict, shards: list[ShardValues], num_values: int) -> Thresholds:
    """With shards that tell so few values of a range; how many rows each keeps was told on the way."""
    summaries: dict = {}
    with mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values):
        for shard in shards:
            for label, one in shard.summaries().items():
                summaries.setdefault(label, []).append(one)
        found = decide(parse_rule(rule), summaries, lambda queries: [shard.answer(queries) for shard in shards])
    if found.kept_S is not None:
        assert found.kept_S.tolist() == [int(keep(found.thresholds, shard).sum()) for shard in shards]
    return found.thresholds


def test_golden_budget(golden: dict[str, dict]) -> None:
    example = golden["ratio-floor"]
    assert budget(example["inputs"]["ratio"], example["inputs"]["eligible"]) == example["expected"]["k"]


def test_golden_quota(golden: dict[str, dict]) -> None:
    example = golden["quota-largest-remainder"]
    sizes = example["inputs"]["stratum_sizes"]
    total = budget(example["inputs"]["ratio"], sum(sizes))
    assert total == example["expected"]["k"]
    assert largest_remainder(sizes, total) == example["expected"]["per_stratum"]


@pytest.mark.parametrize("ratio", ["0.29", 0.29, Decimal("0.29")])
def test_ratio_is_read_as_it_is_written(ratio: object) -> None:
    assert int(0.29 * 100) == 28  # what binary floats give
    assert rules.rule_budget(parse_rule({"kind": "top", "score": "s", "ratio": ratio}), 100) == 29


@settings(deadline=None)
@given(st.integers(1, 99), st.integers(1, 10**12))
def test_budget_is_an_integer_floor(percent: int, num_eligible: int) -> None:
    assert budget(f"0.{percent:02d}", num_eligible) == percent * num_eligible // 100
    assert budget(percent / 100, num_eligible) == percent * num_eligible // 100


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8).filter(any), st.data())
def test_largest_remainder_shares_exactly_and_fairly(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    seats = largest_remainder(sizes, total)
    assert sum(seats) == total
    for seat, size in zip(seats, sizes):
        assert seat <= size
        assert abs(seat * sum(sizes) - total * size) < sum(sizes)  # less than one seat from the exact share


def test_equal_remainders_go_to_the_earlier_stratum() -> None:
    assert largest_remainder([1, 1, 1], 2) == [1, 1, 0]
    assert largest_remainder([0, 0], 0) == [0, 0]


TOP = {"kind": "top", "score": "s", "ratio": 0.3}
BAND = {"kind": "band", "score": "s", "low": 10, "high": 90}
FUSE = {"kind": "fuse", "scores": ["a", "b"], "how": "rank", "ratio": 0.3}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kind": "topp", "score": "s"}, "rule.kind: got 'topp'; did you mean 'top'? valid: top, band, quota"),
        ({"score": "s"}, "rule.kind: required, but missing; valid: top, band"),
        ({"kind": None, "score": "s"}, "rule.kind: got None; valid: top, band"),
        ({"kind": ["top"], "score": "s"}, "rule.kind: got ['top']; valid: top, band"),
        ("top", "rule: got 'top'; valid: a table with a `kind`, for example {kind: top}"),
        ({"kind": "top", "score": "s", "ration": 0.3}, "ration: unknown key; did you mean 'ratio'?"),
        ({"kind": "top", "score": "s"}, "exactly one of ratio and count: got ratio=None, count=None"),
        ({"kind": "top", "score": "s", "ratio": 0.3, "count": 3}, "exactly one of ratio and count"),
        ({"kind": "top", "score": "s", "ratio": 1.5}, "ratio: got 1.5"),
        ({"kind": "top", "score": "s", "ratio": "nan"}, "ratio: got 'nan'"),
        ({"kind": "top", "score": "s", "ratio": True}, "ratio: got True"),
        ({"kind": "top", "score": "s", "count": 0}, "count: got 0"),
        ({"kind": "top", "ratio": 0.3}, "score: required, but missing"),
        ({"kind": "band", "score": "s", "low": 90, "high": 10}, "low must be below high: got low=90.0, high=10.0"),
        ({"kind": "band", "score": "s", "low": -1, "high": 10}, "low: got -1"),
        ({"kind": "quota", "score": "s", "ratio": 0.3, "by": 3}, "by: got 3"),
        ({"kind": "quota", "score": "s", "ratio": 0.3, "by": []}, "by: got"),
        (
            {"kind": "quota", "score": "s", "ratio": 0.3, "by": "source", "length_bins": 3},
            "length_bins: got 3, but by is",
        ),
        ({"kind": "above", "score": "s"}, "threshold: required, but missing"),
        ({"kind": "above", "score": "s", "threshold": float("nan")}, "threshold: got nan"),
        ({**FUSE, "how": "sum"}, "how: got 'sum'"),
        ({**FUSE, "scores": ["a"]}, "scores: got ['a']"),
        ({**FUSE, "scores": ["a", "a"]}, "scores must differ: got a, a"),
        ({**FUSE, "weights": [1]}, "one weight per score: got 1 weights for 2 scores"),
        ({**FUSE, "weights": [0, 0]}, "weights must not all be 0"),
        ({**FUSE, "weight": [1, 2]}, "weight: unknown key; did you mean 'weights'?"),
        ({"kind": "intersect"}, "rules: required, but missing"),
        ({"kind": "intersect", "rules": []}, "rules: got []"),
        ({"kind": "intersect", "rules": "top"}, "rules: got 'top'"),
        ({"kind": "intersect", "rules": [BAND, {**BAND, "low": -1}]}, "rule.rules[1].low: got -1"),
        ({"kind": "intersect", "rules": [BAND, {**BAND, "low": 95}]}, "rule.rules[1]: low must be below high"),
        ({"kind": "intersect", "rules": [{**BAND, "lo": 5}]}, "rule.rules[0].lo: unknown key; did you mean 'low'?"),
        ({"kind": "intersect", "rules": [BAND, "top"]}, "rule.rules[1]: got 'top'; valid: a table with a `kind`"),
        (
            {"kind": "intersect", "rules": [BAND, {"kind": "tap"}]},
            "rule.rules[1].kind: got 'tap'; did you mean 'top'? valid: top, band",
        ),
        (
            {"kind": "intersect", "rules": [BAND], "budget": {"ratoi": 1}},
            "rule.budget.ratoi: unknown key; did you mean 'ratio'",
        ),
        ({"kind": "intersect", "rules": [BAND], "budget": {}}, "rule.budget: exactly one of ratio and count"),
        ({"kind": "intersect", "rules": [BAND], "budget": 0.3}, "budget: got 0.3"),
        (
            {"kind": "intersect", "rules": [BAND, TOP], "budget": {"ratio": 1}},
            "rule.rules[1].kind: got 'top'; valid: band,",
        ),
        (
            {"kind": "intersect", "rules": [{**BAND, "reverse": True}], "budget": {"ratio": 1}},
            "rule.rules[0].reverse: a budget keeps the middle",
        ),
        ({"kind": "dedupe", "by": "prompt"}, "rule: required, but missing"),
        ({"kind": "threshold", "score": "s"}, "needs low, high, or both"),
        ({"kind": "threshold", "score": "s", "low": 2, "high": 1}, "low must not be above high: got low=2.0, high=1.0"),
        (
            {"kind": "threshold", "score": "s", "by": "source", "low": 2, "high": {"hh": 3, "uf": 1}},
            "low must not be above high: got low=2.0, high=1.0 of uf",
        ),
        ({"kind": "threshold", "score": "s", "low": {"hh": 1}}, "low: a table of values needs by"),
        ({"kind": "threshold", "score": "s", "low": 1, "by": "source"}, "by: needs a table as low or high"),
        (
            {"kind": "threshold", "score": "s", "low": {"length-1": 1}, "by": "length_bin"},
            "by: got length_bin, whose bins depend on the data",
        ),
        ({"kind": "threshold", "score": "s", "low": float("nan")}, "low"),
        ({"kind": "agree", "scores": ["s"]}, "scores: got ['s']"),
        ({"kind": "agree", "scores": ["s", "s"]}, "scores must differ: got s, s; one judge agrees with itself"),
        ({"kind": "agree", "scores": ["s", "t"], "action": "turn"}, "action: got 'turn'"),
        (
            {
                "kind": "intersect",
                "rules": [
                    {"kind": "agree", "scores": ["s", "t"], "action": "flip"},
                    {"kind": "agree", "scores": ["s", "u"], "action": "flip"},
                ],
            },
            "2 rules have the action flip; valid: one",
        ),
        ({"kind": "dedupe", "by": "aspect", "rule": TOP}, "by: got 'aspect'"),
        (
            {"kind": "dedupe", "by": "pair", "rule": TOP, "reverse": True},
            "rule.reverse: a dedupe has none; reverse the rule",
        ),
        (
            {"kind": "dedupe", "by": "pair", "rule": {"kind": "dedupe", "by": "prompt", "rule": TOP}},
            "rule.rule.kind: got 'dedupe'; valid: top,",
        ),
        (
            {"kind": "dedupe", "by": "pair", "rule": {"kind": "intersect", "rules": [TOP, {**TOP, "count": 3}]}},
            "rule.rule.rules[1]: exactly one of ratio and count",
        ),
    ],
)
def test_wrong_rules_are_refused_in_words(rule: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_rule(rule)
    assert message in str(error.value)


def test_count_above_the_corpus_names_both() -> None:
    with pytest.raises(UserError, match="count: got 5; valid: at most the 4 eligible pairs"):
        rules.rule_budget(parse_rule({"kind": "top", "score": "s", "count": 5}), 4)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({**FUSE, "ratio": None, "count": 5}, "rule fuse: count: got 5; valid: at most the 4 eligible pairs"),
        (
            {"kind": "intersect", "rules": [BAND], "budget": {"count": 5}},
            "rule.budget.count: got 5; valid: at most the 4",
        ),
        (
            {"kind": "dedupe", "by": "pair", "rule": {**TOP, "ratio": 0.2}},
            "rule.rule: its budget of 4 eligible pairs is 0",
        ),
        (
            {"kind": "intersect", "rules": [BAND, {**TOP, "ratio": 0.2}]},
            "rule.rules[1]: its budget of 4 eligible pairs is 0",
        ),
        ({**TOP, "ratio": 0.2}, "rule top: its budget of 4 eligible pairs is 0; raise it"),
    ],
)
def test_budgets_at_any_depth_are_held_against_the_corpus(rule: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        rules.require_budgets(parse_rule(rule), 4)
    assert message in str(error.value)
    rules.require_budgets(parse_rule(rule), 1000)


def test_every_score_a_rule_reads_is_named_once_and_in_order() -> None:
    inner = {"kind": "intersect", "rules": [{**TOP, "score": "score_b"}, {**FUSE, "scores": ["score_a", "score_b"]}]}
    assert rules.rule_scores({"kind": "dedupe", "by": "pair", "rule": inner}) == ["b", "a"]
    for broken in ({}, {"score": 3, "scores": "x", "rules": 1, "rule": None}, {"rules": [None, []]}):
        assert rules.rule_scores(broken) == []


def test_controls_of_rules() -> None:
    dedupe = {"kind": "dedupe", "by": "prompt", "rule": {**FUSE, "scores": ["score_a", "score_b"]}}
    assert rules.reversed_rule(TOP) == {**TOP, "reverse": True}
    assert rules.reversed_rule(dedupe) == {**dedupe, "rule": {**dedupe["rule"], "reverse": True}}
    assert rules.reversed_rule(rules.reversed_rule(dedupe))["rule"]["reverse"] is False
    assert rules.random_rule({**TOP, "score": "score_a"}, 3) == {"kind": "top", "score": "score_random-a", "count": 3}
    drawn = {"kind": "random", "scores": ["score_a", "score_b"], "count": 3}
    assert rules.random_rule(dedupe["rule"], 3) == drawn
    assert rules.random_rule(dedupe, 3) == {**dedupe, "rule": drawn}
    for rule in (dedupe, rules.reversed_rule(dedupe), rules.random_rule(dedupe, 3)):
        parse_rule(rule)


def exact_percentile(values: list[float], percent: int) -> Fraction:
    ordered = sorted(map(Fraction, values))
    below, rest = divmod((len(values) - 1) * percent, 100)
    above = ordered[min(below + 1, len(values) - 1)]
    return ordered[below] + (above - ordered[below]) * Fraction(rest, 100)


values = st.lists(st.one_of(st.sampled_from([0.0, -0.0, 0.5, 1e9]), st.floats(-1e12, 1e12)), min_size=1, max_size=50)


@settings(max_examples=200, deadline=None)
@given(
    values=values,
    edges=st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda edge: edge[0] < edge[1]),
    num_shards=st.sampled_from([1, 50]),
    num_values=st.sampled_from([2, 3, 1000]),
    reverse=st.booleans(),
)
def test_a_band_has_numpys_edges_and_the_rows_between_the_exact_ones(
    values: list[float], edges: tuple[int, int], num_shards: int, num_values: int, reverse: bool
) -> None:
    score_N = np.array(values)
    place_N = np.random.default_rng(1).integers(0, num_shards, len(values))
    shards = [ShardValues(score_N[place_N == shard]) for shard in range(num_shards)]
    rule = {"kind": "band", "score": "s", "low": edges[0], "high": edges[1], "reverse": reverse}
    cut = decide_over_shards(rule, shards, num_values)
    # numpy's place of an edge may miss a row that it is by a rounding, as 25 · 0.28 does.
    assert cut.edges == pytest.approx(tuple(np.percentile(score_N, edges)), rel=1e-12, abs=1e-3)
    assert not cut.needs_ids
    low, high = (exact_percentile(values, edge) for edge in edges)
    kept = [value for shard in shards for value in shard.value_N[keep(cut, shard)]]
    assert sorted(kept) == sorted(v for v in values if (low < v < high) != reverse)


@settings(max_examples=200, deadline=None)
@given(
    values=values,
    data=st.data(),
    num_shards=st.sampled_from([1, 50]),
    num_values=st.sampled_from([2, 3, 1000]),
    reverse=st.booleans(),
)
def test_quota_equals_a_sort_per_stratum(
    values: list[float], data: st.DataObject, num_shards: int, num_values: int, reverse: bool
) -> None:
    num_rows = len(values)
    count = data.draw(st.integers(1, num_rows))
    stratum = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=num_rows, max_size=num_rows))
    ids = data.draw(st.permutations(range(num_rows)))
    place_N = np.random.default_rng(2).integers(0, num_shards, num_rows)
    shards, rows_of = [], []
    for shard in range(num_shards):
        rows = np.flatnonzero(place_N == shard)
        # Every shard numbers its own strata; codes of -1 are rows of no stratum.
        labels = sorted({(stratum[row],) for row in rows}, key=str, reverse=bool(shard % 2))
        codes = np.array([labels.index((stratum[row],)) for row in rows] + [-1], np.int64)
        words = np.array([(0, ids[row]) for row in rows] + [(0, 999)], ">u8").reshape(-1, 2)
        score_N = np.array([*(values[row] for row in rows), 1e15])
        shards.append(ShardValues(score_N, words, codes, labels))
        rows_of.append([*rows.tolist(), "no stratum"])
    cut = decide_over_shards(
        {"kind": "quota", "score": "s", "by": "aspect", "count": count, "reverse": reverse}, shards, num_values
    )
    kept = {rows[n] for shard, rows in zip(shards, rows_of) for n in np.flatnonzero(keep(cut, shard))}

    expected = set()
    sizes = [stratum.count(label) for label in (None, "a", "b") if label in stratum]
    for label, seats in zip([x for x in (None, "a", "b") if x in stratum], largest_remainder(sizes, count)):
        rows = [row for row in range(num_rows) if stratum[row] == label]
        expected |= set(sorted(rows, key=lambda row: (values[row] if reverse else -values[row], ids[row]))[:seats])
    assert kept == expected


def test_a_shard_without_a_stratum_answers_for_no_rows() -> None:
    shards = [
        ShardValues(np.array([1.0, 2.0]), None, np.array([0, 0]), [("a",)]),
        ShardValues(np.array([5.0, 4.0]), None, np.array([0, 0]), [("b",)]),
        ShardValues(np.empty(0), None, np.empty(0, np.int64), []),
    ]
    cut = decide_over_shards({"kind": "quota", "score": "s", "by": ["aspect"], "ratio": "0.5"}, shards, 2)
    assert [keep(cut, shard).tolist() for shard in shards] == [[False, True], [True, False], []]
    assert cut.to_json() == {"a": {"score": 2.0, "pair_id": None}, "b": {"score": 5.0, "pair_id": None}}


def test_a_budget_of_nothing_keeps_nothing() -> None:
    shard = ShardValues(np.array([1.0, 2.0]))
    cut = decide_over_shards({"kind": "top", "score": "s", "ratio": 0.4}, [shard], 10)
    assert cut.to_json() == {"all": None}
    assert keep(cut, shard).tolist() == [False, False]


def test_an_empty_corpus_keeps_nothing() -> None:
    empty = ShardValues(np.empty(0))
    for rule in ({"kind": "top", "ratio": 1}, {"kind": "band", "low": 10, "high": 90}):
        assert keep(decide_over_shards({**rule, "score": "s"}, [empty], 10), empty).tolist() == []


def test_manifest_shows_the_cut() -> None:
    shard = ShardValues(np.array([2.0, 1.0, 1.0, 1.0]), np.array([(0, 0), (5, 2), (5, 1), (6, 0)], ">u8"))
    cut = decide_over_shards({"kind": "top", "score": "s", "count": 2}, [shard], 10)
    assert cut.to_json() == {"all": {"score": 1.0, "pair_id": f"{5:016x}{1:016x}"}}
    assert keep(cut, shard).tolist() == [True, False, True, False]
    band = decide_over_shards({"kind": "band", "score": "s", "low": 0, "high": 100, "reverse": True}, [shard], 10)
    assert band.to_json() == {"low": 1.0, "high": 2.0, "reverse": True}
    assert keep(band, shard).tolist() == [True, True, True, True]  # the edges are outside the band


def test_label_text_is_readable() -> None:
    assert [label_text(label) for label in [(), ("uf", None), ("hh",)]] == ["all", "uf/null", "hh"]
