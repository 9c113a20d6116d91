from __future__ import annotations

import json

import pytest

from prefsel.config.file import parse_config
from prefsel.demo import demo_config
from prefsel.ingest.formats import detect
from prefsel.plan.check import check
from prefsel.workspace.storage import Storage
from prefsel.world import inputs as demo
from prefsel.world.inputs import Sizes, evaluate_gold, make_inputs, read_prompts
from prefsel.world.labels import part_of

SCALE = 0.005  # 8 prompts, 10 policy steps, 60 labels, 8 reward steps


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    told = []
    home = tmp_path_factory.mktemp("demo")
    inputs = make_inputs(home, seed=3, scale=SCALE, on_progress=lambda *record: told.append(record))
    return home, inputs, told


def test_all_pieces_are_made_and_reported(made):
    _, inputs, told = made
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


def test_the_configuration_of_the_demo_fits_what_is_made(made, tmp_path):
    _, inputs, _ = made
    check(parse_config(demo_config(inputs, seed=3)), Storage(str(tmp_path)))


def test_a_second_call_makes_nothing(made, monkeypatch):
    home, inputs, _ = made
    monkeypatch.setattr(demo, "make_side_by_side", lambda *_: pytest.fail("models are made again"))
    monkeypatch.setattr(demo, "make", lambda *_: pytest.fail("the corpus is made again"))
    assert make_inputs(home, seed=3, scale=SCALE) == inputs


def test_a_missing_piece_is_made_again_the_same(made, monkeypatch):
    home, inputs, _ = made
    before = inputs.corpus.read_bytes()
    inputs.corpus.unlink()
    monkeypatch.setattr(demo, "make_side_by_side", lambda *_: pytest.fail("models are made again"))
    make_inputs(home, seed=3, scale=SCALE)
    assert inputs.corpus.read_bytes() == before


def test_gold_of_a_policy(made):
    _, inputs, _ = made
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
