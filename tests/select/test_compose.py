"""Every rule and nesting against `naive_rules`, in one table and over several shards; what a rule is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from naive_rules import Impossible, NearTie, Row, made_scores, naive_flipped, naive_select

from prefsel.errors import NonFiniteError, UserError
from prefsel.numbers import ranges
from prefsel.rules import parse_rule
from prefsel.select import flipped_rows, select_table
from prefsel.select.compose import Keep, KeepAll, compile_rule
from prefsel.select.table import keep_rows, table_rows

SCORES = ("a", "b", "c")
VALUES = (0.5, 0.5, 0.5, -0.0, 0.0, 1.0, 1.0625, 3.0, -2.0, 100.25, 7.5)
"""Four of ten are ties, some share a bin of the histogram (1.0 and 1.0625 do not, 0.5 does), zero has both signs."""


def rows_of(data: st.DataObject, num_rows: int) -> list[Row]:
    """Rows with nulls, few prompts and completions, lengths that tie or are unknown."""
    seed, has_nulls = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.booleans())
    return random_rows(np.random.default_rng(seed), data.draw(st.permutations(range(num_rows))), has_nulls)


def random_rows(rng: np.random.Generator, ids: list[int], has_nulls: bool) -> list[Row]:
    def score() -> float | None:
        if has_nulls and rng.random() < 0.15:
            return None
        return float(rng.choice(VALUES)) if rng.random() < 0.7 else float(np.round(rng.normal(), 2))

    return [
        {
            **{name: score() for name in SCORES},
            "id": one * (2**61 + 12345),  # both words of the pair_id differ
            "prompt": f"p{rng.integers(0, 5)}",
            "chosen": f"y{rng.integers(0, 3)}",
            "rejected": f"y{rng.integers(0, 3)}",
            "source": str(rng.choice(["hh", "uf"])),
            "aspect": None if rng.random() < 0.2 else str(rng.choice(["help", "truth"])),
            "language": None if rng.random() < 0.2 else str(rng.choice(["de", "en", "null"])),
            "lengths": None if rng.random() < 0.1 else (int(rng.integers(0, 6)), int(rng.integers(0, 6))),
        }
        for one in ids
    ]


def table_of(rows: list[Row]) -> pa.Table:
    texts = ("prompt", "chosen", "rejected", "source", "aspect", "language")
    lengths = [row["lengths"] or (None, None) for row in rows]
    return pa.table(
        {
            "pair_id": pa.array([row["id"].to_bytes(16, "big") for row in rows], pa.binary(16)),
            **{name: pa.array([row[name] for row in rows], pa.float64()) for name in SCORES},
            **{
                "prompt_id" if name == "prompt" else name: pa.array([row[name] for row in rows], pa.string())
                for name in texts
            },
            "num_tokens_chosen": pa.array([chosen for chosen, _ in lengths], pa.float64()),
            "num_tokens_rejected": pa.array([rejected for _, rejected in lengths], pa.float64()),
        }
    )


ratios = st.sampled_from(["0.2", "0.29", "0.5", "0.77", "1"])
budgets = st.one_of(*[ratios.map(lambda r: {"ratio": r})] * 3, st.integers(1, 8).map(lambda k: {"count": k}))
reverse = st.sampled_from([{}, {}, {"reverse": True}])
one_score = st.sampled_from(SCORES).map(lambda name: {"score": name})
strata = st.sampled_from(
    [
        {"by": "source"},
        {"by": ["aspect"]},
        {"by": ["source", "aspect"]},
        {"by": "language"},
        {"by": ["language", "source"]},
        {"by": "length_bin"},
        {"by": ["source", "length_bin"], "length_bins": 2},
        {"by": ["length_bin"], "length_bins": 11},
    ]
)


def joined(kind: str, *parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {"kind": kind, **{k: v for part in found for k, v in part.items()}})


edges = st.sampled_from([(0, 100), (10, 90), (20, 80), (0, 60), (33, 67), (50, 100), (49, 51), (28, 56), (7, 12.5)])
bands = joined("band", one_score, edges.map(lambda e: {"low": e[0], "high": e[1]}))
tops = joined("top", one_score, budgets, reverse)
above = joined("above", one_score, st.sampled_from([-1.0, 0.0, 0.5, 2.0]).map(lambda x: {"threshold": x}), reverse)
limits = st.sampled_from(
    [{"low": 0.5}, {"high": 0.5}, {"low": 0.0, "high": 1.0}, {"low": 0.5, "high": 0.5}, {"low": -2}]
)
by_source = st.sampled_from(
    [
        {"by": "source", "low": {"hh": 0.5, "uf": 0.0}},
        {"by": ["source"], "low": {"hh": -2.0, "uf": 1.0, "gone": 2.5}, "high": 3.0},
        {"by": "aspect", "high": {"help": 0.5, "truth": 1.0, "null": 0.0}},
    ]
)
between = joined("threshold", one_score, limits | by_source, reverse)
quotas = joined("quota", one_score, budgets, strata, reverse)
several = st.permutations(SCORES).flatmap(lambda names: st.sampled_from([names[:2], names]))
weights = st.sampled_from([None, 1.0, 0.5, -2.0, 0.1, 0.3])
fused = st.tuples(
    several,
    weights,
    joined("fuse", st.sampled_from([{"how": "zscore"}, {"how": "rank"}]), budgets, st.just({}) | strata, reverse),
).map(
    lambda found: {
        **found[2],
        "scores": list(found[0]),
        **({} if found[1] is None else {"weights": [1.0, found[1], 0.25][: len(found[0])]}),
    }
)
middle = st.tuples(st.lists(bands, min_size=1, max_size=3), budgets, reverse).map(
    lambda found: {"kind": "intersect", "rules": found[0], "budget": found[1], **found[2]}
)
shuffled = joined("random", several.map(lambda names: {"scores": list(names)}), budgets, st.just({"seed": 7}))
agreed = joined(
    "agree", several.map(lambda names: {"scores": list(names)}), st.sampled_from([{}, {"action": "flip"}]), reverse
)
simple = st.one_of(tops, bands, joined("band", bands, reverse), above, between, quotas, fused, middle, shuffled, agreed)


def turns_once(rule: dict[str, Any]) -> bool:
    return str(rule).count("'flip'") < 2


def intersections(inside: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    rules = st.lists(inside, min_size=1, max_size=3)
    return st.tuples(rules, reverse).map(lambda found: {"kind": "intersect", "rules": found[0], **found[1]})


def dedupes(inside: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    once = inside.filter(lambda rule: rule["kind"] != "dedupe")
    return st.tuples(once, st.sampled_from(["prompt", "pair"])).map(
        lambda found: {"kind": "dedupe", "by": found[1], "rule": found[0]}
    )


nested = st.recursive(simple, lambda inside: intersections(inside) | dedupes(inside), max_leaves=5).filter(turns_once)


def kept_over_shards(rule: dict[str, Any], table: pa.Table, num_shards: int, seed: int) -> list[int]:
    """The same kernel over a random deal of the rows, each shard in its own order."""
    plan = compile_rule(parse_rule(rule))
    place_N = np.random.default_rng(seed).integers(0, num_shards, table.num_rows)
    deal = [np.flatnonzero(place_N == shard) for shard in range(num_shards)]
    shards = [table_rows(table.take(pa.array(rows)), plan, "rule") for rows in deal]
    if plan.keys:  # keys are numbers within a table: take those of the whole one
        whole = table_rows(table, plan, "rule").keys
        shards = [replace(one, keys={k: v[rows] for k, v in whole.items()}) for one, rows in zip(shards, deal)]
    masks, _ = keep_rows(plan, shards)
    return sorted(int(row) for mask, rows in zip(masks, deal) for row in rows[mask])


KINDS = {
    "leaf": st.one_of(tops, bands, joined("band", bands, reverse), above),
    "threshold": between,
    "agree": agreed,
    "flips inside": (intersections(agreed) | dedupes(agreed | intersections(agreed))).filter(turns_once),
    "quota": quotas,
    "fuse": fused,
    "middle": middle,
    "random": shuffled,
    "intersect": intersections(simple).filter(turns_once),
    "dedupe": dedupes(simple).filter(turns_once),
    "nested": nested,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), num_rows=st.integers(8, 30), num_values=st.sampled_from([2, 3, 1000]))
def test_every_rule_and_nesting_equals_the_naive_one(
    kind: str, data: st.DataObject, num_rows: int, num_values: int
) -> None:
    rule = data.draw(KINDS[kind])
    rows = rows_of(data, num_rows)
    table = table_of(rows)
    try:
        expected = naive_select(rule, rows)
    except NearTie:
        reject()
    except Impossible:
        with pytest.raises(UserError, match=r"eligible pairs|no z-score|has no value for"):
            select_table(table, rule)
        return
    with mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values):
        assert select_table(table, rule).tolist() == expected
        assert flipped_rows(table, rule).tolist() == naive_flipped(rule, rows)
        assert kept_over_shards(rule, table, 4, num_rows) == expected


TRICKY: dict[str, dict[str, Any]] = {
    "one score, two sets of bins": {
        "kind": "intersect",
        "rules": [
            {"kind": "quota", "score": "a", "by": "length_bin", "length_bins": bins, "ratio": 0.7} for bins in (2, 5)
        ],
    },
    "one score, two populations": {
        "kind": "intersect",
        "rules": [
            {"kind": "top", "score": "a", "ratio": 0.8},
            {
                "kind": "dedupe",
                "by": "pair",
                "rule": {
                    "kind": "intersect",
                    "rules": [
                        {"kind": "top", "score": "b", "ratio": 0.9},
                        {"kind": "band", "score": "a", "low": 5, "high": 95},
                    ],
                },
            },
        ],
    },
    "the rest of a dedupe inside": {
        "kind": "intersect",
        "reverse": True,
        "rules": [
            {"kind": "dedupe", "by": "prompt", "rule": {"kind": "top", "score": "a", "ratio": 0.5}},
            {"kind": "above", "score": "b", "threshold": 0.0},
        ],
    },
    "a dedupe after a dedupe": {
        "kind": "dedupe",
        "by": "pair",
        "rule": {
            "kind": "intersect",
            "reverse": True,
            "rules": [
                {"kind": "top", "score": "a", "ratio": 0.3},
                {
                    "kind": "dedupe",
                    "by": "prompt",
                    "rule": {"kind": "top", "score": "b", "ratio": 0.6, "reverse": True},
                },
            ],
        },
    },
}


@pytest.mark.parametrize("name", TRICKY)
def test_nestings_that_read_one_score_twice(name: str) -> None:
    kept = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = random_rows(rng, rng.permutation(40).tolist(), seed % 2 == 0)
        expected = naive_select(TRICKY[name], rows)
        assert select_table(table_of(rows), TRICKY[name]).tolist() == expected
        assert kept_over_shards(TRICKY[name], table_of(rows), 3, seed) == expected
        kept += len(expected)
    assert 0 < kept < 12 * 40


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.one_of(fused, middle, shuffled, agreed), st.integers(8, 30))
def test_derived_scores_have_the_naive_values(data: st.DataObject, rule: dict[str, Any], num_rows: int) -> None:
    rows = rows_of(data, num_rows)
    plan = compile_rule(parse_rule({**rule, "budget": {"ratio": 1}} if "rules" in rule else rule))
    population = [n for n, row in enumerate(rows) if all(row[name] is not None for name in plan.inputs)]
    try:
        expected = made_scores(rule, rows, population)[repr(rule)]
        _, (shown,) = keep_rows(plan, [table_rows(table_of(rows), plan, "rule")])
    except (Impossible, NearTie, UserError):
        reject()
    score_N = shown.scores[plan.score]
    assert np.flatnonzero(~np.isnan(score_N)).tolist() == population
    np.testing.assert_allclose(score_N[population], [float(expected[n]) for n in population], rtol=1e-12, atol=1e-12)
    assert not np.signbit(score_N[score_N == 0]).any()


# ----------------------------------------------------------------------------------------------------- by hand


def test_golden_lossdiff_irm_is_an_intersection_of_two_bands(golden: dict[str, dict]) -> None:
    example = golden["lossdiff-irm-bands"]
    table = pa.table({"pair_id": list(range(10)), **example["inputs"]})
    bands = [{"kind": "band", "score": name, **example["params"]} for name in example["inputs"]]
    kept = select_table(table, {"kind": "intersect", "rules": bands})
    assert kept.tolist() == example["expected"]["keep"]
    rest = select_table(table, {"kind": "intersect", "rules": bands, "reverse": True})
    assert rest.tolist() == sorted(set(range(10)) - set(example["expected"]["keep"]))


def test_a_budget_keeps_the_middle_of_every_score() -> None:
    # Every score in a bin of its own: percentiles 5, 15, ..., 95, and their distance from 50 is 45, 35, ..., 45.
    powers = [2.0**n for n in range(10)]
    b = [powers[(n + 3) % 10] for n in range(10)]
    table = pa.table({"pair_id": list(range(10)), "a": powers, "b": b})
    bands = [{"kind": "band", "score": name, "low": 49, "high": 51} for name in "ab"]
    # Row n has percentiles 5 + 10 n in a and 5 + 10 ((n + 3) mod 10) in b; max distances by row:
    # 0: 45  1: 35  2: 25  3: 15  4: 25  5: 35  6: 45  7: 45  8: 35  9: 45
    for count, expected in ((1, [3]), (2, [2, 3]), (3, [2, 3, 4]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])):
        rule = {"kind": "intersect", "rules": bands, "budget": {"count": count}}
        assert select_table(table, rule).tolist() == expected
        rest = select_table(table, {**rule, "reverse": True})
        assert rest.tolist() == [n for n in range(10) if n not in expected]


def test_fusion_by_hand() -> None:
    # a has mean 0 and std 1, b the same ten times larger; the last row has no b and counts for neither.
    table = pa.table(
        {"pair_id": [4, 3, 2, 1, 0], "a": [1.0, -1.0, 1.0, -1.0, 50.0], "b": [10.0, 10.0, -10.0, -10.0, None]}
    )
    rule = {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "count": 2}
    assert select_table(table, rule).tolist() == [0, 2]  # sums 2, 0, 0, -2: the tie goes to the smaller pair_id
    assert select_table(table, {**rule, "weights": [1, 2]}).tolist() == [0, 1]
    assert select_table(table, {**rule, "weights": [1, -1]}).tolist() == [2, 3]
    assert select_table(table, {**rule, "reverse": True}).tolist() == [2, 3]


def test_dedupe_by_hand() -> None:
    table = pa.table(
        {
            "pair_id": [5, 4, 3, 2, 1, 0],
            "prompt_id": ["p", "p", "p", "q", "q", "q"],
            "chosen": ["x", "y", "x", "x", "x", "z"],
            "rejected": ["y", "x", "z", "y", "y", "x"],
            "aspect": ["help", "truth", "help", "help", "truth", "help"],
            "s": [1.0, 2.0, 1.5, 7.0, 7.0, 9.0],
        }
    )
    everything = {"kind": "top", "score": "s", "ratio": 1}
    assert select_table(table, {"kind": "dedupe", "by": "prompt", "rule": everything}).tolist() == [1, 5]
    # The same two completions under two aspects, chosen either way round; 7.0 ties: the smaller pair_id stays.
    assert select_table(table, {"kind": "dedupe", "by": "pair", "rule": everything}).tolist() == [1, 2, 4, 5]
    last = {**everything, "reverse": True}
    assert select_table(table, {"kind": "dedupe", "by": "prompt", "rule": last}).tolist() == [0, 4]
    # The budget is one of what is left.
    half = {"kind": "dedupe", "by": "pair", "rule": {"kind": "top", "score": "s", "ratio": 0.5}}
    assert select_table(table, half).tolist() == [4, 5]


def test_length_bins_by_hand() -> None:
    # Gaps 0, 1, 2, 3, 4 and unknown: inner edges of two bins: the median 2, which is in the upper bin.
    table = pa.table(
        {
            "pair_id": [0, 1, 2, 3, 4, 5],
            "num_tokens_chosen": [5, 6, 7, 2, 1, None],
            "num_tokens_rejected": [5, 5, 5, 5, 5, 5],
            "s": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        }
    )
    rule = {"kind": "quota", "score": "s", "by": "length_bin", "length_bins": 2, "ratio": 0.5}
    # Strata of 1 (unknown), 2 and 3 rows share 3 seats: 0.5, 1 and 1.5; the left over one goes to the first of both.
    assert select_table(table, rule).tolist() == [0, 2, 5]


def test_above_is_strict() -> None:
    table = pa.table({"pair_id": [0, 1, 2, 3, 4], "s": [0.0, -0.0, 5e-324, -1.0, None]})
    rule = {"kind": "above", "score": "s", "threshold": 0}
    assert select_table(table, rule).tolist() == [2]
    assert select_table(table, {**rule, "reverse": True}).tolist() == [0, 1, 3]


def test_an_intersection_judges_over_the_pairs_that_have_every_score() -> None:
    # Over all rows the upper half of a is rows 0 to 2; only rows 3 to 5 have b, and of these it is row 3.
    table = pa.table(
        {"pair_id": list(range(6)), "a": [9.0, 8.0, 7.0, 3.0, 2.0, 1.0], "b": [None, None, None, 1.0, 2.0, 3.0]}
    )
    rule = {
        "kind": "intersect",
        "rules": [{"kind": "top", "score": "a", "ratio": 0.5}, {"kind": "top", "score": "b", "ratio": 1}],
    }
    assert select_table(table, rule).tolist() == [3]
    assert select_table(table, {**rule, "reverse": True}).tolist() == [4, 5]


def test_a_fusion_inside_an_intersection_takes_its_statistics_over_the_pairs_of_all_rules() -> None:
    # The first two rows, without c, would make b's deviations tiny against a's.
    table = pa.table(
        {
            "pair_id": [0, 1, 2, 3, 4],
            "a": [0.0, 0.0, 1.0, -1.0, 0.0],
            "b": [100.0, -100.0, 1.0, 2.0, -3.0],
            "c": [None, None, 1.0, 1.0, 1.0],
        }
    )
    fuse = {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "weights": [1, 2], "count": 1}
    above = {"kind": "above", "score": "c", "threshold": 0}
    assert select_table(table, fuse).tolist() == [0]
    # Sums of z-scores: a is (1, −1, 0) / 0.816, b is (1, 2, −3) / 2.160.
    plan = compile_rule(parse_rule({"kind": "intersect", "rules": [fuse, above]}))
    (mask,), (rows,) = keep_rows(plan, [table_rows(table, plan, "rule")])
    expected = [np.nan, np.nan, 1.5**0.5 + 2 / (14 / 3) ** 0.5, -(1.5**0.5) + 4 / (14 / 3) ** 0.5, -6 / (14 / 3) ** 0.5]
    np.testing.assert_allclose(rows.scores["@fuse"], expected)
    assert np.flatnonzero(mask).tolist() == [2]


def test_scores_are_made_before_a_dedupe_drops_pairs() -> None:
    # Over all four rows the sums are 1, 1, √2 − 1 and −√2 − 1; made of the two rows that are left both would be 0.
    table = pa.table(
        {"pair_id": [0, 1, 2, 3], "prompt_id": list("ppqq"), "a": [3.0, 3.0, 1.0, 1.0], "b": [0.0, 0.0, 4.0, -4.0]}
    )
    fuse = {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "weights": [1, 1], "count": 1}
    plan = compile_rule(parse_rule({"kind": "dedupe", "by": "prompt", "rule": fuse}))
    (mask,), (rows,) = keep_rows(plan, [table_rows(table, plan, "rule")])
    np.testing.assert_allclose(rows.scores["@fuse"], [1.0, 1.0, 2**0.5 - 1, -(2**0.5) - 1])
    np.testing.assert_allclose(rows.scores["@dedupe"], [1.0, np.nan, 2**0.5 - 1, np.nan])
    assert mask.tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------- plans


def test_a_leaf_is_its_own_plan() -> None:
    plan = compile_rule(parse_rule({"kind": "band", "score": "score_x", "low": 10, "high": 90}))
    assert (plan.inputs, plan.derived, plan.score, plan.descending) == (("score_x",), (), "score_x", True)
    assert isinstance(plan.keep, Keep)
    assert plan.keep.has_own_scores


def test_a_dedupe_of_a_fusion_is_two_scores_and_a_top() -> None:
    fuse = {"kind": "fuse", "scores": ["a", "b"], "how": "rank", "ratio": 0.3}
    plan = compile_rule(parse_rule({"kind": "dedupe", "by": "prompt", "rule": fuse}))
    assert [(step.label, step.how, step.scores, step.population) for step in plan.derived] == [
        ("fuse", "rank", ("a", "b"), ("a", "b")),
        ("dedupe", "best", ("@fuse",), ("@fuse",)),
    ]
    assert plan.derived[0].weights == (0.5, 0.5)
    assert isinstance(plan.keep, Keep)
    assert (plan.keep.column, plan.keep.population, plan.score) == ("@dedupe", ("@dedupe",), "@dedupe")


def test_an_intersection_shows_its_first_score_and_needs_all() -> None:
    leaf = {"kind": "top", "score": "b", "ratio": 0.5}
    fuse = {"kind": "fuse", "scores": ["a", "c"], "how": "zscore", "ratio": 0.5}
    plan = compile_rule(parse_rule({"kind": "intersect", "rules": [leaf, fuse]}))
    assert isinstance(plan.keep, KeepAll)
    assert (plan.score, plan.keep.population) == ("b", ("b", "a", "c"))
    assert [(one.column, one.population) for one in plan.leaves] == [("b", ("b", "a", "c")), ("@fuse", ("@fuse",))]


# ------------------------------------------------------------------------------------------------------ errors


def test_a_constant_score_has_no_z_score() -> None:
    table = pa.table({"pair_id": [0, 1], "a": [1.0, 2.0], "b": [3.0, 3.0]})
    rule = {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "ratio": 0.5}
    with pytest.raises(UserError, match="rule fuse: b is 3 for all 2 pairs: no z-score"):
        select_table(table, rule)
    # By rank b's tie is broken by pair_id, so that the sums tie, and so is that one.
    assert select_table(table, {**rule, "how": "rank"}).tolist() == [0]


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ([1.7e308, 1.7e308, -1.7e308], r"from -1.7e\+308 to 1.7e\+308: their mean or squared deviations overflow"),
        ([1e155, 2e155, 3e155], r"from 1e\+155 to 3e\+155: their mean or squared deviations overflow"),
        ([1e-170, 2e-170, 3e-170], r"from 1e-170 to 3e-170: their mean or squared deviations underflow"),
    ],
)
def test_moments_that_overflow_are_refused(a: list[float], message: str) -> None:
    """The deviation was infinite and every z-score 0, or the other way round."""
    table = pa.table({"pair_id": [0, 1, 2], "a": a, "b": [3.0, 1.0, 2.0]})
    with pytest.raises(UserError, match=rf"rule fuse: a: 3 values {message} float64; scale them"):
        select_table(table, {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "ratio": 0.5})
    assert select_table(table, {"kind": "top", "score": "a", "count": 1}).tolist() in ([0], [2])  # needs no moments


def test_a_weighted_sum_that_overflows_is_refused() -> None:
    table = pa.table({"pair_id": [0, 1, 2], "a": [1.0, 2.0, 3.0], "b": [3.0, 1.0, 2.0]})
    for how in ("zscore", "rank"):
        rule = {"kind": "fuse", "scores": ["a", "b"], "how": how, "ratio": 0.5, "weights": [1.7e308, 1.7e308]}
        with pytest.raises(NonFiniteError, match="fuse of a, b: a score is NaN or infinite"):
            select_table(table, rule)


def test_what_a_table_lacks_is_named() -> None:
    table = pa.table({"pair_id": [0], "a": [1.0], "prompt_id": pa.array([None], pa.string())})
    top = {"kind": "top", "score": "a", "ratio": 1}
    with pytest.raises(UserError, match="rule dedupe: needs chosen, rejected; the table has pair_id, a, prompt_id"):
        select_table(table, {"kind": "dedupe", "by": "pair", "rule": top})
    with pytest.raises(UserError, match="prompt_id: 1 of 1 values are null; a dedupe needs every one"):
        select_table(table, {"kind": "dedupe", "by": "prompt", "rule": top})
    with pytest.raises(UserError, match="rule quota: needs num_tokens_chosen, num_tokens_rejected"):
        select_table(table, {"kind": "quota", "score": "a", "by": "length_bin", "ratio": 1})
    texts = {"chosen": pa.array([["x"]]), "rejected": pa.array([["x"]]), "prompt_id": pa.array([1])}
    with pytest.raises(UserError, match="chosen and rejected: got a column of list<item: string>; valid: text, ids"):
        select_table(pa.table({"pair_id": [0], "a": [1.0], **texts}), {"kind": "dedupe", "by": "pair", "rule": top})


def test_nothing_eligible_keeps_nothing() -> None:
    table = pa.table({"pair_id": [0], "a": pa.array([None], pa.float64()), "b": [1.0], "prompt_id": ["p"]})
    fuse = {"kind": "fuse", "scores": ["a", "b"], "how": "zscore", "ratio": 1}
    band = {"kind": "band", "score": "a", "low": 0, "high": 100}
    for rule in (
        fuse,
        {**fuse, "how": "rank"},
        {"kind": "dedupe", "by": "prompt", "rule": fuse},
        {"kind": "intersect", "rules": [band, {"kind": "top", "score": "b", "ratio": 1}]},
        {"kind": "intersect", "rules": [band], "budget": {"ratio": 1}},
        {"kind": "random", "scores": ["a"], "ratio": 1},
    ):
        assert select_table(table, rule).tolist() == []
