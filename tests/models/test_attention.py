from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_causal
from torch.nn.functional import scaled_dot_product_attention

from prefsel.models.attention import prompt_tree_attention
from prefsel.models.layout import BLOCK_QUERIES, attention_area, blocks_of, build_layout, has_varlen, varlen_layouts
from prefsel.models.trie import Segment

PARENTS = {(0, 70): None, (70, 71): 0, (71, 201): 0, (201, 202): None, (202, 266): 3, (266, 271): 3, (271, 280): 5}
"""Rows of each run → the run it continues: prompts of 70 and 1, and a third level under the last run but one."""
NUM_TOKENS = 280


def runs():
    bounds, found = list(PARENTS), []
    for (start, end), parent in PARENTS.items():
        context = () if parent is None else (*found[parent].context, bounds[parent])
        found.append(Segment(start, end, context))
    return tuple(found)


RUNS = runs()


def allowed():
    """[T, T]: who sees whom, written down token by token."""
    parents = list(PARENTS.values())
    owner = [number for number, (start, end) in enumerate(PARENTS) for _ in range(start, end)]
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for query in range(NUM_TOKENS):
        lineage, number = set(), owner[query]
        while number is not None:
            lineage.add(number)
            number = parents[number]
        for key in range(query + 1):
            mask[query, key] = owner[key] in lineage
    return mask


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_equals_masked_attention(num_heads, num_key_heads):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, NUM_TOKENS, 8, generator=generator) for heads in (num_heads, num_key_heads, num_key_heads)
    )
    layout = build_layout(RUNS, dtype=query.dtype, device=query.device, head_dim=8)
    assert layout.varlen is None
    output, weights = prompt_tree_attention(None, query, key, value, None, scaling=0.3, layout=layout)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=allowed(), scale=0.3, enable_gqa=True)
    assert weights is None
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("keys_per_token", [4, 2, 0.01])
def test_the_kernel_layouts_name_the_same_keys(keys_per_token, monkeypatch):
    """The variable-length kernel needs a GPU; what it is told does not."""
    monkeypatch.setattr("prefsel.models.layout.KEYS_PER_TOKEN", keys_per_token)
    layouts = list(varlen_layouts(tuple(blocks_of(RUNS)), torch.device("cpu")))
    assert len(layouts) == {4: 1, 2: 1, 0.01: len(RUNS)}[keys_per_token]
    mask, done = allowed(), 0
    for layout in layouts:
        assert layout.queries[0] == done
        first_query, first_key = layout.cu_queries.tolist(), layout.cu_keys.tolist()
        for sequence in range(len(first_query) - 1):
            queries = range(*(layout.queries[0] + row for row in first_query[sequence : sequence + 2]))
            keys = layout.key_rows[first_key[sequence] : first_key[sequence + 1]].tolist()
            for number, query in enumerate(queries):
                # Causal from the end: the last query sees all keys, the one before it one less.
                seen = keys[: len(keys) - (len(queries) - 1 - number)]
                assert sorted(seen) == mask[query].nonzero().flatten().tolist()
            done = queries[-1] + 1
        assert layout.cu_keys.dtype == torch.int32
    assert done == layouts[-1].queries[1] == NUM_TOKENS
    assert max(layout.max_queries for layout in layouts) == 130
    assert max(layout.max_keys for layout in layouts) == 200


def test_area_is_the_causal_triangle_and_at_most_half_a_block_per_query():
    exact = int(allowed().sum())
    assert exact <= attention_area(RUNS) <= exact + NUM_TOKENS * BLOCK_QUERIES / 2


def test_no_variable_length_kernel_on_a_cpu_or_in_fp32():
    assert not has_varlen(torch.bfloat16, torch.device("cpu"), 64)
    assert not has_varlen(torch.float32, torch.device("cuda"), 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@pytest.mark.parametrize("num_key_heads", [8, 2])
def test_the_kernel_equals_matrix_products(num_key_heads):
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(1, heads, NUM_TOKENS, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (8, num_key_heads, num_key_heads)
    ]
    options = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "head_dim": 64}
    outputs = {}
    for kernel in ("varlen", "matmul"):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        layout = build_layout(RUNS, **options, kernel=kernel)
        output, _ = prompt_tree_attention(None, *inputs, None, layout=layout)
        output.float().square().sum().backward()
        outputs[kernel] = [output, *(tensor.grad for tensor in inputs)]
    for got, expected in zip(*outputs.values()):
        assert torch.linalg.norm((got - expected).float()) <= 0.02 * torch.linalg.norm(expected.float())


@torch.no_grad()
def test_ordinary_calls_stay_ordinary():
    from prefsel.models.attention import IMPLEMENTATION

    model = tiny_causal()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    model.set_attn_implementation(IMPLEMENTATION)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), generated)
