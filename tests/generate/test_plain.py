"""Models that the engine's own loop would not serve exactly take transformers' loop, and say why."""

from __future__ import annotations

import pytest
import torch
from test_engine import by_transformers, random_prompts
from tiny_models import bpe_tokenizer, tiny_causal

from prefsel.errors import UserError
from prefsel.generate import engine
from prefsel.generate.engine import Generator, Sampling
from prefsel.models.rotary import reset

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
SLOW = {
    "sliding window": ("mistral", {"sliding_window": 8}, "sliding"),
    "length-dependent rotary embedding": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 24},
        "dynamic",
    ),
    "soft-capping and windows": ("gemma2", {"sliding_window": 8}, "gemma2"),
    "state space": ("mamba", {"num_key_value_heads": None}, "mamba"),
    "rows that are mixed": ("rwkv", {"attention_hidden_size": 32}, "rwkv"),
    "looks ahead": ("gemma", {"head_dim": 8, "use_bidirectional_attention": True}, "bidirectional"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(params=SLOW, ids=str)
def slow(request):
    model_type, options, reason = SLOW[request.param]
    return tiny_causal(model_type, **options).double(), reason


def test_greedy_is_that_of_transformers_and_the_reason_is_told(slow, tokenizer):
    model, reason = slow
    generator = Generator(model, tokenizer)
    assert reason in generator.slow_because
    prompts = [*random_prompts(4, longest=30), *random_prompts(2, longest=30)]  # two lengths come twice
    found = generator.generate(prompts, range(6), 2, Sampling(temperature=0.0, max_new_tokens=30))
    for prompt, responses in zip(prompts, found):
        reset(model)  # else the embedding remembers the prompt before
        (want,) = by_transformers(model, prompt, do_sample=False, max_new_tokens=30)
        assert [one.tokens for one in responses] == [want] * 2
        assert {one.stop for one in responses} == {"length" if len(want) == 30 else "end"}


def test_a_response_is_the_same_in_any_company(slow, tokenizer, monkeypatch):
    model, _ = slow
    prompts, sampling = [*random_prompts(4, longest=30), *random_prompts(2, longest=30)], Sampling(max_new_tokens=30)
    whole = Generator(model, tokenizer).generate(prompts, range(6), 3, sampling)
    monkeypatch.setitem(engine.MOST_ROWS, "cpu", 1)
    assert Generator(model, tokenizer, token_budget=1).generate(prompts, range(6), 3, sampling) == whole
    alone = [
        [
            Generator(model, tokenizer).generate([prompt], [key], 1, sampling, first_sample=sample)[0][0]
            for sample in range(3)
        ]
        for key, prompt in enumerate(prompts)
    ]
    assert alone == whole


def test_both_loops_draw_the_same(tokenizer, monkeypatch):
    model = tiny_causal().double()
    prompts, sampling = random_prompts(5), Sampling(0.9, 0.95, max_new_tokens=30, seed=2)
    fast = Generator(model, tokenizer).generate(prompts, range(5), 3, sampling)
    generator = Generator(model, tokenizer)
    monkeypatch.setattr(generator, "slow_because", "asked for")
    assert generator.generate(prompts, range(5), 3, sampling) == fast
    # Every row carries its prompt.
    assert generator.counters["prefill_tokens"] == 3 * sum(map(len, prompts))
    assert generator.counters["rows_decoded"] >= generator.counters["decoded_tokens"]
    assert generator.counters["flops_model"] > 0


def test_settings_of_the_model_are_named_and_not_applied(tokenizer):
    for model in (tiny_causal().double(), tiny_causal("mistral", sliding_window=8).double()):
        prompts, sampling = random_prompts(3), Sampling(max_new_tokens=20)
        plain = Generator(model, tokenizer)
        assert plain.ignored_generation_settings == {}
        want = plain.generate(prompts, range(3), 2, sampling)
        model.generation_config.update(
            do_sample=True, temperature=0.1, top_k=5, repetition_penalty=1.5, suppress_tokens=[9, 10], max_length=3
        )
        generator = Generator(model, tokenizer)
        assert generator.ignored_generation_settings == {
            "temperature": 0.1,
            "top_k": 5,
            "repetition_penalty": 1.5,
            "suppress_tokens": [9, 10],
        }
        assert generator.generate(prompts, range(3), 2, sampling) == want
        assert model.generation_config.repetition_penalty == 1.5


def test_a_poisoned_prompt_leaves_its_neighbours_alone(tokenizer):
    model = tiny_causal("mistral", sliding_window=8).double()
    prompts, sampling = [[20, 21, 22], [30, 8, 31], [23, 24, 25]], Sampling(max_new_tokens=6)
    want = Generator(model, tokenizer).generate(prompts, range(3), 2, sampling)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    prompts[1] = [30, 7, 31]
    got = Generator(model, tokenizer).generate(prompts, range(3), 2, sampling)
    assert [one.stop for one in got[1]] == ["poisoned"] * 2
    assert not any(7 in one.tokens for many in want for one in many)
    assert (got[0], got[2]) == (want[0], want[2])


def test_what_is_no_decoder_is_refused(tokenizer):
    import transformers
    from tiny_models import tiny_config

    with pytest.raises(UserError, match="decoder"):
        Generator(transformers.AutoModelForSequenceClassification.from_config(tiny_config("llama")), tokenizer)
