from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import bpe_tokenizer, tiny_causal

from prefsel.errors import NonFiniteError, UserError
from prefsel.evaluate.divergence import divergence
from prefsel.evaluate.kl import kl_route, policy_kl, token_kl
from prefsel.models import score_groups
from prefsel.models.chat import Encoder

GROUPS = [
    {"prompt": "the cat sat", "completions": ["on the mat.", "a dog saw the cat", "who?"]},
    {"prompt": "please write a short story", "completions": ["about a cat that can bake bread, and then"]},
]


def another(model_type: str = "llama", **options: Any) -> Any:
    """A model near that of `tiny_causal`: the same weights and a little noise."""
    model = tiny_causal(model_type, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


def naive(policy: Any, reference: Any, groups: Any = GROUPS) -> list[list[tuple[float, float, int]]]:
    """One sequence at a time, a loop over positions and the vocabulary, in double precision."""
    encoder, found = Encoder(bpe_tokenizer()), []
    for group in groups:
        messages = [[{"role": "assistant", "content": text}] for text in group["completions"]]
        encoded = encoder.encode_group([{"role": "user", "content": group["prompt"]}], messages)
        rows = []
        for response in encoded.completion_tokens:
            ids = torch.tensor([encoded.prompt_tokens + response])
            logits = []
            for model in (policy, reference):
                implementation = model.config._attn_implementation
                model.set_attn_implementation("sdpa")
                with torch.no_grad():
                    logits.append(model(input_ids=ids).logits[0].double())
                model.set_attn_implementation(implementation)
            exact, sampled = 0.0, 0.0
            for place, token in enumerate(response, start=len(encoded.prompt_tokens)):
                p, q = ((one[place - 1].exp() / one[place - 1].exp().sum()).tolist() for one in logits)
                exact += sum(a * math.log(a / b) for a, b in zip(p, q))
                sampled += math.log(p[token] / q[token])
            rows.append((exact, sampled, len(response)))
        found.append(rows)
    return found


@pytest.mark.parametrize("token_budget", [1, 64, 4096])
def test_packed_numbers_are_a_loop_over_positions_and_words(token_budget: int) -> None:
    policy, reference = tiny_causal(), another()
    found = policy_kl(policy, reference, bpe_tokenizer(), GROUPS, token_budget=token_budget)
    for kl, ratio, count, rows in zip(found["kl"], found["log_ratio"], found["num_tokens"], naive(policy, reference)):
        assert kl == pytest.approx([exact for exact, _, _ in rows], rel=1e-4)
        assert ratio == pytest.approx([sampled for _, sampled, _ in rows], abs=1e-4)
        assert count == [number for _, _, number in rows]
        assert min(kl) > 0


def test_padded_numbers_are_a_loop_too() -> None:
    """A window makes the policy one that cannot be packed; the reference could."""
    policy, reference = tiny_causal("mistral", sliding_window=8), another("mistral")
    route = kl_route(policy, reference, 0)
    assert not route.is_packed
    assert route.reason.startswith("policy: sliding-window")
    found = policy_kl(policy, reference, bpe_tokenizer(), GROUPS, token_budget=64)
    for kl, ratio, rows in zip(found["kl"], found["log_ratio"], naive(policy, reference)):
        assert kl == pytest.approx([exact for exact, _, _ in rows], rel=1e-4)
        assert ratio == pytest.approx([sampled for _, sampled, _ in rows], abs=1e-4)


def test_monte_carlo_is_the_difference_of_log_probs() -> None:
    policy, reference = tiny_causal(), another()
    found = policy_kl(policy, reference, bpe_tokenizer(), GROUPS, token_budget=512)
    ours, theirs = (score_groups(m, bpe_tokenizer(), GROUPS, token_budget=512)["logps"] for m in (policy, reference))
    for ratio, one, other in zip(found["log_ratio"], ours, theirs):
        assert ratio == pytest.approx([a - b for a, b in zip(one, other)], abs=1e-4)


def test_a_model_is_no_distance_from_itself() -> None:
    policy = tiny_causal()
    found = policy_kl(policy, policy, bpe_tokenizer(), GROUPS, token_budget=512)
    assert found["kl"] == [[0.0] * 3, [0.0]]
    assert found["log_ratio"] == [[0.0] * 3, [0.0]]


def test_the_model_is_left_in_training_if_it_was() -> None:
    policy, reference = tiny_causal(), another()
    policy.train()
    policy_kl(policy, reference, bpe_tokenizer(), GROUPS, token_budget=512)
    assert policy.training
    assert not reference.training


def test_both_estimate_the_same_over_own_samples() -> None:
    """Every answer of two tokens over four words, weighed by its probability: the expectations are equal."""
    rng = torch.Generator().manual_seed(1)
    first_p, first_q = (torch.randn(4, generator=rng, dtype=torch.float64) for _ in "pq")
    second_p, second_q = (torch.randn(4, 4, generator=rng, dtype=torch.float64) for _ in "pq")
    expected, joint = torch.zeros(2, dtype=torch.float64), 0.0
    for a in range(4):
        for b in range(4):
            logits = [torch.stack([first, second[a]]) for first, second in ((first_p, second_p), (first_q, second_q))]
            values = token_kl(*logits, torch.tensor([a, b])).sum(dim=0)
            p, q = (float(one[0].softmax(0)[a] * one[1].softmax(0)[b]) for one in logits)
            expected += p * values
            joint += p * math.log(p / q)
    assert expected.tolist() == pytest.approx([joint, joint])


def test_words_that_nobody_says_add_nothing_and_those_only_the_policy_says_are_refused() -> None:
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    both, wide = torch.tensor([[0.5, 0.5, -torch.inf]]), torch.tensor([[0.5, 0.5, 0.5]])
    target = torch.tensor([0])
    two = torch.tensor([0.0, 1.0]).softmax(0)
    for q_RV in (both, wide):
        q = q_RV[0].softmax(0)
        expected = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(two, q))
        assert float(token_kl(p, q_RV, target)[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert float(token_kl(wide, p, target)[0, 0]) == math.inf

    policy, reference = tiny_causal(tie_word_embeddings=False), another(tie_word_embeddings=False)
    bias = torch.nn.Parameter(torch.zeros(400))
    bias.data[7] = -torch.inf
    reference.lm_head.bias = bias
    with pytest.raises(NonFiniteError, match="NaN or infinity for 2 prompts"):
        policy_kl(policy, reference, bpe_tokenizer(), GROUPS, token_budget=512)


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(UserError, match="the policy has logits of 400 tokens, the reference of 512"):
        kl_route(tiny_causal(), tiny_causal(vocab_size=512))


def test_too_long_answers_have_no_number() -> None:
    found = policy_kl(tiny_causal(), another(), bpe_tokenizer(), GROUPS, token_budget=512, max_length=16)
    assert found["status"][0].count("ok") == sum(one is not None for one in found["kl"][0])
    assert "too_long" in found["status"][1]
    assert found["kl"][1] == [None]


def test_answers_together() -> None:
    found = divergence(["a", "a", "b"], [1.0, 3.0, 5.0], [0.0, -1.0, 7.0], [10, 10, 10])
    assert found is not None
    assert found.per_response.mean == 3.0
    assert (found.per_response.num_items, found.per_response.num_prompts) == (3, 2)
    assert found.per_token == pytest.approx(9 / 30)
    assert found.monte_carlo.mean == 2.0
    assert found.num_tokens == 30
    assert divergence([], [], [], []) is None
