"""The written-out backward pass of attention over tries against autograd's, on the same forward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_groups, related_groups
from torch.utils._python_dispatch import TorchDispatchMode

from prefsel.models import attention
from prefsel.models.attention_gradient import BlockAttention
from prefsel.models.layout import build_layout
from prefsel.models.packing import pack

HEAD_DIM, SCALING = 8, 0.3


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("groups", [random_groups([2, 3, 1], longest=200), related_groups()], ids=["random", "related"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gradients_are_autograds(groups, num_heads, dtype, limit):
    (row,) = pack(groups, 10_000)
    layout = build_layout(row.segments, dtype=dtype, device=torch.device("cpu"), head_dim=HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_heads, row.trunk_tokens, HEAD_DIM), *[(2, row.trunk_tokens, HEAD_DIM)] * 2]
    rows = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    grad_THD = torch.randn(row.trunk_tokens, num_heads, HEAD_DIM, generator=generator).to(dtype)
    mine = BlockAttention.apply(*rows, layout, SCALING, attention._matmul)
    autograds = attention._matmul(*rows, layout, SCALING)
    assert torch.equal(mine, autograds)
    expected = torch.autograd.grad(autograds, rows, grad_THD)
    for got, want in zip(torch.autograd.grad(mine, rows, grad_THD), expected, strict=True):
        assert got.dtype == dtype
        assert torch.linalg.norm((got - want).double()) <= limit * torch.linalg.norm(want.double())


class WholeRows(TorchDispatchMode):
    """Counts the operations whose result is as long as the packed row."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.count = num_tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_made = isinstance(result, torch.Tensor) and not func.is_view
        self.count += is_made and self.num_tokens in result.shape
        return result


def test_the_backward_pass_makes_no_row_for_every_block():
    (row,) = pack(random_groups([2] * 12, longest=60), 10_000)
    layout = build_layout(row.segments, dtype=torch.float32, device=torch.device("cpu"), head_dim=HEAD_DIM)
    rows = [torch.randn(2, row.trunk_tokens, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def whole_rows(output_THD):
        with WholeRows(row.trunk_tokens) as made:
            output_THD.backward(torch.ones_like(output_THD))
        return made.count

    assert whole_rows(attention._matmul(*rows, layout, SCALING)) > sum(map(len, layout.blocks))
    assert whole_rows(BlockAttention.apply(*rows, layout, SCALING, attention._matmul)) <= 12
