"""The engine beside transformers' own loop: token for token where nothing is drawn, by test where it is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_models import bpe_tokenizer, tiny_causal

from prefsel.errors import UserError
from prefsel.generate import engine
from prefsel.generate.engine import Generator, Sampling

PACKED = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "phi3", "olmo2", "smollm3", "starcoder2")
EOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model():
    """In fp64, so that rounding turns no draw."""
    return tiny_causal().double()


@pytest.fixture
def few_rows(monkeypatch):
    """Rows and cohorts come and go all the time."""
    monkeypatch.setitem(engine.MOST_ROWS, "cpu", 12)
    monkeypatch.setattr(engine, "MOST_COHORTS", 2)


def random_prompts(count, *, longest=40, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(5, 400) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def by_transformers(model, prompt, **options):
    """New tokens of transformers' own loop, one row per sample, without stop token and padding."""
    rows = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), eos_token_id=EOS, pad_token_id=0, **options
    )[:, len(prompt) :].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@pytest.mark.parametrize("model_type", PACKED)
def test_greedy_is_that_of_transformers_token_for_token(model_type, tokenizer, few_rows):
    model = tiny_causal(model_type).double()
    generator = Generator(model, tokenizer)
    prompts = random_prompts(9)
    found = generator.generate(prompts, range(9), 3, Sampling(temperature=0.0, max_new_tokens=40))
    assert generator.slow_because == ""
    for prompt, responses in zip(prompts, found):
        (want,) = by_transformers(model, prompt, do_sample=False, max_new_tokens=40)
        assert [one.tokens for one in responses] == [want] * 3
        assert {one.stop for one in responses} == {"length" if len(want) == 40 else "end"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_company_are_those_of_the_whole_sequence(dtype, tokenizer, few_rows, monkeypatch):
    """At working precision, where equal tokens cannot be asked for: what each token was drawn from."""
    model = tiny_causal(scale=0.1).to(dtype)
    seen = {}

    def draw(rows, logits_BV, sampling):
        tokens = original(rows, logits_BV, sampling)
        for row, logits_V in zip(rows, logits_BV):
            seen[row.prompt, row.sample, len(row.tokens)] = logits_V.float()
        return tokens

    original = engine.draw
    monkeypatch.setattr(engine, "draw", draw)
    prompts = random_prompts(7)
    found = Generator(model, tokenizer).generate(prompts, range(7), 3, Sampling(max_new_tokens=40))
    exact = tiny_causal(scale=0.1).double()
    worst = own = 0.0
    for number, responses in enumerate(found):
        for sample, response in enumerate(responses):
            ids = torch.tensor([prompts[number] + response.tokens])
            whole = exact(ids).logits[0, len(prompts[number]) - 1 :]
            plain = model(ids).logits[0, len(prompts[number]) - 1 :]
            own = max(own, float((plain - whole).abs().max()))
            for token in range(min(len(response.tokens) + 1, 40)):
                worst = max(worst, float((seen[number, sample, token] - whole[token]).abs().max()))
    assert 0 < worst < 2 * own  # what the model's own forward loses to rounding


def test_a_response_is_the_same_in_any_company(model, tokenizer, monkeypatch):
    prompts, keys = random_prompts(9), [10, 11, 2**63, 13, 14, 15, 16, 17, 18]
    sampling = Sampling(max_new_tokens=50, seed=3)
    whole = Generator(model, tokenizer).generate(prompts, keys, 4, sampling)
    assert len({len(one.tokens) for many in whole for one in many}) > 5
    for rows, cohorts, budget in ((12, 2, None), (6, 1, 300), (100, 8, 1), (9, 3, 1000)):
        monkeypatch.setitem(engine.MOST_ROWS, "cpu", rows)
        monkeypatch.setattr(engine, "MOST_COHORTS", cohorts)
        assert Generator(model, tokenizer, token_budget=budget).generate(prompts, keys, 4, sampling) == whole
    order = [5, 2, 8, 0, 1, 7, 3, 6, 4]
    turned = Generator(model, tokenizer).generate([prompts[i] for i in order], [keys[i] for i in order], 4, sampling)
    assert turned == [whole[i] for i in order]
    for number in (0, 4):
        alone = Generator(model, tokenizer).generate([prompts[number]], [keys[number]], 1, sampling, first_sample=2)
        assert alone == [[whole[number][2]]]
    fewer = Generator(model, tokenizer).generate(prompts, keys, 2, sampling)
    assert fewer == [many[:2] for many in whole]
    other = Generator(model, tokenizer).generate(prompts, keys, 4, Sampling(max_new_tokens=50, seed=4))
    assert other != whole


def test_the_same_call_gives_the_same_bytes_at_working_precision(tokenizer, few_rows):
    model, prompts = tiny_causal(), random_prompts(20)
    calls = [Generator(model, tokenizer).generate(prompts, range(20), 3, Sampling(max_new_tokens=30)) for _ in range(2)]
    assert repr(calls[0]) == repr(calls[1])


def chi_square_excess(statistic, degrees):
    """Standard deviations above what chance gives."""
    return (statistic - degrees) / np.sqrt(2 * degrees)


def exact_probabilities(model, tokens, temperature, top_p):
    """Of the next token, in numpy."""
    logits = model(torch.tensor([tokens])).logits[0, -1].detach().numpy() / temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1] if top_p < 1 else order
    nucleus = np.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept] / probabilities[kept].sum()
    return nucleus


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_frequencies_of_tokens_are_the_models_probabilities(temperature, top_p, tokenizer):
    model = tiny_causal(scale=0.2).double()
    prompt, count = [17, 30, 9, 101], 6000
    sampling = Sampling(temperature, top_p, max_new_tokens=3, seed=1)
    (responses,) = Generator(model, tokenizer).generate([prompt], [5], count, sampling)
    drawn = [(*one.tokens, *[EOS] * (one.stop == "end")) for one in responses]
    first = max(set(drawn), key=lambda row: sum(other[0] == row[0] for other in drawn))[0]
    after = [row[1] for row in drawn if row[0] == first and first != EOS]
    assert len(after) > 300
    for context, tokens in ((prompt, [row[0] for row in drawn]), ([*prompt, first], after)):
        want = exact_probabilities(model, context, temperature, top_p) * len(tokens)
        got = np.bincount(tokens, minlength=400)
        assert got[want == 0].sum() == 0
        is_frequent = want >= 5
        rest = (got[~is_frequent].sum(), want[~is_frequent].sum())
        statistic = ((got - want)[is_frequent] ** 2 / want[is_frequent]).sum()
        statistic += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] else 0.0
        assert is_frequent.sum() > 4
        assert abs(chi_square_excess(statistic, is_frequent.sum())) < 4


