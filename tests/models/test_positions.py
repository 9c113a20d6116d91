"""What recipes say of models whose padded numbers changed, and nothing of any other."""

from __future__ import annotations

import pytest
import transformers
from tiny_models import bpe_tokenizer, tiny_config, tiny_reward

from prefsel.models.declared import max_positions
from prefsel.models.loading import context_length
from prefsel.models.positions import VERSION, num_positions, padded_version

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def phi3():
    return tiny_config("phi3", original_max_position_embeddings=64, rope_parameters=dict(LONGROPE))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "gemma2", "bloom", "opt", "deberta-v2", "mamba"])
def test_others_have_no_version(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    assert padded_version(config, None, has_own_code=False) is None


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "mpnet", "longformer", "nystromformer", "xlnet"])
def test_encoders_whose_numbers_changed(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    assert padded_version(config, 512, has_own_code=False) == VERSION


def test_code_of_its_own_may_be_any_of_them():
    assert padded_version(tiny_config("llama"), 512, has_own_code=True) == VERSION


@pytest.mark.parametrize(("limit", "expected"), [(64, None), (65, VERSION), (256, VERSION), (None, VERSION)])
def test_longrope_changed_beyond_the_length_of_its_pretraining(limit, expected):
    assert padded_version(phi3(), limit, has_own_code=False) == expected


@pytest.mark.parametrize(("limit", "expected"), [(256, None), (257, VERSION), (None, VERSION)])
def test_dynamic_changed_beyond_its_positions(limit, expected):
    config = tiny_config("llama", rope_parameters=dict(DYNAMIC))
    assert padded_version(config, limit, has_own_code=False) == expected


def test_mpt_declares_its_positions_under_another_name():
    """Its ALiBi ends there: a longer sequence failed, and was isolated as poisoned."""
    assert num_positions(transformers.MptConfig(max_seq_len=40)) == 40


def test_positions_that_begin_behind_the_pad_token(tmp_path):
    """RoBERTa declares 514 positions for 512 tokens; a sequence of 513 ended in an index error."""
    assert num_positions(transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert num_positions(tiny_config("bert", max_position_embeddings=512)) == 512
    tiny_reward("roberta", pad_token_id=1, max_position_embeddings=130).save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    assert max_positions(str(tmp_path)) == context_length(str(tmp_path)) == 128
