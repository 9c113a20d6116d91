from __future__ import annotations

import pytest
import torch
from tiny_models import random_groups, randomize, related_groups, tiny_reward
from transformers import AutoModelForSequenceClassification, Gemma3Config

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup
from prefsel.models.packing import pack
from prefsel.models.reward import own_pad_token, packed_rewards, reward_route


def rewards(model, groups, token_budget):
    route = reward_route(model)
    with torch.no_grad():
        return {
            key: value.tolist()
            for batch in route.rows(groups, token_budget)
            for key, value in zip(batch.completion_index, route.forward(batch))
        }


def own_forward(model, groups):
    """Transformers at batch 1, one sequence at a time."""
    with torch.no_grad():
        return {
            (g, c): model(input_ids=torch.tensor([group.prompt_tokens + response])).logits[0].tolist()
            for g, group in enumerate(groups)
            for c, response in enumerate(group.completion_tokens)
        }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def ending_in(groups, token):
    """The same groups, every response closed by `token`."""
    return [EncodedGroup(g.prompt_tokens, [[*ids, token] for ids in g.completion_tokens], g.status, 0) for g in groups]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("num_labels", [1, 4])
@pytest.mark.parametrize("token_budget", [1, 8, 200, 10_000])
def test_every_head_equals_the_models_own_forward(model_type, num_labels, token_budget):
    model = tiny_reward(model_type, num_labels=num_labels)
    assert reward_route(model).is_packed
    groups = ending_in(random_groups([1, 3, 2]), 2)
    assert_equal(rewards(model, groups, token_budget), own_forward(model, groups))


@pytest.mark.parametrize("token_budget", [1, 300, 10_000])
def test_groups_that_begin_alike_equal_the_models_own_forward(token_budget):
    model = tiny_reward(num_labels=2, max_position_embeddings=512)
    groups = ending_in(related_groups(num_completions=3), 2)
    assert_equal(rewards(model, groups, token_budget), own_forward(model, groups))


@pytest.mark.parametrize("pad_token_id", [2, 0, None])
def test_pad_equal_to_eos_changes_nothing(pad_token_id):
    """With pad = eos the row before the final eos is read, as transformers does at batch 1."""
    model = tiny_reward(pad_token_id=pad_token_id, max_position_embeddings=512)
    groups = ending_in([*random_groups([2, 2, 3]), *related_groups()], 2)
    groups += [EncodedGroup([5, 6], [[2], [2, 2], [7, 2, 2]], ["ok"] * 3, 0), EncodedGroup([2, 2], [[2]], ["ok"], 0)]
    for token_budget in (1, 100, 10_000):
        assert_equal(rewards(model, groups, token_budget), own_forward(model, groups))


def test_a_response_without_tokens_is_judged_by_its_prompt():
    model = tiny_reward()
    groups = [EncodedGroup([5, 6, 7], [[], [8]], ["ok", "ok"], 0)]
    assert_equal(rewards(model, groups, 100), own_forward(model, groups))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("bert", {}), ("mistral", {"sliding_window": 8}), ("mistral", {"sliding_window": 8, "pad_token_id": 2})],
)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_other_models_are_padded_and_batch_size_does_not_matter(model_type, options, batch_size):
    model = tiny_reward(model_type, num_labels=2, **options)
    assert not reward_route(model).is_packed
    groups = ending_in(random_groups([2, 3, 3]), 2)
    longest = max(len(g.prompt_tokens) + len(r) for g in groups for r in g.completion_tokens)
    assert_equal(rewards(model, groups, batch_size * longest), own_forward(model, groups))


def test_without_a_pad_token_padded_rows_are_single():
    model = tiny_reward("mistral", sliding_window=8, pad_token_id=None)
    groups = random_groups([2, 3])
    assert {len(batch.lengths) for batch in reward_route(model).rows(groups, 10_000)} == {1}
    assert_equal(rewards(model, groups, 10_000), own_forward(model, groups))


def test_gradients_reach_head_and_trunk():
    model = tiny_reward(num_labels=2)
    (batch,) = pack(random_groups([2, 2]), 10_000)
    packed_rewards(model, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_encoder_cannot_be_packed():
    (batch,) = pack(random_groups([1]), 1000)
    with pytest.raises(UserError, match="model type 'bert' is not among the tested"):
        packed_rewards(tiny_reward("bert"), batch)


def test_a_classifier_that_reads_images_too_has_the_pad_token_of_its_text():
    text = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    text |= {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 8, "pad_token_id": 3}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4, num_labels=1)
    model = randomize(AutoModelForSequenceClassification.from_config(config))
    assert own_pad_token(model) == 3
    groups = [*random_groups([2, 3]), EncodedGroup([5, 3, 7], [[3, 8, 3], [9]], ["ok"] * 2, 0)]
    assert_equal(rewards(model, groups, 1000), own_forward(model, groups))
