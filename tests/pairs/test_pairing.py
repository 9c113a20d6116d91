"""Pairs from K judged completions: small tables by hand, then naive loops over random ones."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from prefsel.config.pairing import AboveMargin, BestRandom, BestWorst, ByGenerator, Confidence, Pairing
from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.pairs.pairing import REASONS, make_pairs
from prefsel.reasons import LOST
from prefsel.schema import GROUPS, PAIRS, groups_schema


def prompt_of(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"p{number}"}]


def table(*texts: list[str], first: int = 0) -> pa.Table:
    """One group per list of texts; the n-th is of prompt `p<n>` and of row n."""
    rows = []
    for number, own in enumerate(texts, first):
        prompt = prompt_id(prompt_of(number))
        said = [[{"role": "assistant", "content": text}] for text in own]
        completions = [{"completion_id": completion_id(prompt, one), "messages": one, "ratings": []} for one in said]
        rows.append(
            {
                "prompt_id": prompt,
                "prompt": prompt_of(number),
                "completions": completions,
                "provenance": {"row": number},
            }
        )
    return pa.Table.from_pylist(rows, GROUPS)


def named(pairs: pa.Table, groups: pa.Table) -> list[tuple[str, str, float | None]]:
    """Chosen text, rejected text and margin of every pair; its ids are checked on the way."""
    assert pairs.schema.equals(PAIRS)
    by_prompt = {one["prompt_id"]: one for one in groups.to_pylist()}
    found = []
    for row in pairs.to_pylist():
        group = by_prompt[row["prompt_id"]]
        chosen, rejected = (group["completions"][row[side]] for side in ("chosen", "rejected"))
        ids = chosen["completion_id"], rejected["completion_id"]
        assert row["pair_id"] == pair_id(row["prompt_id"], *ids, None)
        assert row["mirror_id"] == pair_id(row["prompt_id"], *ids[::-1], None)
        assert (row["aspect"], row["provenance"]) == (None, group["provenance"])
        found.append((chosen["messages"][0]["content"], rejected["messages"][0]["content"], row["label_margin"]))
    return found


def of_one(rule: Pairing, **judged: list[Any]) -> list[tuple[str, str, float | None]] | str:
    """The pairs of one group whose completions are called a, b, c, …; or the reason there is none."""
    size = len(next(iter(judged.values())))
    groups = table(list("abcdefgh"[:size]))
    pairs, dropped = make_pairs(groups, {name: [values] for name, values in judged.items()}, rule)
    if not pairs.num_rows:
        assert list(dropped.values()) == [1]
        return next(iter(dropped))
    assert dropped == {}
    return named(pairs, groups)


def by_generator(
    rule: ByGenerator, generators: list[str | None], lengths: list[Any] | None = None, texts: str = "abcdefgh"
) -> list[tuple[str, str, float | None]] | str:
    groups = table(list(texts[: len(generators)]))
    given = None if lengths is None else [lengths]
    pairs, dropped = make_pairs(groups, {}, rule, generators=[generators], lengths=given)
    return named(pairs, groups) if pairs.num_rows else next(iter(dropped))


def test_best_against_worst() -> None:
    assert of_one(BestWorst(), rm=[1.0, 4.0, -2.0, 3.0]) == [("b", "c", 6.0)]
    assert of_one(BestWorst(), rm=[None, 4.0, 3.5, None]) == [("b", "c", 0.5)]
    assert of_one(BestWorst(), rm=[2, 1]) == [("a", "b", 1.0)]  # whole numbers are numbers


@pytest.mark.parametrize(
    ("reason", "values"),
    [
        ("tied", [2.0, 2.0, 2.0]),
        ("tied", [0.0, -0.0]),
        ("tied", [None, 1.5, 1.5]),
        ("unjudged", [None, 1.0, None]),
        ("unjudged", [None, None]),
        ("unjudged", [5.0, None]),
        ("too_few_responses", [1.0]),
        ("too_few_responses", []),
        ("too_few_responses", [None]),
    ],
)
@pytest.mark.parametrize("rule", [BestWorst(), BestRandom(), AboveMargin()], ids=lambda rule: rule.kind)
def test_why_a_prompt_gives_no_pair(rule: Pairing, reason: str, values: list[float | None]) -> None:
    assert of_one(rule, rm=values) == reason


def test_every_reason_has_its_words() -> None:
    assert set(REASONS) <= LOST.keys()


def test_the_best_against_one_that_is_strictly_worse() -> None:
    values = [1.0, 4.0, 4.0, 3.0]
    found = {of_one(BestRandom(seed=seed), rm=values)[0] for seed in range(200)}
    assert found == {("b", "a", 3.0), ("b", "d", 1.0), ("c", "a", 3.0), ("c", "d", 1.0)}


def test_draws_are_even() -> None:
    """2 000 prompts, 4 worse responses each: every place is drawn 500 times, σ = 19.4."""
    number = 2000
    groups = table(*[[f"{row} {one}" for one in range(5)] for row in range(number)])
    pairs, dropped = make_pairs(groups, {"rm": [[0.0, 1.0, 2.0, 3.0, 9.0]] * number}, BestRandom(seed=1))
    counts = Counter(pairs["rejected"].to_pylist())
    assert (pairs["chosen"].unique().to_pylist(), dropped) == ([4], {})
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 500) < 4 * 19.4 for count in counts.values())


def test_another_seed_draws_anew() -> None:
    groups = table(*[[f"{row} {one}" for one in range(5)] for row in range(50)])
    drawn = [
        make_pairs(groups, {"rm": [[0.0, 1.0, 2.0, 3.0, 9.0]] * 50}, BestRandom(seed=seed))[0] for seed in (0, 0, 1)
    ]
    assert drawn[0].equals(drawn[1])
    assert drawn[0]["rejected"].to_pylist() != drawn[2]["rejected"].to_pylist()


def test_every_margin_above_the_limit_largest_first() -> None:
    values = [1.0, 2.0, 4.0]
    assert of_one(AboveMargin(), rm=values) == [("c", "a", 3.0), ("c", "b", 2.0), ("b", "a", 1.0)]
    assert of_one(AboveMargin(margin=1.0), rm=values) == [("c", "a", 3.0), ("c", "b", 2.0)]  # strictly
    assert of_one(AboveMargin(max_pairs=1), rm=values) == [("c", "a", 3.0)]
    assert of_one(AboveMargin(margin=3.0), rm=values) == "within_bounds"
    assert of_one(AboveMargin(margin=3.0), rm=[1.0, 1.0]) == "tied"


def test_equal_margins_go_by_pair_id() -> None:
    groups = table(list("abcd"))
    pairs, _ = make_pairs(groups, {"rm": [[1.0, 1.0, 2.0, 2.0]]}, AboveMargin())
    assert pairs["pair_id"].to_pylist() == sorted(pairs["pair_id"].to_pylist())
    assert {one[:2] for one in named(pairs, groups)} == {("c", "a"), ("c", "b"), ("d", "a"), ("d", "b")}
    first, _ = make_pairs(groups, {"rm": [[1.0, 1.0, 2.0, 2.0]]}, AboveMargin(max_pairs=2))
    assert first.equals(pairs.slice(0, 2))
    best, _ = make_pairs(groups, {"rm": [[1.0, 1.0, 2.0, 2.0]]}, BestWorst())
    assert best.equals(pairs.slice(0, 1))


def test_bounds_that_do_not_overlap() -> None:
    """Means 3, 1, 0; deviations 1, 0, 1: bounds [2, 4], [1, 1], [−1, 1]."""
    judges = {"one": [2.0, 1.0, -1.0], "two": [4.0, 1.0, 1.0]}
    everything = of_one(Confidence(all=True), **judges)
    # Both gaps are 1, so pair_id decides; b and c touch: the lower bound 1 is not above the upper bound 1.
    assert set(everything) == {("a", "b", 2.0), ("a", "c", 3.0)}
    assert of_one(Confidence(all=True, max_pairs=1), **judges) == everything[:1] == of_one(Confidence(), **judges)
    assert of_one(Confidence(width=0), **judges) == [("a", "c", 3.0)]
    assert of_one(Confidence(width=1.5), **judges) == [("a", "b", 2.0)]  # gaps 0.5 and, of [1.5, …] to [… 1.5], 0
    assert of_one(Confidence(width=2), **judges) == "within_bounds"  # [1, 5] begins where [1, 1] ends


def test_judges_that_contradict_each_other_make_no_pair() -> None:
    assert of_one(Confidence(), one=[1.0, 2.0], two=[2.0, 1.0]) == "tied"
    assert of_one(Confidence(), one=[1.0, 2.0], two=[3.0, 1.0]) == "within_bounds"
    assert of_one(Confidence(), one=[1.0, None], two=[2.0, 0.0]) == "unjudged"
    assert of_one(Confidence(), one=[1.0, 0.0], two=[None, None]) == "unjudged"


def test_the_widest_gap_is_taken_not_the_largest_mean() -> None:
    """Means 5.5, 4, 0; deviations 4, 0, 1: the gap of a and c is 1.5 − 1, that of b and c 4 − 1."""
    judges = {"one": [1.5, 4.0, -1.0], "two": [9.5, 4.0, 1.0]}
    assert of_one(Confidence(), **judges) == [("b", "c", 4.0)]
    assert of_one(Confidence(all=True), **judges) == [("b", "c", 4.0), ("a", "c", 5.5)]


def test_rounding_makes_no_margin() -> None:
    """Sums of 1 in three ways: the mean is a third, whoever adds it up."""
    assert of_one(Confidence(width=0), x=[2.0, 0.0, 1.0], y=[-1.0, 1.0, 0.0], z=[0.0, 0.0, 0.0]) == "tied"
    assert of_one(Confidence(width=0), x=[0.1, 0.3], y=[0.2, 0.2], z=[0.3, 0.1]) == "tied"


def test_judges_that_agree_have_no_deviation() -> None:
    assert of_one(Confidence(width=1e9), x=[0.1, 0.3], y=[0.1, 0.3], z=[0.1, 0.3])[0][:2] == ("b", "a")


def test_strong_against_weak() -> None:
    rule = ByGenerator(strong="large", weak="small", max_length_difference=None)
    assert by_generator(rule, ["small", "large"]) == [("b", "a", None)]
    assert by_generator(rule, ["small", "other", "small"]) == "one_generator"
    assert by_generator(rule, ["large", None]) == "one_generator"
    assert by_generator(rule, ["other", "other"]) == "one_generator"
    assert by_generator(rule, ["large"]) == "too_few_responses"
    every = by_generator(rule.model_copy(update={"all": True}), ["small", "large", "other", "small", "large"])
    assert {one[:2] for one in every} == {("b", "a"), ("b", "d"), ("e", "a"), ("e", "d")}
    drawn = {by_generator(rule.model_copy(update={"seed": n}), ["small", "large", "small"])[0] for n in range(50)}
    assert drawn == {("b", "a", None), ("b", "c", None)}


def test_the_limit_on_lengths_is_inclusive() -> None:
    rule = ByGenerator(strong="s", weak="w")
    assert rule.max_length_difference == 100
    assert by_generator(rule, ["s", "w"], [120, 20]) == [("a", "b", None)]
    assert by_generator(rule, ["s", "w"], [121, 20]) == "length_gap"
    assert by_generator(rule, ["s", "w"], [20, 121]) == "length_gap"
    assert by_generator(rule, ["s", "w"], [20, None]) == "length_gap"
    assert by_generator(rule, ["s", "w", "w"], [500, 20, 450]) == [("a", "c", None)]


def test_equal_texts_never_pair() -> None:
    groups = table(["same", " same\n", "other"])
    pairs, _ = make_pairs(groups, {"rm": [[5.0, 1.0, 2.0]]}, AboveMargin())
    assert {one[:2] for one in named(pairs, groups)} == {("same", "other"), ("other", " same\n")}
    pairs, _ = make_pairs(groups, {"rm": [[5.0, 1.0, 5.0]]}, BestWorst())
    assert named(pairs, groups) == [("other", " same\n", 4.0)]
    for rule in (BestWorst(), BestRandom(), AboveMargin()):
        pairs, dropped = make_pairs(table(["yes", "yes "]), {"rm": [[1.0, 2.0]]}, rule)
        assert (pairs.num_rows, dropped) == (0, {"tied": 1})
    rule = ByGenerator(strong="s", weak="w", max_length_difference=None)
    assert make_pairs(table(["yes", "yes "]), {}, rule, generators=[["s", "w"]])[1] == {"tied": 1}


def test_what_else_a_message_holds_tells_texts_apart() -> None:
    schema = groups_schema(has_rest=True)
    prompt = prompt_id(prompt_of(0))
    rests = ['{"tool_calls":["f"]}', '{"tool_calls":["g"]}']
    completions = [
        {
            "completion_id": bytes([number]) * 16,
            "messages": [{"role": "assistant", "content": None, "rest": rest}],
            "ratings": [],
        }
        for number, rest in enumerate(rests)
    ]
    row = {"prompt_id": prompt, "prompt": [], "completions": completions, "provenance": None}
    pairs, dropped = make_pairs(pa.Table.from_pylist([row], schema), {"rm": [[1.0, 2.0]]}, BestWorst())
    assert (pairs["chosen"].to_pylist(), pairs["provenance"].to_pylist(), dropped) == ([1], [None], {})


def test_turns_are_compared_one_by_one() -> None:
    prompt = prompt_id(prompt_of(0))
    turns = [["a b", "c"], ["a", "b c"], ["a b", "c"]]
    completions = [
        {
            "completion_id": bytes([number]) * 16,
            "messages": [{"role": "assistant", "content": text} for text in own],
            "ratings": [],
        }
        for number, own in enumerate(turns)
    ]
    row = {"prompt_id": prompt, "prompt": prompt_of(0), "completions": completions, "provenance": None}
    pairs, _ = make_pairs(pa.Table.from_pylist([row], GROUPS), {"rm": [[1.0, 2.0, 3.0]]}, AboveMargin())
    found = {(one["chosen"], one["rejected"]) for one in pairs.to_pylist()}
    assert found == {(1, 0), (2, 1)}


def test_a_prompt_can_be_dropped_whole() -> None:
    values = [1.0, None, 2.0]
    assert of_one(BestWorst(), rm=values) == [("c", "a", 1.0)]
    assert of_one(BestWorst(require_all=True), rm=values) == "unjudged"
    assert of_one(BestWorst(require_all=True), rm=[1.0, 2.0]) == [("b", "a", 1.0)]
    assert of_one(BestWorst(require_all=True, num_expected=3), rm=[1.0, 2.0]) == "too_few_responses"
    assert of_one(BestWorst(require_all=True, num_expected=3), rm=[1.0, 2.0, 3.0]) == [("c", "a", 2.0)]
    assert of_one(Confidence(require_all=True), x=[1.0, 2.0, 3.0], y=[1.0, 2.0, None]) == "unjudged"


def test_every_prompt_is_a_pair_or_counted() -> None:
    groups = table(["a", "b"], ["a"], ["a", "b", "c"], ["a", "b"], [])
    values = [[1.0, 2.0], [1.0], [None, 2.0, None], [3.0, 3.0], []]
    pairs, dropped = make_pairs(groups, {"rm": values}, BestWorst())
    assert dropped == {"too_few_responses": 2, "unjudged": 1, "tied": 1}
    assert pairs["provenance"].to_pylist() == [{"row": 0}]


def test_no_groups_are_no_pairs() -> None:
    for rule in (BestWorst(), AboveMargin()):
        pairs, dropped = make_pairs(GROUPS.empty_table(), {"rm": []}, rule)
        assert (pairs.num_rows, dropped, pairs.schema.equals(PAIRS)) == (0, {}, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_an_error(bad: float) -> None:
    groups = table(["a", "b"], ["c", "d"], ["e", "f"])
    prompts = [one.hex() for one in groups["prompt_id"].to_pylist()]
    with pytest.raises(NonFiniteError, match=f"^rm_x: NaN or infinite in 2 groups, first prompt_ids {prompts[1]}, "):
        make_pairs(groups, {"rm_x": [[1.0, 2.0], [bad, 1.0], [None, bad]]}, BestWorst())
    rule = ByGenerator(strong="s", weak="w")
    with pytest.raises(NonFiniteError, match=f"^lengths: NaN or infinite in 1 groups, first prompt_ids {prompts[0]}"):
        make_pairs(groups, {}, rule, generators=[["s", "w"]] * 3, lengths=[[bad, 1], [1, 1], [1, 1]])


def test_a_margin_that_overflows_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="label_margin: overflows for prompt_id"):
        make_pairs(table(["a", "b"]), {"rm": [[1.7e308, -1.7e308]]}, BestWorst())


@pytest.mark.parametrize(
    ("message", "rule", "columns", "more"),
    [
        ("columns: got None; valid: one judge", BestWorst(), {}, {}),
        ("columns: got 'x, y'; valid: one judge", AboveMargin(), {"x": [[1, 2]], "y": [[1, 2]]}, {}),
        ("columns: got 'x'; valid: two judges or more", Confidence(), {"x": [[1, 2]]}, {}),
        ("columns: got 'x'; valid: none", ByGenerator(strong="s", weak="w"), {"x": [[1, 2]]}, {}),
        ("generators: got None", ByGenerator(strong="s", weak="w"), {}, {}),
        ("lengths: got None", ByGenerator(strong="s", weak="w"), {}, {"generators": [["s", "w"]]}),
        ("x: got 2 lists for 1 groups", BestWorst(), {"x": [[1, 2], [1, 2]]}, {}),
        ("x: got 3 values for the 2 completions of prompt_id", BestWorst(), {"x": [[1, 2, 3]]}, {}),
        ("x: got None values for the 2 completions of prompt_id", BestWorst(), {"x": [None]}, {}),
    ],
)
def test_what_does_not_fit_is_refused(message: str, rule: Pairing, columns: Any, more: Any) -> None:
    with pytest.raises(UserError, match=message):
        make_pairs(table(["a", "b"]), columns, rule, **more)


def test_a_completion_that_stands_twice_is_refused() -> None:
    with pytest.raises(IntegrityError, match="more than once"):
        make_pairs(table(["a", "a"]), {"rm": [[1.0, 2.0]]}, BestWorst())


RECORDS = TypeAdapter(Pairing)


def test_records_are_told_by_their_kind() -> None:
    assert RECORDS.validate_python({"kind": "best_worst"}) == BestWorst()
    assert RECORDS.validate_python({"kind": "above_margin", "margin": 0.5, "max_pairs": 2}).max_pairs == 2


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "best"},
        {},
        {"kind": "best_worst", "seed": 1},
        {"kind": "best_worst", "num_expected": 5},
        {"kind": "above_margin", "margin": -1},
        {"kind": "above_margin", "margin": math.nan},
        {"kind": "above_margin", "max_pairs": 0},
        {"kind": "confidence", "width": -1},
        {"kind": "confidence", "max_pairs": 3},
        {"kind": "by_generator", "strong": "a"},
        {"kind": "by_generator", "strong": "a", "weak": "a"},
        {"kind": "by_generator", "strong": "a", "weak": "b", "max_length_difference": -1},
    ],
)
def test_records_that_mean_nothing_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RECORDS.validate_python(record)


# Naive counterparts: over names of completions, in exact fractions where the rule has arithmetic.

NUMBERS = st.one_of(st.none(), st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "a ", " b", "c\n", "e"]), unique=True, max_size=6)


@st.composite
def corpora(draw: st.DrawFn, judges: int) -> tuple[list[list[str]], list[list[list[float | None]]]]:
    texts = draw(st.lists(TEXTS, min_size=1, max_size=4))
    return texts, [[[draw(NUMBERS) for _ in own] for own in texts] for _ in range(judges)]


def differs(a: str, b: str) -> bool:
    return a.strip() != b.strip()


def naive(texts: list[str], judged: list[list[float | None]], rule: Pairing) -> list[tuple[str, str]] | str:
    """The pairs of one group as a set of texts would tell them, before any tie is broken by id."""
    if len(texts) < 2:
        return "too_few_responses"
    values = {text: [row[place] for row in judged] for place, text in enumerate(texts)}
    known = {text: [Fraction(one) for one in row if one is not None] for text, row in values.items()}
    known = {text: row for text, row in known.items() if len(row) == len(judged)}
    if len(known) < 2:
        return "unjudged"
    mean = {text: sum(row) / Fraction(len(row)) for text, row in known.items()}
    better = [(a, b) for a in known for b in known if mean[a] > mean[b] and differs(a, b)]
    if not better:
        return "tied"
    if isinstance(rule, BestWorst):
        top = max(mean[a] for a, _ in better)
        low = min(mean[b] for a, b in better if mean[a] == top)
        return [(a, b) for a, b in better if (mean[a], mean[b]) == (top, low)]
    if isinstance(rule, BestRandom):
        top = max(mean[a] for a, _ in better)
        return [(a, b) for a, b in better if mean[a] == top]
    if isinstance(rule, AboveMargin):
        return [(a, b) for a, b in better if float(mean[a]) - float(mean[b]) > rule.margin] or "within_bounds"
    deviation = {text: math.sqrt(sum((one - mean[text]) ** 2 for one in row) / len(row)) for text, row in known.items()}
    gaps = {(a, b): float(mean[a] - mean[b]) - rule.width * (deviation[a] + deviation[b]) for a, b in better}
    scale = 1 + max(float(abs(one)) for row in known.values() for one in row)
    # The naive sums round too; what touches exactly is tested by hand above.
    assume(all(abs(gap) > 1e-9 * scale for gap in gaps.values()))
    return [two for two, gap in gaps.items() if gap > 0] or "within_bounds"


@settings(max_examples=200)
@given(corpora(1), st.sampled_from([BestWorst(), BestRandom(seed=3), AboveMargin(), AboveMargin(margin=1.0)]))
def test_one_judge_as_naive_loops(corpus: Any, rule: Pairing) -> None:
    texts, [values] = corpus
    expected = [naive(own, [values[row]], rule) for row, own in enumerate(texts)]
    groups = table(*texts)
    pairs, dropped = make_pairs(groups, {"rm": values}, rule)
    assert dropped == Counter(one for one in expected if isinstance(one, str))
    found: dict[int, list[tuple[str, str]]] = {}
    for row, (chosen, rejected, _) in zip(pairs["provenance"].to_pylist(), named(pairs, groups)):
        found.setdefault(row["row"], []).append((chosen, rejected))
    for row, one in enumerate(expected):
        if isinstance(one, str):
            assert row not in found
        elif isinstance(rule, AboveMargin):
            assert sorted(found[row]) == sorted(one)
        else:
            assert len(found[row]) == 1
            assert found[row][0] in one


@settings(max_examples=200)
@given(corpora(3), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_several_judges_as_naive_loops(corpus: Any, width: float) -> None:
    texts, columns = corpus
    rule = Confidence(width=width, all=True)
    expected = [naive(own, [values[row] for values in columns], rule) for row, own in enumerate(texts)]
    groups = table(*texts)
    pairs, dropped = make_pairs(groups, {f"rm_{n}": values for n, values in enumerate(columns)}, rule)
    assert dropped == Counter(one for one in expected if isinstance(one, str))
    wanted = {(row, *two) for row, one in enumerate(expected) if not isinstance(one, str) for two in one}
    told = zip(pairs["provenance"].to_pylist(), named(pairs, groups))
    assert {(row["row"], a, b) for row, (a, b, _) in told} == wanted


@settings(max_examples=100)
@given(
    corpora(2),
    st.sampled_from(
        [BestWorst(), BestRandom(), AboveMargin(max_pairs=2), Confidence(), ByGenerator(strong="s", weak="w")]
    ),
    st.randoms(use_true_random=False),
)
def test_neither_order_nor_sharding_changes_a_pair(corpus: Any, rule: Pairing, random: Any) -> None:
    texts, [one, other] = corpus
    columns = {"one": one, "other": other} if isinstance(rule, Confidence) else {"one": one}
    if isinstance(rule, ByGenerator):
        columns = {}
    wrote = [["s" if number is None or number > 0 else "w" for number in row] for row in one]
    sizes = [[None if number is None else abs(number) for number in row] for row in other]

    def made(rows: list[int], order: list[list[int]]) -> list[Any]:
        groups = pa.concat_tables([table([texts[row][place] for place in order[row]], first=row) for row in rows])

        def taken(column: list[list[Any]]) -> list[list[Any]]:
            return [[column[row][place] for place in order[row]] for row in rows]

        more = {"generators": taken(wrote), "lengths": taken(sizes)} if isinstance(rule, ByGenerator) else {}
        judged = {name: taken(columns[name]) for name in random.sample(list(columns), len(columns))}
        pairs, dropped = make_pairs(groups, judged, rule, **more)
        keep = ["pair_id", "mirror_id", "prompt_id", "label_margin", "provenance"]
        return [[str(row) for row in pairs.select(keep).to_pylist()], dropped]

    plain = [list(range(len(own))) for own in texts]
    mixed = [random.sample(own, len(own)) for own in plain]
    rows = list(range(len(texts)))
    whole, shuffled = made(rows, plain), made(rows, mixed)
    assert whole == shuffled
    apart = [made([row], mixed) for row in rows]
    assert [pair for pairs, _ in apart for pair in pairs] == whole[0]
    assert sum((Counter(dropped) for _, dropped in apart), Counter()) == whole[1]


def test_a_slice_of_a_table_is_a_table() -> None:
    groups = table(["a", "b"], ["c", "d", "e"], ["f", "g"])
    values = [[1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 2.0]]
    whole, _ = make_pairs(groups, {"rm": values}, BestWorst())
    part, _ = make_pairs(groups.slice(1, 2), {"rm": values[1:]}, BestWorst())
    assert part.equals(whole.slice(1))
