"""The reward of a policy's own response: what the reward model gives that text, the same in any company."""

from __future__ import annotations

import pytest
from test_scorers import table
from tiny_models import bpe_tokenizer, tiny_causal, tiny_reward

from prefsel.generate.sample import sample
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


def test_the_number_is_the_reward_of_the_sampled_text(scorer):
    groups = table()
    got = scorer.score(groups).columns["rm_judge_generated"]
    assert [len(row) for row in got] == [2, 3, 2, 2]
    assert all(len(set(row)) == 1 for row in got)
    keys = [int.from_bytes(one[:8], "big") for one in groups["prompt_id"].to_pylist()]
    said = sample(scorer.model, scorer.tokenizer, groups["prompt"].to_pylist(), keys=keys, seed=5, max_new_tokens=12)
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


def test_an_empty_response_gives_null_and_is_counted(scorer, monkeypatch):
    monkeypatch.setattr("prefsel.score.generated.sample", lambda *_, **__: ["a dog", "", "the cat", ""])
    got = scorer.score(table())
    assert [row[0] is None for row in got.columns["rm_judge_generated"]] == [False, True, False, True]
    assert got.dropped == {"generated_nothing": 5}
