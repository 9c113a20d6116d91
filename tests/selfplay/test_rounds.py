"""Rounds as plans: what they are called, what they share, what they refuse; and which prompts they draw."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from prefsel.config import SelfPlay
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.check import check_generators, check_names, check_rounds
from prefsel.plan.made import EvolvedPrompts, SeedPrompts
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.rounds import filled_params, last_node, round_plans
from prefsel.stages.prompts import Drawn, chosen_rows, require_all_rounds
from prefsel.workspace.storage import Storage

ARM: dict[str, Any] = {
    "name": "arm",
    "policy": "start",
    "rounds": 3,
    "judges": [{"kind": "reward_model", "model": "judge"}],
    "train": {"learning_rate": 1e-3},
}


def plan_of(tmp_path: Path, *arms: dict[str, Any], **parts: Any) -> Plan:
    table = {
        "name": "graph",
        "sources": [{"name": "corpus", "paths": ["corpus.jsonl"]}],
        "split": {"proxy": 0.1},
        "models": [{"kind": "scratch_policy", "name": "start"}, {"kind": "scratch_reward", "name": "judge"}],
        "selfplay": list(arms),
        **parts,
    }
    return make_plan(parse_config(table), Storage(str(tmp_path)))


def played(plan: Plan, number: int = 0) -> list[Plan]:
    """The plans of every round of an arm."""
    arm, outer, found = plan.config.selfplay[number], plan, []
    for one in range(1, arm.rounds + 1):
        found += round_plans(outer, arm, one)
        outer = found[-1]
    return found


def test_the_model_of_a_round_answers_the_next_one(tmp_path: Path) -> None:
    plans = played(plan_of(tmp_path, ARM))
    assert [plan.made.policy for plan in plans if plan.made] == ["start", "arm-1", "arm-2"]
    third = plans[2].node("model", "arm-3")
    assert (third.spec.model, third.spec.reference) == ("start", "start")
    order = [str(node) for node in in_order([third]) if plans[2].makes(node)]
    chain = ["prompts train", "groups arm-2", "columns judge", "pairs best_worst", "eligible arm-3"]
    chain += ["scores arm-3", "selection arm-3", "model arm-3"]
    assert [one for one in order if one in chain] == chain
    # Its own log-probs, and those of the fixed reference.
    assert {"columns arm-2", "columns start"} <= set(order)


def test_a_round_may_go_on_from_the_one_before(tmp_path: Path) -> None:
    plans = played(plan_of(tmp_path, ARM | {"start": "previous", "reference": "previous"}))
    third = plans[2].node("model", "arm-3")
    assert (third.spec.model, third.spec.reference) == ("arm-2", "arm-2")
    assert "columns start" not in [str(node) for node in in_order([third]) if plans[2].makes(node)]


def test_models_of_outer_plans_are_theirs(tmp_path: Path) -> None:
    first, second, third = played(plan_of(tmp_path, ARM))
    assert third.node("model", "arm-1") is first.node("model", "arm-1")
    assert third.node("scratch", "start") is first.outer.node("scratch", "start")  # type: ignore[union-attr]
    assert not third.makes(third.node("model", "arm-2"))
    assert second.makes(third.node("model", "arm-2"))


def test_prompts_with_a_count_are_new_in_every_round(tmp_path: Path) -> None:
    plans = played(plan_of(tmp_path, ARM | {"prompts": {"count": 10}}))
    assert [plan.made.prompts.skip for plan in plans if plan.made] == [0, 10, 20]  # type: ignore[union-attr]
    every = played(plan_of(tmp_path, ARM))
    assert {plan.made.prompts.skip for plan in every if plan.made} == {0}  # type: ignore[union-attr]


def test_a_round_that_evolves_is_two_corpora(tmp_path: Path) -> None:
    seeds, evolved, *_ = played(plan_of(tmp_path, ARM | {"evolve": {"share": 0.5}}))
    assert str(last_node(seeds)) == "selection arm-1-seeds"
    assert last_node(seeds).spec.rule == {"kind": "top", "score": "score_arm-1", "ratio": 0.5}
    assert str(last_node(evolved)) == "model arm-1"
    prompts = evolved.made.prompts if evolved.made else None
    assert isinstance(prompts, EvolvedPrompts)
    assert prompts.seeds is seeds
    assert prompts.judges == ("judge",)


def test_what_a_metric_needs_comes_from_the_round() -> None:
    names = {"$rm": "judge", "$policy": "arm-1", "$reference": "start"}
    assert filled_params("alignment_potential", {}, names) == {"rm": "judge", "policy": "arm-1"}
    assert filled_params("explicit_margin", {"rm": "other"}, names) == {"rm": "other"}
    assert filled_params("random", {"seed": 3}, names) == {"seed": 3}
    given = {"explicit": ["$rm"], "implicit": [{"policy": "$policy", "reference": "$reference"}]}
    found = filled_params("dual_margin", given, names)
    assert found == {"explicit": ["judge"], "implicit": [{"policy": "arm-1", "reference": "start"}]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policy": "nobody"}, "selfplay.arm.policy: got 'nobody'; valid: start"),
        ({"policy": "judge"}, "selfplay.arm.policy: got 'judge'; valid: start"),
        ({"mixed_with": "best"}, "selfplay.arm.mixed_with: got 'best'; valid: none"),
        ({"judges": [{"kind": "causal_logps", "model": "start"}]}, "selfplay.arm.judges: got 'causal_logps'"),
        (
            {"pairs": {"kind": "by_generator", "strong": "a", "weak": "b"}},
            "selfplay.arm.pairs.strong: got .a.; valid: .policy",
        ),
        (
            {"beside": ["start"], "pairs": {"kind": "by_generator", "strong": "$policy", "weak": "start"}},
            "selfplay.arm.pairs: .*valid: another model than 'start'",
        ),
        ({"prompts": {"part": "holdout"}}, "selfplay.arm.prompts.part: got 'holdout'; valid: train"),
    ],
)
def test_a_name_that_there_is_not_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_names(plan_of(tmp_path, ARM | change))


GOODS = {"kind": "function", "function": "counting_judges:goods"}


@pytest.mark.parametrize(
    ("judges", "change", "told"),
    [
        (["start"], {}, "judges and policies: the name 'start' stands twice"),
        (["arm-2"], {}, "judges and policies: the name 'arm-2' stands twice"),
        (["a", "a"], {}, "judges and policies: the name 'a' stands twice"),
        (["a"], {"pairs": {"kind": "confidence"}}, "selfplay.arm.judges: got 'rm_a'; valid: two rewards or more"),
        (["a", "b"], {"pairs": {"kind": "confidence"}, "judge": "c"}, "selfplay.arm.judge: got 'c'; valid: a, b"),
    ],
)
def test_judges_that_cannot_decide_are_refused(
    tmp_path: Path, judges: list[str], change: dict[str, Any], told: str
) -> None:
    plan = plan_of(tmp_path, ARM | {"judges": [GOODS | {"name": name} for name in judges]} | change)
    with pytest.raises(UserError, match=told):
        check_rounds(plan, plan.config.selfplay[0])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"pairs": {"kind": "confidence"}}, "a"),
        ({"pairs": {"kind": "confidence"}, "judge": "b"}, "b"),
        ({"pairs": {"kind": "best_worst"}, "judge": "b"}, "b"),
        ({"pairs": {"kind": "by_generator", "strong": "$policy", "weak": "other"}, "judge": "b"}, "b"),
    ],
)
def test_the_metric_reads_the_reward_that_decides(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    models = [{"kind": "scratch_policy", "name": name} for name in ("start", "other")]
    judges = [GOODS | {"name": name} for name in ("a", "b")]
    first, *_ = played(plan_of(tmp_path, ARM | {"judges": judges, "beside": ["other"]} | change, models=models))
    assert first.config.metrics[0].params == {"rm": found, "policy": "start"}


def test_answers_are_kept_by_model_and_sampling_and_not_by_who_asks(tmp_path: Path) -> None:
    asked = [{"name": "a", "model": "start", "prompts": {"count": 3}}, {"name": "b", "model": "start"}]
    settings = [spec.recipe_settings() for spec in plan_of(tmp_path, generate=asked).config.generate]
    assert settings == [SelfPlay.model_validate(ARM).generation.recipe_settings()] * 2


def test_a_round_may_not_be_called_like_a_model(tmp_path: Path) -> None:
    train = [{"name": "arm-2", "selection": "all", "model": "start", "reference": "start", "learning_rate": 1e-3}]
    scorers = [{"kind": "causal_logps", "model": "start"}]
    with pytest.raises(UserError, match="the name 'arm-2' stands twice"):
        check_names(plan_of(tmp_path, ARM, train=train, scorers=scorers))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ratio": 0.5, "count": 3}, "give one of them"),
        ({"train": None}, "rounds: got 3 without `train`"),
        ({"generation": {"samples": 1}}, "a pair needs at least 2"),
        ({"generation": {"temperature": 0}}, "all samples are equal"),
        ({"rounds": 1, "train": None, "mixed_with": "best"}, "only used where a round trains"),
        ({"stop": {"judge": "gold", "min_gain": float("nan")}}, "finite number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SelfPlay.model_validate(ARM | change)


def drawn(hashes: list[int], ids: str) -> Drawn:
    """Prompts of a shard with one letter as id each, in the order of their rows."""
    return Drawn(np.array(hashes, np.uint64), np.arange(len(hashes)), [one.encode() * 16 for one in ids], len(hashes))


def seeds(count: int | None, skip: int = 0) -> SeedPrompts:
    return SeedPrompts("train", count, 0, skip)


def test_prompts_are_drawn_by_hash_each_once() -> None:
    # `b` stands in both shards, and is taken from the first; hashes are those of the ids.
    shards = [drawn([30, 10, 20], "abc"), drawn([10, 5], "bd")]
    every = {place: rows.tolist() for place, rows in chosen_rows(shards, seeds(None)).items()}
    assert every == {0: [0, 1, 2], 1: [1]}
    first = {place: rows.tolist() for place, rows in chosen_rows(shards, seeds(2)).items()}
    assert first == {0: [1], 1: [1]}
    after = {place: rows.tolist() for place, rows in chosen_rows(shards, seeds(2, skip=2)).items()}
    assert after == {0: [0, 2]}
    assert chosen_rows(shards, seeds(2, skip=4)) == {}
    assert chosen_rows([], seeds(None)) == {}


def test_too_few_prompts_for_the_last_round_are_told_before_the_first() -> None:
    shards = [drawn([30, 10, 20], "abc"), drawn([10, 5], "bd")]  # `b` counts once
    require_all_rounds(shards, SeedPrompts("train", 2, 0, later=2))
    told = r"count: got 2; 3 rounds need 6 prompts, and part 'train' has 4; valid: 1 or fewer, or fewer rounds"
    with pytest.raises(UserError, match=told):
        require_all_rounds(shards, SeedPrompts("train", 2, 0, later=4))
    require_all_rounds(shards, SeedPrompts("train", None, 0))


def test_rounds_know_what_the_later_ones_take_unless_they_may_end_early(tmp_path: Path) -> None:
    def later(**more: Any) -> list[int]:
        plans = played(plan_of(tmp_path, ARM | {"prompts": {"count": 5}} | more))
        return [one.made.prompts.later for one in plans if one.made]

    assert later() == [10, 5, 0]
    assert later(stop={"judge": "judge"}) == [0, 0, 0]


def test_one_model_under_two_names_is_no_pair_of_generators(tmp_path: Path) -> None:
    models = [
        *(
            {"kind": "pretrained", "name": name, "path": path}
            for name, path in (("start", "a"), ("twin", "a"), ("other", "b"))
        ),
        {"kind": "scratch_reward", "name": "judge"},
    ]

    def check_pair(weak: str) -> None:
        pairs = {"kind": "by_generator", "strong": "$policy", "weak": weak}
        plan = plan_of(
            tmp_path, ARM | {"beside": [weak], "pairs": pairs, "metric": {"metric": "random"}}, models=models
        )
        check_generators(plan, plan.config.selfplay[0])

    check_pair("other")
    with pytest.raises(UserError, match="weak: got 'twin'; valid: a model with other weights than 'start'"):
        check_pair("twin")


def test_rounds_draw_without_replacement_whatever_the_shards() -> None:
    rng = np.random.default_rng(0)
    hash_N = rng.permutation(50)
    ids = [bytes([one]) * 16 for one in range(50)]

    def drawn_ids(cuts: list[int], spec: SeedPrompts) -> set[bytes]:
        bounds = [0, *cuts, 50]
        parts = [slice(low, high) for low, high in pairwise(bounds)]
        shards = [Drawn(hash_N[p].astype(np.uint64), np.arange(50)[p], ids[p], p.stop - p.start) for p in parts]
        return {ids[row] for rows in chosen_rows(shards, spec).values() for row in rows}

    rounds = [drawn_ids([10, 30], seeds(15, skip)) for skip in (0, 15, 30)]
    assert [len(one) for one in rounds] == [15, 15, 15]
    assert len(set.union(*rounds)) == 45
    assert rounds == [drawn_ids([25], seeds(15, skip)) for skip in (0, 15, 30)]
    assert set(rounds[0]) == {ids[row] for row in np.argsort(hash_N)[:15]}
