"""Fixtures of the tests of models: see `tiny_models`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import bpe_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A chat tokenizer with its own template, no bos."""
    return bpe_tokenizer()
