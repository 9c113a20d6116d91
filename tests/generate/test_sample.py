from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefsel.errors import UserError
from prefsel.generate.sample import sample
from prefsel.scratch.models import train_tokenizer

WORDS = [f"w{number}" for number in range(40)]
# 3, 1, 4 and 2 words: bos, user, the words, end, assistant make four tokens more.
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8", "w9 w10"]
NEVER, ALWAYS = -1e9, 1e9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], kind="word", vocab_size=64)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(shape).eval()


def only_end_at(model, tokenizer, position: int) -> None:
    """Every row ends when the token at this position has been read, and never before."""

    def force(module, arguments, keywords, output):
        kept = keywords["logits_to_keep"]
        position_T = keywords["position_ids"][0]
        is_time_R = (position_T[kept] if isinstance(kept, torch.Tensor) else position_T) >= position
        output.logits[0, :, tokenizer.eos_token_id] = torch.where(is_time_R, ALWAYS, NEVER)
        # Only words: special tokens would be cut out of the text.
        output.logits[:, :, [tokenizer.pad_token_id, tokenizer.bos_token_id]] = NEVER
        output.logits[:, :, 3:7] = NEVER

    model.register_forward_hook(force, with_kwargs=True)


def test_every_response_stops_at_its_own_end(model, tokenizer):
    only_end_at(model, tokenizer, 10)
    responses = sample(model, tokenizer, PROMPTS, max_new_tokens=30, seed=1)
    # Prompts of 7, 5, 8 and 6 tokens; the token at position 10 is the last word.
    assert [len(response.split()) for response in responses] == [4, 6, 3, 5]


def test_a_response_that_does_not_end_is_cut(model, tokenizer):
    only_end_at(model, tokenizer, 1000)
    responses = sample(model, tokenizer, PROMPTS, max_new_tokens=5, seed=1)
    assert [len(response.split()) for response in responses] == [5, 5, 5, 5]


def test_a_model_that_ends_at_once_says_nothing(model, tokenizer):
    only_end_at(model, tokenizer, 0)
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=5) == ["", "", "", ""]


def test_the_seed_decides_and_nothing_else(model, tokenizer):
    only_end_at(model, tokenizer, 14)
    prompts = PROMPTS * 5
    whole = sample(model, tokenizer, prompts, max_new_tokens=12, seed=7, token_budget=10_000)
    assert whole == sample(model, tokenizer, prompts, max_new_tokens=12, seed=7, token_budget=10_000)
    assert whole == sample(model, tokenizer, prompts, max_new_tokens=12, seed=7, token_budget=1)
    assert whole == sample(model, tokenizer, prompts, max_new_tokens=12, seed=7, token_budget=60)
    assert whole != sample(model, tokenizer, prompts, max_new_tokens=12, seed=8, token_budget=10_000)
    # The same prompt at another place is another sample.
    assert len(set(whole)) > len(PROMPTS)


def test_greedy_equals_generate_one_prompt_at_a_time(model, tokenizer):
    found = sample(model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=12)
    for prompt, response in zip(PROMPTS, found):
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected_1T = model.generate(**tokens, do_sample=False, max_new_tokens=12)
        new_T = expected_1T[0, tokens["input_ids"].shape[1] :]
        assert response == tokenizer.decode(new_T, skip_special_tokens=True)


def test_messages_and_strings_are_the_same_prompt(model, tokenizer):
    as_messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert sample(model, tokenizer, as_messages, seed=3) == sample(model, tokenizer, PROMPTS, seed=3)


def test_nothing_to_sample(model, tokenizer):
    assert sample(model, tokenizer, []) == []


def test_the_training_state_of_the_model_is_left_alone(model, tokenizer):
    model.train()
    sample(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize(
    ("options", "field"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_numbers_out_of_range_are_refused(model, tokenizer, options, field):
    with pytest.raises(UserError, match=field):
        sample(model, tokenizer, PROMPTS, **options)
