"""The reward of a policy's own response: what the reward model gives that text, the same in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_scorers import table
from tiny_models import bpe_tokenizer, tiny_causal, tiny_reward

from prefsel.generate.engine import Response
from prefsel.score.generated import GeneratedRewardScorer
from prefsel.score.scorers import RewardModelScorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    policy, reward = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reward")
    tiny_causal().save_pretrained(policy)
    tiny_reward().save_pretrained(reward)
    for path in (policy, reward):
        bpe_tokenizer().save_pretrained(path)
    rewards = RewardModelScorer(name="judge", path=str(reward), dtype="fp32", device="cpu")
    loading = {"path": str(policy), "dtype": "fp32", "device": "cpu", "revision": None, "trust_remote_code": False}
    return GeneratedRewardScorer(rewards=rewards, policy=loading, temperature=1.0, top_p=1.0, max_new_tokens=12, seed=5)


def naive_answer(scorer, prompt_id, prompt):
    """One row, all of it again for every token, and the inverted distribution function in numpy."""
    tokenizer, model = scorer.tokenizer, scorer.generator.model
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    asked, said = tokenizer(text, add_special_tokens=False)["input_ids"], []
    key = int.from_bytes(prompt_id[:8], "big")
    for uniform in np.random.Generator(np.random.Philox(key=[5, key])).random(12):
        with torch.no_grad():
            probability_V = model(torch.tensor([asked + said])).logits[0, -1].double().softmax(dim=0).numpy()
        order = np.argsort(-probability_V, kind="stable")
        token = int(order[np.searchsorted(np.cumsum(probability_V[order]), uniform, side="right")])
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def test_the_number_is_the_reward_of_the_sampled_text(scorer):
    groups = table()
    got = scorer.score(groups).columns["rm_judge_generated"]
    assert [len(row) for row in got] == [2, 3, 2, 2]
    assert all(len(set(row)) == 1 for row in got)
    said = [naive_answer(scorer, *row) for row in zip(groups["prompt_id"].to_pylist(), groups["prompt"].to_pylist())]
    texts = [(prompt[0]["content"], [answer or "unused"]) for prompt, answer in zip(groups["prompt"].to_pylist(), said)]
    direct = scorer.rewards.score(table(texts)).columns["rm_judge"]
    for row, answer, want in zip(got, said, direct):
        assert row[0] == (pytest.approx(want[0], rel=1e-5) if answer else None)
    assert any(said)


def test_a_response_does_not_depend_on_its_shard(scorer):
    groups = table()
    whole = scorer.score(groups).columns["rm_judge_generated"]
    alone = [scorer.score(groups.slice(row, 1)).columns["rm_judge_generated"][0] for row in range(groups.num_rows)]
    assert [row[0] for row in alone] == [pytest.approx(row[0], rel=1e-4) for row in whole]


def answered(*texts):
    """Responses that a test says, where the policy would give others."""
    return [[Response([5], text.strip("?"), "end" if text != "?" else "poisoned")] for text in texts]


def test_an_empty_response_gives_null_and_is_counted(scorer, monkeypatch):
    said = answered("a dog", "", "the cat", "")
    monkeypatch.setattr(scorer.generator, "generate", lambda *_, **__: said)
    got = scorer.score(table())
    assert [row[0] is None for row in got.columns["rm_judge_generated"]] == [False, True, False, True]
    assert got.dropped == {"generated_nothing": 5}


def test_a_policy_that_gives_nan_for_a_prompt_is_named(scorer, monkeypatch):
    said = answered("a dog", "?", "the cat", "")
    monkeypatch.setattr(scorer.generator, "generate", lambda *_, **__: said)
    got = scorer.score(table())
    assert got.dropped == {"poisoned": 3, "generated_nothing": 2}
    assert got.poisoned == [table()["prompt_id"][1].as_py().hex()]
