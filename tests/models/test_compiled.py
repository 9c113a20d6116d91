from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import random_groups, related_groups, tiny_causal

from prefsel.models.compiled import compile_layers
from prefsel.models.logps import packed_logps
from prefsel.models.packing import pack


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, with which torch compiles for CPUs")
@torch.inference_mode()
def test_compiled_layers_give_the_same_numbers_for_rows_of_any_length():
    model = tiny_causal(max_position_embeddings=512)
    groups = [*random_groups([3, 1, 2]), *related_groups()]
    expected = [packed_logps(model, row) for budget in (150, 10_000) for row in pack(groups, budget)]
    assert compile_layers(model) == 2
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = [packed_logps(model, row) for budget in (150, 10_000) for row in pack(groups, budget)]
    assert torch.allclose(torch.cat(got), torch.cat(expected), rtol=1e-5)
    # A few graphs for all rows, not some for every row.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8 < 2 * len(got)


def test_a_model_without_known_layers_stays_as_it_is():
    model = tiny_causal()
    model._no_split_modules = None
    assert compile_layers(model) == 0
