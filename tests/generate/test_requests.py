"""Questions as requests, and answers in any order as responses again: small tables, checked by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import bpe_tokenizer, tiny_causal
from transformers import AutoModelForCausalLM

from prefsel.config import GenerationOptions
from prefsel.errors import IntegrityError, UserError
from prefsel.generate.answered import Refusal, prompt_tokens
from prefsel.generate.requests import (
    PolicyText,
    Question,
    count_tokens,
    policy_text,
    requests_of,
    responses_of,
    seed_of,
)
from prefsel.generate.settings import ignored_settings, own_settings, stop_tokens
from prefsel.generate.shard import PolicyAnswers
from prefsel.models.chat import Encoder

FIRST, SECOND, LONG = (bytes([number]) * 16 for number in (1, 2, 3))
OPTIONS = GenerationOptions(samples=2, temperature=0.7, top_p=0.9, max_new_tokens=4, seed=11)
STOPS = [2, 5]


def question(prompt_id: bytes, *samples: int) -> Question:
    return Question(prompt_id, [{"role": "user", "content": "hi"}], range(samples[0], samples[-1] + 1))


QUESTIONS = [question(FIRST, 0, 1), question(LONG, 0, 1), question(SECOND, 3)]
TOKENS: list[list[int] | Refusal] = [[7, 8, 9], Refusal("too_long", "3 tokens"), [7]]


@pytest.fixture(scope="module")
def policy() -> PolicyText:
    return PolicyText(Encoder(bpe_tokenizer(), "auto"), STOPS, {}, 64)


def test_a_request_has_our_tokens_our_stops_and_a_seed_of_its_own() -> None:
    found = requests_of(QUESTIONS, TOKENS, OPTIONS, STOPS)
    assert [(one["question"], one["sample"], one["tokenized_prompt"]) for one in found] == [
        (0, 0, [7, 8, 9]),
        (0, 1, [7, 8, 9]),
        (2, 3, [7]),  # the prompt that is too long is not asked
    ]
    seeds = [one["sampling_params"].pop("seed") for one in found]
    assert seeds == [seed_of(11, FIRST, 0), seed_of(11, FIRST, 1), seed_of(11, SECOND, 3)]
    # Nothing else: whatever is not named here is vLLM's own default, which `generation_config: vllm` leaves alone.
    known = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4, "stop_token_ids": [2, 5], "detokenize": False}
    assert [one["sampling_params"] for one in found] == [known] * 3


@pytest.mark.parametrize("template", ["plain", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_prompt_of_no_token_is_refused_and_ends_nothing(template: str) -> None:
    encoder = Encoder(bpe_tokenizer(), template)
    found = prompt_tokens(encoder, [{"role": "user", "content": ""}], max_length=64, max_new_tokens=4)
    assert isinstance(found, Refusal)
    assert found.reason == "template_error"


def test_no_two_samples_share_a_seed() -> None:
    ids = [number.to_bytes(16, "big") for number in range(200)]
    seeds = [seed_of(seed, one, sample) for seed in (0, 1) for one in ids for sample in range(16)]
    assert len(set(seeds)) == len(seeds) == 6400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert min(seeds) < 2**60 < 2**62 < max(seeds)


def test_a_seed_is_the_same_tomorrow() -> None:
    # blake2b of "0\n" + 32 × "0" + "\n0", its first eight bytes without the last bit: `b2sum -l 64` says the same.
    assert seed_of(0, bytes(16), 0) == 0x5BC6F41F4D1AB077


def test_answers_find_their_questions_in_any_order(policy: PolicyText) -> None:
    drawn = {(0, 0): [10, 11, 2], (0, 1): [12, 13, 14, 15], (2, 3): [5]}
    decode = policy.encoder.tokenizer.decode
    for seed in range(6):
        keys = random.Random(seed).sample(sorted(drawn), 3)
        said = responses_of(QUESTIONS, TOKENS, {key: drawn[key] for key in keys}, OPTIONS, policy)
        first, refused, second = said
        assert isinstance(first, list)
        assert isinstance(second, list)
        assert [(one.tokens, one.stop) for one in first] == [([10, 11], "end"), ([12, 13, 14, 15], "length")]
        assert [one.text for one in first] == [decode([10, 11]).strip(), decode([12, 13, 14, 15]).strip()]
        assert refused == TOKENS[1]
        assert [(one.tokens, one.text, one.stop) for one in second] == [([], "", "end")]
        assert count_tokens(TOKENS, said) == {"prefill_tokens": 4.0, "decoded_tokens": 6.0}


def test_a_stop_token_in_the_last_place_ends_a_response(policy: PolicyText) -> None:
    (said,) = responses_of([question(FIRST, 0)], [[7]], {(0, 0): [10, 11, 12, 5]}, OPTIONS, policy)
    assert isinstance(said, list)
    assert (said[0].tokens, said[0].stop) == ([10, 11, 12], "end")


def test_a_missing_answer_is_an_error_that_names_the_prompt(policy: PolicyText) -> None:
    with pytest.raises(IntegrityError, match=f"1 requests have no answer: sample 1 of prompt {FIRST.hex()}; run"):
        responses_of(QUESTIONS, TOKENS, {(0, 0): [2], (2, 3): [2]}, OPTIONS, policy)


def test_an_answer_to_no_question_is_an_error(policy: PolicyText) -> None:
    answers = {(0, 0): [2], (0, 1): [2], (2, 3): [2], (1, 0): [2]}
    with pytest.raises(IntegrityError, match=r"1 answers are to no question, the first to number \(1, 0\)"):
        responses_of(QUESTIONS, TOKENS, answers, OPTIONS, policy)


@pytest.mark.parametrize("drawn", [[], [10], [10, 11, 12], [10, 2, 11]])
def test_an_answer_that_ended_too_early_is_an_error(policy: PolicyText, drawn: list[int]) -> None:
    with pytest.raises(IntegrityError, match=f"ended for no reason: sample 0 of prompt {FIRST.hex()}"):
        responses_of([question(FIRST, 0)], [[7]], {(0, 0): drawn}, OPTIONS, policy)


@pytest.mark.parametrize("has_file", [True, False])
def test_what_ends_a_response_is_what_ends_it_in_transformers(tmp_path: Path, has_file: bool) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_causal(vocab_size=len(tokenizer), eos_token_id=[3, 4])
    model.generation_config.eos_token_id, model.generation_config.repetition_penalty = [3, 4], 1.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not has_file:
        (tmp_path / "generation_config.json").unlink()
    loaded = own_settings(AutoModelForCausalLM.from_pretrained(tmp_path))
    for weights in tmp_path.glob("*.safetensors"):  # they are on another machine
        weights.unlink()
    found = policy_text(str(tmp_path), "auto", 64, False)
    assert found.stops == stop_tokens(loaded, tokenizer) == sorted({3, 4, tokenizer.eos_token_id})
    assert found.ignored == ignored_settings(loaded) == ({"repetition_penalty": 1.5} if has_file else {})


@pytest.mark.parametrize(
    ("ending", "last"),
    [("<|im_end|>\n", "<|im_end|>"), (" </s>", "</s>"), ("\n\nHuman:", None), ("", None), (None, None)],
)
def test_the_end_of_a_turn_ends_a_response_where_it_is_a_token_of_its_own(ending: str | None, last: str | None) -> None:
    tokenizer = bpe_tokenizer()
    wanted = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(last)} if last else set())
    assert stop_tokens(None, tokenizer, ending) == sorted(wanted)


def test_the_template_of_a_policy_ends_its_responses(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_causal(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn != tokenizer.eos_token_id
    assert policy_text(str(tmp_path), "auto", 64, False).stops == sorted({tokenizer.eos_token_id, turn})
    options = GenerationOptions(samples=1, max_new_tokens=4)
    policy = {"path": str(tmp_path), "max_length": 64, "revision": None, "trust_remote_code": False, "dtype": "fp32"}
    assert PolicyAnswers(policy=policy, options=options).generator.stops == sorted({tokenizer.eos_token_id, turn})


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tiny_causal(vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embedding .* rows"):
        policy_text(str(tmp_path), "auto", 64, False)


def test_prompts_are_read_as_the_other_engine_reads_them(policy: PolicyText) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell a story."}]
    asked = [Question(FIRST, messages, range(1)), Question(LONG, [{"role": "user", "content": "the " * 99}], range(1))]
    short, long = policy.read(asked, OPTIONS)
    assert short == policy.encoder.encode_group(messages, []).prompt_tokens
    assert isinstance(long, Refusal)
    assert long.reason == "too_long"
