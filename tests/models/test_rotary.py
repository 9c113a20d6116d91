"""Rotary embeddings that follow a sequence's length: every row its own, with gradients, whatever was met before."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from plain import largest_difference, plain_numbers, route_numbers
from tiny_models import random_groups, tiny_causal

from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import logps_route, score_groups
from prefsel.models.pair_batch import pair_logps
from prefsel.models.rotary import length_ropes, own_frequencies

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 9.0]}
KINDS = {
    "dynamic": ("llama", {"max_position_embeddings": 40, "rope_parameters": DYNAMIC}),
    "longrope": ("phi3", {"original_max_position_embeddings": 40, "rope_parameters": LONGROPE}),
}


def made(kind):
    model_type, options = KINDS[kind]
    return tiny_causal(model_type, **copy.deepcopy(options))


def of_lengths(*lengths):
    return [EncodedGroup(list(range(5, 7)), [list(range(10, 8 + length))], ["ok"], 0) for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_around_the_length_where_frequencies_change(kind):
    model = made(kind)
    groups = of_lengths(4, 39, 40, 41, 42, 90)
    expected = plain_numbers(model, groups, is_reward=False)
    found = route_numbers(logps_route(model), groups, 10_000)
    assert largest_difference(found, expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_this_differs(kind):
    """The fault itself: a short sequence beside a long one, with the longest one's frequencies."""
    model = made(kind)
    groups = of_lengths(12, 90)
    (batch,) = logps_route(model).rows(groups, 10_000)
    with torch.no_grad():
        together = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        with own_frequencies(model, batch.lengths):
            own = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    assert batch.lengths == (90, 12)
    assert float((together - own)[1, :12].abs().max()) > 0.1
    assert float((together - own)[0].abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_met_before_does_not_matter(kind):
    model, fresh = made(kind), made(kind)
    groups = random_groups([2, 2])
    with torch.no_grad():
        model(input_ids=torch.randint(5, 400, (1, 200)))
    assert route_numbers(logps_route(model), groups, 500) == route_numbers(logps_route(fresh), groups, 500)
    # And a plain call afterwards is that of a model that has met nothing.
    short = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(model(short).logits, fresh(short).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_gradients_are_those_of_every_pair_alone(kind, has_checkpoints):
    model = made(kind)
    groups = random_groups([2, 2, 2], longest=45)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    values = []
    for group in groups:
        for sign, response in zip((1.0, -2.0), group.completion_tokens):
            alone = copy.deepcopy(model)
            ids = torch.tensor([group.prompt_tokens + response])
            logps_TV = alone(input_ids=ids).logits[0, len(group.prompt_tokens) - 1 : -1].log_softmax(-1)
            value = logps_TV.gather(1, torch.tensor(response)[:, None]).sum()
            (sign * value).backward()
            values.append(float(value.detach()))
            for name, parameter in alone.named_parameters():
                expected[name] += parameter.grad
    if has_checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # there is no dropout, and checkpoints are used in training mode alone
    logps_P2 = pair_logps(model, groups)
    assert logps_P2.flatten().tolist() == pytest.approx(values, rel=1e-5)
    (logps_P2 @ torch.tensor([1.0, -2.0], dtype=torch.float64)).sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - expected[name]).abs().max()) < 1e-4 * scale, name


def test_only_the_layers_a_model_has_count():
    by_layer = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for layers, expected in ((["sliding_attention"] * 2, []), (["sliding_attention", "full_attention"], ["dynamic"])):
        options = {"layer_types": layers, "rope_parameters": copy.deepcopy(by_layer), "head_dim": 8}
        assert length_ropes(tiny_causal("gemma3_text", **options).config) == expected
    assert length_ropes(tiny_causal("gpt2").config) == length_ropes(tiny_causal("llama").config) == []


def test_score_groups_tells_that_it_padded(tokenizer, caplog):
    groups = [{"prompt": "who sat?", "completions": ["the cat", "a dog saw the cat, and bread rises " * 9]}]
    with caplog.at_level(logging.WARNING, logger="prefsel.models.logps"):
        score_groups(tiny_causal("llama"), tokenizer, groups, token_budget=500)
        assert not caplog.records
        score_groups(made("longrope"), tokenizer, groups, token_budget=500)
    assert "Phi3ForCausalLM takes the padded path: its 'longrope' rotary embedding" in caplog.text