def test_proportions_are_those_of_transformers_own_sampling(tokenizer):
    model = tiny_causal(scale=0.15).double()
    prompt, count = [17, 30, 9, 101], 3000
    (responses,) = Generator(model, tokenizer).generate([prompt], [5], count, Sampling(0.8, 0.9, max_new_tokens=4))
    torch.manual_seed(0)
    theirs = by_transformers(
        model,
        prompt,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        top_k=0,
        max_new_tokens=4,
        num_return_sequences=count,
    )
    ours = [one.tokens for one in responses]
    for position in range(4):
        sides = [
            np.bincount([row[position] if position < len(row) else EOS for row in rows], minlength=400)
            for rows in (ours, theirs)
        ]
        is_frequent = sides[0] + sides[1] >= 20
        table = np.array([[*side[is_frequent], side[~is_frequent].sum()] for side in sides]) + 1e-9
        want = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
        assert is_frequent.sum() > 4
        assert chi_square_excess(((table - want) ** 2 / want).sum(), is_frequent.sum()) < 4


def test_every_prompt_is_read_once_and_every_draw_counted(model, tokenizer, few_rows):
    prompts = random_prompts(9)
    generator = Generator(model, tokenizer)
    found = generator.generate(prompts, range(9), 5, Sampling(max_new_tokens=20))
    every = [one for many in found for one in many]
    counters = generator.counters
    assert counters["prefill_tokens"] == sum(map(len, prompts))
    assert counters["decoded_tokens"] == sum(len(one.tokens) for one in every)
    assert counters["rows_decoded"] == sum(len(one.tokens) + (one.stop == "end") for one in every)  # none in vain
    assert counters["steps"] >= 19
    assert counters["poisoned"] == 0
    # 2 · 2 layers of 32·(32 + 16 + 16 + 32) + 3·32·64 weights; the head of 400·32 for every token that was drawn.
    trunk, head = 2 * 2 * (32 * 96 + 3 * 32 * 64), 2 * 400 * 32
    heads = len(prompts) + counters["rows_decoded"] - len(every)
    read = counters["prefill_tokens"] + counters["rows_decoded"] - len(every)
    attention = counters["flops_model"] - trunk * read - head * heads
    # A row that reads token t of its response attends to prompt and t tokens; prompts are at most 40 long.
    rows = [
        (len(prompt), len(one.tokens) + (one.stop == "end")) for prompt, many in zip(prompts, found) for one in many
    ]
    decoding = sum(length + token for length, drawn in rows for token in range(1, drawn))
    area = decoding + sum(length**2 for length in map(len, prompts))
    assert attention == 4 * 32 * 2 * area


def test_keys_and_values_stay_within_the_budget(model, tokenizer, monkeypatch):
    prompts, peak, most = random_prompts(12), [0], 50
    original = Generator._step

    def step(self, cohorts, *rest):
        held = [
            sum(
                kept[layer].shape[1] * kept[layer].shape[3]
                for cohort in cohorts
                for kept in (cohort.prompt_KV, cohort.own_KV)
            )
            for layer in (0, 1)
        ]
        peak[0] = max(peak[0], *held)
        original(self, cohorts, *rest)

    monkeypatch.setattr(Generator, "_step", step)
    Generator(model, tokenizer, token_budget=900).generate(prompts, range(12), 3, Sampling(max_new_tokens=most))
    assert 300 < peak[0] <= 900


