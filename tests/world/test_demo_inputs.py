from __future__ import annotations

import json

import pytest

from prefsel.check import check
from prefsel.configfile import parse_config
from prefsel.demo import demo_config
from prefsel.ingest.formats import detect
from prefsel.workspace.storage import Storage
from prefsel.world import demo
from prefsel.world.demo import Sizes, evaluate_gold, make_inputs, read_prompts
from prefsel.world.labels import part_of


def test_all_pieces_are_made_and_reported(small_world):
    inputs, told = small_world.inputs, small_world.told
    rows = [json.loads(line) for line in inputs.corpus.read_text().splitlines()]
    assert len(rows) == 8
    assert all(len(row["completions"]) == 4 and detect(row) == "ultrafeedback" for row in rows)
    assert {part_of(row["instruction"]) for row in rows} == {"corpus"}
    assert {part_of(prompt) for prompt in read_prompts(inputs.heldout)} == {"heldout"}
    proxies = [json.loads(line) for line in inputs.proxies.read_text().splitlines()]
    assert len(proxies) == inputs.num_proxy_labels == 60
    assert {part_of(row["prompt"]) for row in proxies} == {"proxy"}
    assert set(inputs.reward_accuracy) == {"coverage", "sobriety", "courtesy", "conciseness", "overall"}
    assert {("policy", 10, 10), ("reward model", 8, 8), ("corpus", 8, 8)} <= set(told)


def test_the_configuration_of_the_demo_fits_what_is_made(small_world, tmp_path):
    check(parse_config(demo_config(small_world.inputs, seed=3)), Storage(str(tmp_path)))


def made_again(world):
    return make_inputs(world.home, seed=world.seed, scale=world.scale)


def test_a_second_call_makes_nothing(small_world, monkeypatch):
    monkeypatch.setattr(demo, "make_side_by_side", lambda *_: pytest.fail("models are made again"))
    monkeypatch.setattr(demo, "make", lambda *_: pytest.fail("the corpus is made again"))
    assert made_again(small_world) == small_world.inputs


def test_a_missing_piece_is_made_again_the_same(small_world, monkeypatch):
    corpus = small_world.inputs.corpus
    before = corpus.read_bytes()
    corpus.unlink()
    monkeypatch.setattr(demo, "make_side_by_side", lambda *_: pytest.fail("models are made again"))
    made_again(small_world)
    assert corpus.read_bytes() == before


def test_gold_of_a_policy(small_world):
    inputs = small_world.inputs
    prompts = read_prompts(inputs.heldout)
    first, again, other = (evaluate_gold(inputs.policy, prompts, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first.per_prompt) == len(prompts) == 8
    assert first.mean == pytest.approx(sum(first.per_prompt) / 8)
    variance = sum((value - first.mean) ** 2 for value in first.per_prompt) / 7
    assert first.sem == pytest.approx((variance / 8) ** 0.5)
    assert first.aspects["conciseness"] == pytest.approx(-first.mean_length)


def test_sizes_scale_but_not_the_responses():
    assert Sizes().scaled(0.5).num_prompts == 600
    assert Sizes().scaled(1e-9).policy_steps == 8
    assert Sizes().scaled(0.5).num_responses == 4
