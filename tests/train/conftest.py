"""The tiny policy and its pairs, made once."""

from __future__ import annotations

import pytest
import torch
from tiny_policy import TinyRun, make_tiny_run, make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_run(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    torch.set_num_threads(1)
    return make_tiny_run(tmp_path_factory.mktemp("tiny") / "policy", tokenizer)
