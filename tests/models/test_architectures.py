"""Every padded architecture against plain transformers on each sequence alone, rows of unequal length in one batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers
from plain import called_with, largest_difference, plain_numbers, route_numbers
from tiny_models import random_groups, randomize

from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import logps_route
from prefsel.models.neighbours import PADDING_MATTERS
from prefsel.models.reward import reward_route

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SMALL = {"embedding_size": 32}
NEO_X = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "d_head": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
ROPE = {"rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 9.0]}
LONGROPE = {**ROPE, "rope_type": "longrope", "original_max_position_embeddings": 40}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PHI3_LONG = {"num_key_value_heads": 2, "original_max_position_embeddings": 40, "rope_parameters": LONGROPE}
MSCALES = {"short_mscale": 1.2, "long_mscale": 1.6}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "cohere": ("cohere", GROUPED),
    "cohere2, sliding window": ("cohere2", {**GROUPED, "sliding_window": 8}),
    "exaone4": ("exaone4", GROUPED),
    "falcon": ("falcon", {}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2, soft caps": ("gemma2", {**GROUPED, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm4": ("glm4", GROUPED),
    "gpt_bigcode": ("gpt_bigcode", NEO_X),
    "gpt_neo, local": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}),
    "gpt_neox, dynamic": ("gpt_neox", {"hidden_size": 128, "max_position_embeddings": 40, "rope_parameters": DYNAMIC}),
    "gpt_oss": ("gpt_oss", {**GROUPED, "num_local_experts": 4, "sliding_window": 8}),
    "gptj": ("gptj", {**NEO_X, "rotary_dim": 4}),
    "granite": ("granite", {"num_key_value_heads": 2, "logits_scaling": 2.0}),
    "jamba": (
        "jamba",
        {
            **{"num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
            **{"use_mamba_kernels": False, "mamba_d_state": 8},
        },
    ),
    "llama, dynamic": ("llama", {"max_position_embeddings": 40, "rope_parameters": DYNAMIC}),
    "gemma3, dynamic in some layers": (
        "gemma3_text",
        {
            **GROUPED,
            "max_position_embeddings": 40,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama4_text": ("llama4_text", {**GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 64}),
    "mamba": ("mamba", {"state_size": 8}),
    "minimax": ("minimax", {**GROUPED, "num_local_experts": 2}),
    "mistral, sliding window": ("mistral", {**GROUPED, "sliding_window": 8}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, "sliding_window": 8}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi3, longrope": ("phi3", PHI3_LONG),
    "phi3, sliding window": ("phi3", {"num_key_value_heads": 2, "sliding_window": 8}),
    "phimoe, longrope": (
        "phimoe",
        {
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "rope_parameters": {**LONGROPE, **MSCALES},
            "original_max_position_embeddings": 40,
        },
    ),
    "qwen2, longrope": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": LONGROPE}),
    "qwen2_moe": ("qwen2_moe", {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32}),
    "qwen3, dynamic": ("qwen3", {**GROUPED, "max_position_embeddings": 40, "rope_parameters": DYNAMIC}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    ),
    "roberta as a decoder": ("roberta", {"is_decoder": True}),
    "xlm-roberta as a decoder": ("xlm-roberta", {"is_decoder": True}),
    "rwkv": ("rwkv", {}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2}),
    "starcoder2, sliding window": ("starcoder2", {"num_key_value_heads": 2, "sliding_window": 8}),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
}

CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("albert", SMALL),
    "bart": ("bart", BART),
    "bert": ("bert", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "camembert": ("camembert", {}),
    "data2vec-text": ("data2vec-text", {}),
    "deberta": ("deberta", {}),
    "deberta-v2": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "electra": ("electra", SMALL),
    "ernie": ("ernie", {}),
    "esm": ("esm", {"position_embedding_type": "absolute"}),
    "gemma2": ("gemma2", {**GROUPED, "sliding_window": 8}),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}),
    "ibert": ("ibert", {}),
    "layoutlm": ("layoutlm", {}),
    "longformer": ("longformer", {"attention_window": [8, 8]}),
    "modernbert": ("modernbert", {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}),
    "mpnet": ("mpnet", {}),
    "mra": ("mra", {"block_per_row": 4}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi3, longrope": ("phi3", PHI3_LONG),
    "qwen2, dynamic": ("qwen2", {**GROUPED, "max_position_embeddings": 40, "rope_parameters": DYNAMIC}),
    "rembert": ("rembert", {"input_embedding_size": 32, "output_embedding_size": 32}),
    "roberta": ("roberta", {}),
    "roberta, pad token 5": ("roberta", {"pad_token_id": 5}),
    "roberta-prelayernorm": ("roberta-prelayernorm", {}),
    "roformer": ("roformer", SMALL),
    "squeezebert": ("squeezebert", {"embedding_size": 32, **{f"{n}_groups": 1 for n in ("q", "k", "v")}}),
    "t5": ("t5", T5),
    "xlm-roberta": ("xlm-roberta", {}),
    "xlm-roberta-xl": ("xlm-roberta-xl", {}),
}

SINGLE = {
    "convbert": ("convbert", SMALL),
    "fnet": ("fnet", {}),
    "mobilebert": ("mobilebert", {"embedding_size": 32}),
    "nystromformer": ("nystromformer", {"segment_means_seq_len": 64, "num_landmarks": 64}),
    "xlnet": ("xlnet", XLNET),
    "yoso": ("yoso", {"use_expectation": True}),
}
"""Classifiers whose padded rows transformers itself gives other numbers."""


def built(model_type: str, options: dict[str, Any], auto: Any) -> Any:
    """A random model of the architecture, with as many of the sizes as its configuration takes."""
    own = transformers.AutoConfig.for_model(model_type)
    skipped = {"xlnet": {"num_hidden_layers", "max_position_embeddings"}}.get(model_type, set())
    taken = {name: size for name, size in SIZES.items() if hasattr(own, name) and name not in skipped}
    ids = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = transformers.AutoConfig.for_model(model_type, **(ids | taken | copy.deepcopy(options)))
    return randomize(auto.from_config(config))


def unequal_groups() -> list[EncodedGroup]:
    """From four tokens to more than twice the length where rotary embeddings change; each ends with eos, once."""
    groups = [EncodedGroup([7, 8], [[9, 10]], ["ok"], 0), *random_groups([2, 3, 1], longest=55, seed=3)]
    return [
        EncodedGroup(
            [max(token, 6) for token in group.prompt_tokens],
            [[max(token, 6) for token in ids] + [2] for ids in group.completion_tokens],
            group.status,
            0,
        )
        for group in groups
    ]


@pytest.mark.parametrize("token_budget", [1, 10_000])
@pytest.mark.parametrize("name", DECODERS)
def test_log_probs_of_decoders(name, token_budget):
    model_type, options = DECODERS[name]
    model = built(model_type, options, transformers.AutoModelForCausalLM)
    groups = unequal_groups()
    expected = plain_numbers(model, groups, is_reward=False)
    route = logps_route(model, pad_token_id=1)
    assert not route.is_packed
    sizes = called_with(route)
    assert largest_difference(route_numbers(route, groups, token_budget), expected) < 5e-5
    assert max(sizes) == (1 if token_budget == 1 else 7)


@pytest.mark.parametrize("token_budget", [1, 10_000])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rewards_of_classifiers(name, token_budget):
    model_type, options = CLASSIFIERS[name]
    model = built(model_type, {"num_labels": 3, **options}, transformers.AutoModelForSequenceClassification)
    groups = unequal_groups()
    expected = plain_numbers(model, groups, is_reward=True)
    route = reward_route(model)
    assert not route.is_packed
    sizes = called_with(route)
    assert largest_difference(route_numbers(route, groups, token_budget), expected) < 5e-5
    assert max(sizes) == (1 if token_budget == 1 else 7)


@pytest.mark.parametrize("name", SINGLE)
def test_classifiers_whose_padding_counts_get_one_sequence_a_row(name):
    model_type, options = SINGLE[name]
    model = built(model_type, {"num_labels": 2, **options}, transformers.AutoModelForSequenceClassification)
    groups = unequal_groups()
    expected = plain_numbers(model, groups, is_reward=True)
    route = reward_route(model)
    assert PADDING_MATTERS in route.reason
    sizes = called_with(route)
    assert largest_difference(route_numbers(route, groups, 10_000), expected) < 5e-5
    assert set(sizes) == {1}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_classifiers_with_a_decoder_take_sequences_with_unequal_numbers_of_eos(name):
    """Turns that end with eos: together transformers refuses them, alone it does not."""
    model_type, options = CLASSIFIERS[name]
    model = built(model_type, {"num_labels": 2, **options}, transformers.AutoModelForSequenceClassification)
    turns = EncodedGroup([7, 2, 8, 2], [[9, 2], [9, 2, 10, 11, 2], [12, 2]], ["ok", "ok", "too_long"], 0)
    cut = EncodedGroup([7, 2, 8], [[9, 9, 2]], ["ok"], 1, (2,))
    others = unequal_groups()
    expected = plain_numbers(model, [turns, EncodedGroup([8], [[9, 9, 2]], ["ok"], 0), *others], is_reward=True)
    del expected[0, 2]
    route = reward_route(model)
    sizes = called_with(route)
    assert largest_difference(route_numbers(route, [turns, cut, *others], 10_000), expected) < 5e-5
    assert sizes == [8, 1, 1]
