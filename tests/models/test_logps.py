from __future__ import annotations

import random

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from tiny_models import naive_logps, random_groups, related_groups, tiny_causal
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from prefsel.errors import UserError
from prefsel.models import score_groups
from prefsel.models.architecture import PACKED_MODEL_TYPES, model_shape
from prefsel.models.chat import EncodedGroup
from prefsel.models.directional import directional_logps
from prefsel.models.layout import attention_area
from prefsel.models.logps import packed_logps
from prefsel.models.packing import flops_min, pack


def packed(model, groups, token_budget=512, **options):
    return {
        key: value
        for batch in pack(groups, token_budget)
        for key, value in zip(batch.completion_index, packed_logps(model, batch, **options))
    }


def one_at_a_time(model, groups):
    return {
        (g, c): naive_logps(model, group.prompt_tokens, response)
        for g, group in enumerate(groups)
        for c, response in enumerate(group.completion_tokens)
    }


def assert_equal(got, expected, relative):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert float(got[key]) == pytest.approx(float(value), rel=relative), key


@torch.no_grad()
@pytest.mark.parametrize("model_type", PACKED_MODEL_TYPES)
def test_packed_equals_one_sequence_at_a_time(model_type):
    model = tiny_causal(model_type)
    groups = random_groups([1, 2, 3, 4, 5, 2])
    assert_equal(packed(model, groups), one_at_a_time(model, groups), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", PACKED_MODEL_TYPES)
@pytest.mark.parametrize("token_budget", [1, 300, 10_000])
def test_groups_that_begin_alike_equal_one_sequence_at_a_time(model_type, token_budget):
    model = tiny_causal(model_type, max_position_embeddings=512)
    groups = related_groups(num_completions=3)
    assert token_budget < 10_000 or sum(row.shared_tokens for row in pack(groups, token_budget)) > 400
    assert_equal(packed(model, groups, token_budget), one_at_a_time(model, groups), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("token_budget", [1, 100, 700, 10_000])
def test_token_budget_does_not_matter(token_budget):
    model = tiny_causal()
    groups = random_groups([5, 1, 3, 2], longest=130)
    assert_equal(packed(model, groups, token_budget), one_at_a_time(model, groups), 1e-5)


@torch.no_grad()
def test_order_and_neighbours_do_not_matter():
    model = tiny_causal("qwen2")
    groups = random_groups([2, 2, 2, 2])
    expected = packed(model, groups, 10_000)
    order = [2, 0, 3, 1]
    shuffled = packed(model, [groups[i] for i in order], 150)
    assert_equal({(order[g], c): value for (g, c), value in shuffled.items()}, expected, 1e-5)


@torch.no_grad()
def test_head_chunks_do_not_matter():
    model = tiny_causal()
    groups = random_groups([3, 3])
    calls = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    assert_equal(packed(model, groups, 10_000, head_chunk=7), packed(model, groups, 10_000), 1e-6)
    *chunks, whole = calls
    assert sum(chunks) == whole
    assert max(chunks) == 7
    calls.clear()
    with torch.enable_grad():
        # Workers under ZeRO-3 must call the head equally often, however long their rows are.
        packed(model, groups, 10_000, head_chunk=7)
    assert calls == [whole]
    hook.remove()


@torch.no_grad()
def test_an_empty_response_has_log_prob_zero():
    groups = [EncodedGroup([5, 6, 7], [[], [8]], ["ok", "ok"], 0)]
    model = tiny_causal()
    got = packed(model, groups)
    assert got[0, 0] == 0.0
    assert float(got[0, 1]) == pytest.approx(float(naive_logps(model, [5, 6, 7], [8])), rel=1e-5)


@torch.no_grad()
def test_bf16_keeps_the_log_sum_exp_in_fp32():
    model = tiny_causal().to(torch.bfloat16)
    groups = random_groups([2, 2])
    for key, value in one_at_a_time(model, groups).items():
        assert float(packed(model, groups)[key]) == pytest.approx(float(value), rel=0.02)
    assert all(value.dtype == torch.float64 for value in packed(model, groups).values())


@pytest.mark.parametrize("groups", [random_groups([2, 3, 1]), related_groups()], ids=["random", "related"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_gradient_equals_that_of_one_sequence_at_a_time(model_type, groups):
    model = tiny_causal(model_type, max_position_embeddings=512).double()
    weight = {key: 1.0 + i for i, key in enumerate(one_at_a_time(model, groups))}

    def gradient(logps):
        loss = sum(weight[key] * value for key, value in logps.items())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    expected = gradient(one_at_a_time(model, groups))
    # RMSNorm computes in fp32 whatever the model's dtype; GPT-NeoX has none.
    relative = 1e-11 if model_type == "gpt_neox" else 1e-6
    assert torch.linalg.norm(gradient(packed(model, groups)) - expected) <= relative * torch.linalg.norm(expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same(use_reentrant):
    model = tiny_causal().double().train()
    groups = random_groups([2, 3])

    def gradient():
        model.zero_grad()
        sum(packed(model, groups).values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert torch.allclose(gradient(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_forward_mode_derivative_equals_autograd(model_type):
    model = tiny_causal(model_type).double()
    (batch,) = pack(random_groups([1, 2]), 10_000)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    tangent = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}

    class Logps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return packed_logps(self.model, batch, kernel="matmul")

    wrapped = Logps()
    _, derivative = jvp(
        lambda values: functional_call(wrapped, {f"model.{n}": v for n, v in values.items()}, ()),
        ({n: p.detach() for n, p in parameters.items()},),
        (tangent,),
    )
    logps = packed_logps(model, batch)
    for completion, value in enumerate(logps):
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        expected = sum((g * tangent[n]).sum() for n, g in zip(parameters, gradients))
        assert float(derivative[completion]) == pytest.approx(float(expected), rel=1e-4)


def test_adapters_of_peft_are_seen():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_causal(), config).eval()
    groups = random_groups([2, 1])
    with torch.no_grad():
        got = packed(model, groups)
        assert_equal(got, one_at_a_time(model.get_base_model(), groups), 1e-5)
        with model.disable_adapter():
            assert float(packed(model, groups)[0, 0]) != pytest.approx(float(got[0, 0]), rel=1e-3)
    sum(packed(model, groups).values()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


@torch.no_grad()
@pytest.mark.parametrize("num_completions", [2, 4, 7, 16])
def test_a_prompt_passes_the_trunk_once_however_many_completions_it_has(num_completions):
    prompt, responses = list(range(5, 45)), [[100 + i] * (3 + i) for i in range(num_completions)]
    model, seen = tiny_causal(), {"trunk": 0, "head": 0}

    def count(name):
        return lambda module, inputs, output: seen.update({name: seen[name] + inputs[0].numel() // inputs[0].shape[-1]})

    model.model.layers[0].register_forward_hook(count("trunk"))
    model.lm_head.register_forward_hook(count("head"))
    (row,) = pack([EncodedGroup(prompt, responses, ["ok"] * num_completions, 0)], 10_000)
    packed_logps(model, row)
    num_tokens = sum(map(len, responses))
    assert seen == {"trunk": 40 + num_tokens, "head": num_tokens}
    assert (row.trunk_tokens, row.head_rows) == (seen["trunk"], seen["head"])


@torch.no_grad()
def test_flops_stay_within_a_twentieth_of_the_minimum():
    rng = random.Random(0)
    groups = [
        EncodedGroup(
            [rng.randrange(5, 400) for _ in range(rng.randint(120, 280))],
            [[rng.randrange(5, 400) for _ in range(rng.randint(150, 350))] for _ in range(2)],
            ["ok", "ok"],
            0,
        )
        for _ in range(8)
    ]
    options = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 1024, "vocab_size": 4000}
    model = tiny_causal(**options)
    shape = model_shape(model)
    rows = pack(groups, 4096)
    with FlopCounterMode(display=False) as counter:
        for row in rows:
            packed_logps(model, row)
    counted = counter.get_total_flops()
    assert counted <= 1.05 * flops_min(groups, shape)
    analytical = sum(
        shape.flops(trunk_tokens=row.trunk_tokens, head_rows=row.head_rows, attention_area=attention_area(row.segments))
        for row in rows
    )
    assert counted == analytical


@torch.no_grad()
def test_shared_beginnings_take_fewer_flops_than_the_minimum_of_each_group():
    groups = related_groups(num_completions=3)
    model = tiny_causal(max_position_embeddings=512)
    (row,) = pack(groups, 10_000)
    with FlopCounterMode(display=False) as counter:
        packed_logps(model, row)
    sequences = [group.prompt_tokens + ids for group in groups for ids in group.completion_tokens]
    distinct = {tuple(tokens[: n + 1]) for tokens in sequences for n in range(len(tokens))}
    assert len(distinct) <= row.trunk_tokens <= len(distinct) + 16 * len(row.segments)
    assert counter.get_total_flops() < 0.6 * flops_min(groups, model_shape(model))


def test_a_model_that_packing_would_not_serve_is_refused_with_the_reason():
    (batch,) = pack(random_groups([1]), 100)
    with pytest.raises(UserError, match="sliding-window"):
        packed_logps(tiny_causal("mistral", sliding_window=16), batch)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_score_groups_takes_strings_and_returns_columns(tokenizer, model_type):
    model = tiny_causal(model_type)
    groups = [
        {"prompt": "the cat sat", "completions": ["on the mat.", "on the dog!"]},
        {"prompt": "please write", "completions": ["a short story " * 40, "bread", "why?"]},
    ]
    columns = score_groups(model, tokenizer, groups, token_budget=64, max_length=60)
    assert columns["status"] == [["ok", "ok"], ["too_long", "ok", "ok"]]
    assert columns["logps"][1][0] is None
    assert columns["num_tokens"][1][0] is None
    assert [len(ids) for ids in columns["completion_ids"]] == [2, 3]
    for g, c in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        start = f"<|im_start|>user\n{groups[g]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(start)["input_ids"]
        full = tokenizer(f"{start}{groups[g]['completions'][c]}<|im_end|>\n")["input_ids"]
        with torch.no_grad():
            expected = naive_logps(model, prompt, full[len(prompt) :])
        assert columns["logps"][g][c] == pytest.approx(float(expected), rel=1e-5)
        assert columns["num_tokens"][g][c] == len(full) - len(prompt)


@pytest.mark.parametrize("hold", [pa.Table.from_pylist, pl.DataFrame, pd.DataFrame, datasets.Dataset.from_list])
def test_groups_come_in_any_table(tokenizer, hold):
    """Messages and texts, ids given or made, through every library: the numbers of the same rows as dictionaries."""
    model = tiny_causal()
    turns = [[{"role": "user", "content": text}] for text in ("who sat?", "a short story")]
    answers = [["the cat", "a dog saw"], ["bread rises", "the dog", "please"]]
    rows = [{"prompt": prompt, "completions": texts, "n": 1} for prompt, texts in zip(turns, answers)]
    options = {"token_budget": 64, "template": "plain"}
    expected = score_groups(model, tokenizer, rows, **options)
    assert [len(row) for row in expected["logps"]] == [2, 3]
    assert score_groups(model, tokenizer, hold(rows), **options) == expected
    messages = [
        {**row, "completions": [{"messages": [{"role": "assistant", "content": t}]} for t in row["completions"]]}
        for row in rows
    ]
    assert score_groups(model, tokenizer, hold(messages), **options) == expected


def test_one_group_outside_a_list_is_refused(tokenizer):
    with pytest.raises(UserError, match="groups: got dict with prompt, completions"):
        score_groups(tiny_causal(), tokenizer, {"prompt": "p", "completions": ["a", "b"]}, token_budget=64)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_sequence_beyond_the_positions_is_told(tokenizer, model_type):
    own = {"ffn_dim": 64, "word_embed_proj_dim": 32} if model_type == "opt" else {}
    model = tiny_causal(model_type, max_position_embeddings=30, **own)
    group = {"prompt": "the cat", "completions": [" sat", " a dog saw the cat" * 9]}
    with pytest.raises(UserError, match=r"has \d+ tokens, and the model positions for 30; give max_length=30"):
        score_groups(model, tokenizer, [group], token_budget=500, template="plain")
    found = score_groups(model, tokenizer, [group], token_budget=500, template="plain", max_length=30)
    assert found["status"] == [["ok", "too_long"]]


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_model_in_training_is_scored_without_dropout_and_stays_in_training(tokenizer, model_type):
    own = {"ffn_dim": 64, "word_embed_proj_dim": 32} if model_type == "opt" else {}
    model = tiny_causal(model_type, **own)
    groups = [{"prompt": "who sat where?", "completions": ["the cat", "a dog saw the mat"]}]
    expected = score_groups(model, tokenizer, groups, token_budget=500)
    (model.transformer.h if model_type == "gpt2" else model.model.decoder.layers)[0].train()
    modes = [module.training for module in model.modules()]
    assert score_groups(model, tokenizer, groups, token_budget=500) == expected
    name, weight = next(iter(model.named_parameters()))
    direction = {name: torch.randn_like(weight)}
    assert directional_logps(model, tokenizer, groups, direction)["logps"] == [
        pytest.approx(row, rel=1e-5) for row in expected["logps"]
    ]
    assert [module.training for module in model.modules()] == modes
    assert 0 < sum(modes) < len(modes)
