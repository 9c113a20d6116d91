"""Rounds on real machinery: a policy answers, a reward model judges, pairs are made, selected and trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefsel
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.pipeline import Outcome, run
from prefsel.progress import Progress
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_PROMPTS = 7
"""One of the eight rows of the small world has an answer without text."""
GENERATION = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "prompts_per_shard": 2}
JUDGE = {"kind": "reward_model", "model": "reward"}
TRAIN = {"learning_rate": 1e-3, "dtype": "fp32", "global_batch_pairs": 2, "max_steps": 2}


def configured(small_world: Any, *arms: dict[str, Any], **parts: Any) -> dict[str, Any]:
    inputs = small_world.inputs
    model = {"kind": "pretrained", "dtype": "fp32"}
    arm = {"policy": "policy", "generation": GENERATION, "judges": [JUDGE], "judge": "overall"}
    return {
        "name": "play",
        "sources": [{"name": "world", "paths": [str(inputs.corpus)], "format": "ultrafeedback"}],
        "ingest": {"rows_per_shard": 3, "max_quarantine_fraction": 0.5},
        "models": [
            {**model, "name": "policy", "path": str(inputs.policy)},
            {**model, "name": "reward", "path": str(inputs.reward_model)},
        ],
        "selfplay": [arm | one for one in arms],
        **parts,
    }


def play(home: Path, table: dict[str, Any]) -> Outcome:
    return run(parse_config(table), str(home), Progress(quiet=True))


def counts(outcome: Outcome, corpus: str) -> dict[str, tuple[int, int]]:
    """Stage → rows in and out, of one corpus."""
    (made,) = [one for one in outcome.made if one.name == corpus]
    return {report.stage: (report.rows_in, report.rows_out) for report in made.reports}


@pytest.fixture(scope="module")
def weak(small_world: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The policy of the world with noise in its weights."""
    folder = tmp_path_factory.mktemp("weak")
    model = AutoModelForCausalLM.from_pretrained(small_world.inputs.policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.02 * torch.randn_like(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_world.inputs.policy).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def done(small_world: Any, weak: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Outcome]:
    """Two arms without training: pairs by the judge, and pairs by who wrote them."""
    home = tmp_path_factory.mktemp("play") / "w"
    delta = {"name": "delta", "judges": [], "judge": None, "beside": ["weak"], "metric": {"metric": "random"}}
    delta["pairs"] = {"kind": "by_generator", "strong": "$policy", "weak": "weak", "max_length_difference": None}
    table = configured(small_world, {"name": "best"}, delta)
    table["models"] = [*table["models"], {"kind": "pretrained", "dtype": "fp32", "name": "weak", "path": weak}]
    return home, table, play(home, table)


def test_every_step_of_a_round_accounts_for_every_row(done: Any) -> None:
    home, _, outcome = done
    for one in outcome.made:
        for report in one.reports:
            assert report.rows_in == report.rows_out + sum(report.dropped.values())
    found = counts(outcome, "best-1")
    assert found["prompts"] == (NUM_PROMPTS, NUM_PROMPTS)
    assert found["generate"][0] == 3 * NUM_PROMPTS
    assert found["pair"][0] == NUM_PROMPTS
    assert found["select"][1] == int(0.4 * found["select"][0])
    assert verify(Storage(str(home))).is_clean


def test_pairs_are_the_best_and_the_worst_by_the_judge(done: Any) -> None:
    home, _, outcome = done
    (made,) = [one for one in outcome.made if one.name == "best-1"]
    storage = Storage(str(home))
    folder = made.plan.node("columns", "reward").path
    checked = 0
    for shard in made.plan.catalog.shards:
        groups = pq.read_table(storage.local(f"groups/{shard.source}/{shard.shard}.parquet")).to_pylist()
        rewards = pq.read_table(storage.local(f"{folder}/{shard.source}/{shard.shard}.parquet")).to_pylist()
        by_prompt = {row["prompt_id"]: row["rm_overall"] for row in rewards}
        for pair in pq.read_table(storage.local(f"{shard.pairs_path}/{shard.shard}.parquet")).to_pylist():
            given = by_prompt[pair["prompt_id"]]
            (group,) = [one for one in groups if one["prompt_id"] == pair["prompt_id"]]
            assert len(given) == len(group["completions"])
            assert given[pair["chosen"]] == max(given)
            assert given[pair["rejected"]] == min(given)
            assert pair["label_margin"] == max(given) - min(given)
            checked += 1
    assert checked == counts(outcome, "best-1")["pair"][1] > 0


def test_pairs_by_generator_prefer_what_the_strong_one_wrote(done: Any) -> None:
    home, _, outcome = done
    (made,) = [one for one in outcome.made if one.name == "delta-1"]
    storage = Storage(str(home))
    sides = set()
    for shard in made.plan.catalog.shards:
        rows = pq.read_table(storage.local(f"groups/{shard.source}/{shard.shard}.parquet")).to_pylist()
        groups = {row["prompt_id"]: row["responses"] for row in rows}
        for pair in pq.read_table(storage.local(f"{shard.pairs_path}/{shard.shard}.parquet")).to_pylist():
            written = groups[pair["prompt_id"]]
            sides.add((written[pair["chosen"]]["policy"], written[pair["rejected"]]["policy"]))
    assert sides == {("policy", "weak")}


def test_arms_share_what_they_have_in_common(done: Any) -> None:
    home, _, outcome = done
    best, delta = outcome.made
    assert best.plan.node("groups", "policy").path == delta.plan.node("groups", "policy").path
    attempts = [name for name in Storage(str(home)).files("groups", recursive=True) if "/attempts/" in name]
    assert len([name for name in attempts if "/policy@" in name]) == len(best.plan.catalog.shards)


def test_a_corpus_that_was_made_is_opened_like_any_other(done: Any) -> None:
    home, _, outcome = done
    opened = prefsel.open(home, corpus="best-1")
    rows = opened.pairs(
        ["pair_id", "kept_best-1", "score_best-1", "rm_overall_chosen", "rm_overall_rejected"]
    ).to_table()
    assert sum(rows["kept_best-1"].to_pylist()) == counts(outcome, "best-1")["select"][1]
    assert all(a > b for a, b in zip(rows["rm_overall_chosen"].to_pylist(), rows["rm_overall_rejected"].to_pylist()))
    with pytest.raises(UserError, match="corpus: got 'nothing'; valid: best-1, delta-1"):
        prefsel.open(home, corpus="nothing")


def test_a_second_run_does_nothing(done: Any) -> None:
    home, table, _ = done
    again = play(home, table)
    assert not again.is_new
    assert all(report.computed_shards == 0 for one in again.made for report in one.reports)


def test_a_lost_shard_is_answered_again_byte_by_byte(done: Any, tmp_path: Path) -> None:
    home, table, _ = done
    copy = tmp_path / "w"
    shutil.copytree(home, copy)
    ledger = sorted((copy / "groups").glob("policy@*/_ledger/*.json"))[0]
    data = ledger.parent.parent / f"{ledger.stem}.parquet"
    before = data.read_bytes()
    ledger.unlink()
    data.unlink()
    again = play(copy, table)
    assert data.read_bytes() == before
    computed = {report.stage: report.computed_shards for report in again.made[0].reports}
    assert computed == dict.fromkeys(computed, 0) | {"generate": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"generation": GENERATION | {"max_new_tokens": 4000}}, "none of 21 responses can be used \\(21 too_long\\)"),
        ({"pairs": {"kind": "above_margin", "margin": 1e9}}, "bad-1: no pair is left: 7 prompts, [0-9]+ within_bounds"),
    ],
)
def test_a_round_without_a_pair_says_why(small_world: Any, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        play(tmp_path / "w", configured(small_world, {"name": "bad"} | change))


def test_a_judge_that_cannot_read_the_answers_is_named(small_world: Any, tmp_path: Path) -> None:
    table = configured(small_world, {"name": "bad"})
    table["models"][1]["max_length"] = 8
    with pytest.raises(UserError, match="no pair is left: 7 prompts, 7 unjudged; reward gave no number for 21 answers"):
        play(tmp_path / "w", table)


@pytest.mark.slow
def test_rounds_train_resume_and_evolve(small_world: Any, tmp_path: Path) -> None:
    """Two rounds, prompts rewritten by a strategy of the user's, mixed with pairs of the corpus; killed in between."""
    strategy = tmp_path / "more.yaml"
    strategy.write_text('name: more\nkind: depth\ntemplate: "the {prompt}"\n')
    evolve = {"share": 1.0, "strategies": [str(strategy)], "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    arm = {
        "name": "map",
        "rounds": 2,
        "train": TRAIN,
        "mixed_with": "random30",
        "evolve": evolve | {"length_factor": None},
    }
    parts = {
        "scorers": [{"kind": "causal_logps", "model": "policy"}],
        "metrics": [{"name": "random", "metric": "random"}],
        "selections": [{"name": "random30", "rule": {"kind": "top", "score": "score_random", "ratio": 0.3}}],
    }
    table = configured(small_world, arm, **parts)
    whole = play(tmp_path / "a", table)
    assert [one.name for one in whole.made] == ["map-1-seeds", "map-1", "map-2-seeds", "map-2"]
    for one in whole.made:
        assert verify(Storage(str(tmp_path / "a"))).is_clean, one.name
    own, mixed = counts(whole, "map-1")["select"][1], counts(whole, "map-1")["train"][0]
    original = next(report.rows_out for report in whole.reports if report.stage == "select")
    assert mixed == own + original
    parents = set()
    for shard in whole.made[1].plan.catalog.shards:
        file = tmp_path / "a" / "groups" / shard.source / f"{shard.shard}.parquet"
        parents |= {(row["strategy"], row["parent_id"] is not None) for row in pq.read_table(file).to_pylist()}
    assert parents == {("more", True)}
    # What a kill in the second round leaves: the first one, and a part of the second.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for report in whole.made[3].reports[-3:]:
        shutil.rmtree(tmp_path / "b" / report.artifact)
    again = play(tmp_path / "b", table)
    models = [
        [
            json.loads((tmp_path / home / report.artifact / "_ledger/files.json").read_text())["content"]
            for one in outcome.made
            for report in one.reports
            if report.stage == "train"
        ]
        for home, outcome in (("a", whole), ("b", again))
    ]
    assert models[0] == models[1]
    assert sum(report.computed_shards > 0 for one in again.made[:3] for report in one.reports) == 0


def test_prompts_alone_are_a_corpus_to_answer(small_world: Any, tmp_path: Path) -> None:
    """As the page on self-play begins: no pair, no judge, answers of one model."""
    table = configured(small_world)
    table["sources"] = [{"name": "questions", "paths": [str(small_world.inputs.heldout)], "role": "prompts"}]
    table["generate"] = [{"name": "five", "model": "policy", "prompts": {"count": 3}, **GENERATION}]
    outcome = play(tmp_path / "w", table)
    found = counts(outcome, "five")
    assert (found["prompts"], found["generate"][0]) == ((8, 3), 9)
    assert found["generate"][1] > 0
    assert verify(Storage(str(tmp_path / "w"))).is_clean
