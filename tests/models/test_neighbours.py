"""Models whose numbers are not those of a sequence alone are found by trying; refused where rows cannot be single."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import random_groups, tiny_causal, tiny_reward

from prefsel.errors import UserError
from prefsel.models.logps import logps_route
from prefsel.models.neighbours import PADDING_MATTERS, _sequences, padding_matters
from prefsel.models.padded import padded_rewards
from prefsel.models.pair_batch import pair_logps
from prefsel.models.reward import own_pad_token, reward_route


def mixed_rows(module, args, output):
    """What a layer would do that normalises over its batch."""
    return output - 0.5 * output.mean(dim=0, keepdim=True)


def test_a_model_that_mixes_its_rows_gets_single_ones():
    model = tiny_causal("gemma2")
    assert PADDING_MATTERS not in logps_route(model).reason
    model = tiny_causal("gemma2")
    model.model.layers[0].mlp.register_forward_hook(mixed_rows)
    route = logps_route(model)
    assert PADDING_MATTERS in route.reason
    assert {len(batch.lengths) for batch in route.rows(random_groups([2, 3]), 10_000)} == {1}


def test_pairs_of_such_a_model_are_refused():
    model = tiny_causal("gemma2")
    model.model.layers[0].mlp.register_forward_hook(mixed_rows)
    with pytest.raises(UserError, match=r"model gemma2 .*a pair's log-probs takes two completions or more at once"):
        pair_logps(model, random_groups([2]))


def test_a_model_is_tried_once():
    model, calls = tiny_reward("bert"), []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    reward_route(model)
    tried = len(calls)
    assert tried > 0
    reward_route(model)
    assert len(calls) == tried


def test_randomness_in_evaluation_mode_is_refused():
    model = tiny_reward("bert")
    model.bert.embeddings.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    with pytest.raises(UserError, match=r"the same sequences got numbers .* apart when they were asked for twice"):
        reward_route(model)


def test_sparse_attention_with_a_memory_is_refused():
    with pytest.raises(UserError, match="its sparse attention changes with what it met before"):
        reward_route(tiny_reward("big_bird", num_key_value_heads=None))
    reward_route(tiny_reward("big_bird", attention_type="original_full", num_key_value_heads=None))


def test_a_length_dependent_embedding_in_code_of_its_own_is_refused():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny_causal("llama", rope_parameters=rope)
    del model.model.rotary_emb.rope_type
    with pytest.raises(UserError, match="its 'dynamic' rotary embedding follows the longest sequence of a batch"):
        logps_route(model)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_an_encoder_is_no_policy(model_type):
    encoder = tiny_causal(model_type)
    with pytest.raises(UserError, match=f"{model_type} .*it sees the tokens that follow.*is no log-prob.*is_decoder"):
        logps_route(encoder)
    with pytest.raises(UserError, match="it sees the tokens that follow"):
        pair_logps(encoder, random_groups([2]))
    assert not logps_route(tiny_causal(model_type, is_decoder=True)).is_packed


def test_one_sequence_without_a_number_hides_nothing_of_the_others():
    model = tiny_causal("gemma2", tie_word_embeddings=False)
    model.model.layers[0].mlp.register_forward_hook(mixed_rows)
    with torch.no_grad():  # a token of one of the sequences that are tried
        model.model.embed_tokens.weight[_sequences(model)[0].prompt_tokens[0]] = float("nan")
    assert PADDING_MATTERS in logps_route(model).reason


@pytest.mark.parametrize(("pad_token_id", "expected"), [(0, 0), (399, 399), (400, None), (-1, None), (None, None)])
def test_a_pad_token_without_a_row_of_the_embedding_is_none(pad_token_id, expected):
    model = tiny_reward("bert")
    model.config.pad_token_id = pad_token_id
    assert own_pad_token(model) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_rounding_is_no_reason(dtype, model_type):
    model = tiny_reward(model_type, pad_token_id=1).to(dtype)
    assert padding_matters(model, partial(padded_rewards, model), 1) == ""