def test_a_poisoned_prompt_leaves_its_neighbours_alone(tokenizer, few_rows):
    healthy, ill = tiny_causal().double(), tiny_causal().double()
    with torch.no_grad():
        ill.model.embed_tokens.weight[7] = float("nan")
    prompts = random_prompts(12)
    prompts = [[8 if token == 7 else token for token in prompt] for prompt in prompts]
    prompts[4] = [30, 7, 31]
    sampling = Sampling(max_new_tokens=40)
    want = Generator(healthy, tokenizer).generate(prompts, range(12), 3, sampling)
    generator = Generator(ill, tokenizer)
    got = generator.generate(prompts, range(12), 3, sampling)
    assert [(one.tokens, one.text, one.stop) for one in got[4]] == [([], "", "poisoned")] * 3
    for number, (wants, gots) in enumerate(zip(want, got)):
        for sound, one in zip(wants, gots):
            if number != 4 and 7 not in sound.tokens:
                assert one == sound
            elif number != 4:  # it draws the token itself: what follows has no distribution
                begun = sound.tokens.index(7) + 1
                assert begun == 40 or (one.tokens, one.text, one.stop) == (sound.tokens[:begun], "", "poisoned")
    poisoned = sum(one.stop == "poisoned" for many in got for one in many)
    assert generator.counters["poisoned"] == poisoned > 3


def test_no_pass_mixes_devices(tokenizer, few_rows, monkeypatch):
    """On the device `meta`, which refuses tensors of another one as a GPU does; what is drawn there is made up."""
    model, drawn = tiny_causal().to(torch.bfloat16).to("meta"), []

    def draw(rows, logits_BV, sampling):
        assert logits_BV.device.type == "meta"
        assert logits_BV.shape == (len(rows), 400)
        drawn.append(len(rows))
        return [EOS if (row.prompt + row.sample + len(row.tokens)) % 17 == 16 else 9 for row in rows]

    monkeypatch.setattr(engine, "draw", draw)
    monkeypatch.setitem(engine.MOST_ROWS, "cuda", 12)
    found = Generator(model, tokenizer).generate(random_prompts(9), range(9), 3, Sampling(max_new_tokens=40))
    assert [[len(one.tokens) for one in many] for many in found] == [
        [16 - (prompt + sample) % 17 for sample in range(3)] for prompt in range(9)
    ]
    assert sum(drawn) == sum(len(one.tokens) + 1 for many in found for one in many)


def test_all_end_tokens_end_a_response(model, tokenizer):
    prompts = random_prompts(4)
    (whole,), *_ = Generator(model, tokenizer).generate(prompts, range(4), 1, Sampling(max_new_tokens=30))
    extra = whole.tokens[5]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [EOS, extra]
    generator = Generator(model, tokenizer)
    model.generation_config.eos_token_id = before
    assert generator.stops == [EOS, extra]
    ((cut,), *_) = generator.generate(prompts, range(4), 1, Sampling(max_new_tokens=30))
    assert (cut.tokens, cut.stop) == (whole.tokens[: whole.tokens.index(extra)], "end")


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_causal().train()
    before = model.config._attn_implementation
    Generator(model, tokenizer).generate([[5, 6]], [0], 2, Sampling(max_new_tokens=2))
    assert model.training
    assert model.config._attn_implementation == before


def test_what_cannot_be_asked_for_is_refused(model, tokenizer):
    generator = Generator(model, tokenizer)
    for prompts, keys, samples, said in (
        ([[5], []], [0, 1], 1, r"prompts\[1\]"),
        ([[5]], [0, 1], 1, "keys"),
        ([[5]], [-1], 1, "keys"),
        ([[5]], [0], 0, "num_samples"),
    ):
        with pytest.raises(UserError, match=said):
            generator.generate(prompts, keys, samples, Sampling())
    with pytest.raises(UserError, match="token_budget"):
        Generator(model, tokenizer, token_budget=0)
    assert generator.generate([], [], 3, Sampling()) == []


def test_a_prompt_without_positions_for_its_response_is_named(tokenizer):
    generator = Generator(tiny_causal("gpt2"), tokenizer)  # 256 of them
    fits = generator.generate([[5] * 247], [0], 1, Sampling(temperature=0.0, max_new_tokens=10))
    assert len(fits) == 1
    with pytest.raises(UserError, match=r"prompts\[1\] has 248 tokens.*256"):
        generator.generate([[5], [5] * 248], [0, 1], 1, Sampling(max_new_tokens=10))


def test_an_adapter_is_sampled_from(tokenizer):
    peft = pytest.importorskip("peft")
    base = tiny_causal().double()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted = adapted.double().eval()
    prompts = random_prompts(3)
    found = Generator(adapted, tokenizer).generate(prompts, range(3), 2, Sampling(temperature=0.0, max_new_tokens=20))
    for prompt, responses in zip(prompts, found):
        rows = adapted.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert [one.tokens for one in responses] == [rows[: rows.index(EOS)] if EOS in rows else rows] * 2
