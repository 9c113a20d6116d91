r"""The backward pass of the matrix products over tries, written out block by block.

With P the weights of a block, O = P V its output and G the gradient of O,

    \(dV = P^T G\)     \(dS = P \circ (G V^T - \mathrm{rowsum}(P \circ G V^T))\)     \(dQ = dS K\)     \(dK = dS^T Q\)

are added where the block's rows lie. Autograd makes zeros as long as the whole row for every slice that a block took of
it, which grows with the square of the row: a step on 8 pairs took 1.14 (UltraFeedback) and 1.1 (HH) times the CPU time.

Shapes: T tokens of the row, M queries of a key head in a block, N keys of a segment, H query heads, K key heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefsel.models.layout import Layout, ranges_of, with_context

Forward = Callable[[Tensor, Tensor, Tensor, Layout, float, list[Tensor]], Tensor]
"""(queries, keys, values, layout, scaling, a list that receives every block's weights) → output, [T, H, D]."""


class BlockAttention(torch.autograd.Function):
    """Attention whose forward pass keeps the weights of its blocks; once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        layout: Layout,
        scaling: float,
        forward: Forward,
    ) -> Tensor:
        """Output, [T, H, D], of queries [H, T, D] and keys and values [K, T, D]."""
        weights: list[Tensor] = []
        output_THD = forward(query_HTD, key_KTD, value_KTD, layout, scaling, weights)
        ctx.layout, ctx.scaling = layout, scaling
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD, *weights)
        return output_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query_HTD, key_KTD, value_KTD, *weights = ctx.saved_tensors
        num_key_heads, num_tokens, head_dim = key_KTD.shape
        query_KGTD, grad_KGTD = (
            rows.reshape(num_key_heads, -1, num_tokens, head_dim) for rows in (query_HTD, grad_THD.transpose(0, 1))
        )
        # A prompt's keys gather what all its responses add: in fp32.
        wide = torch.promote_types(key_KTD.dtype, torch.float32)
        grad_query_KGTD = torch.empty_like(query_KGTD, memory_format=torch.contiguous_format)
        grad_key_KTD, grad_value_KTD = (torch.zeros_like(key_KTD, dtype=wide) for _ in "kv")
        kept = iter(weights)
        for blocks in ctx.layout.blocks:
            keys_KND, values_KND = (with_context(rows, blocks[-1]) for rows in (key_KTD, value_KTD))
            added_key_KND, added_value_KND = (torch.zeros_like(keys_KND, dtype=wide) for _ in "kv")
            for block in blocks:
                weights_KMN, seen, rows = next(kept), slice(block.num_keys), slice(block.start, block.end)
                query_KMD, grad_KMD = (
                    part[:, :, rows].reshape(num_key_heads, -1, head_dim) for part in (query_KGTD, grad_KGTD)
                )
                scores_KMN = grad_KMD @ values_KND[:, seen].transpose(1, 2)
                scores_KMN = torch._softmax_backward_data(scores_KMN.to(wide), weights_KMN.to(wide), -1, wide)
                scores_KMN = scores_KMN.to(key_KTD.dtype)
                _add_product(added_value_KND[:, seen], weights_KMN.transpose(1, 2), grad_KMD)
                _add_product(added_key_KND[:, seen], scores_KMN.transpose(1, 2), query_KMD)
                grad_query_KMD = scores_KMN @ keys_KND[:, seen]
                grad_query_KGTD[:, :, rows] = grad_query_KMD.view(num_key_heads, -1, block.end - block.start, head_dim)
            first = 0
            for start, end in ranges_of(blocks[-1]):
                part = slice(first, first + end - start)
                grad_key_KTD[:, start:end] += added_key_KND[:, part]
                grad_value_KTD[:, start:end] += added_value_KND[:, part]
                first = part.stop
        grad_query_HTD = grad_query_KGTD.mul_(ctx.scaling).view(query_HTD.shape)
        grad_key_KTD *= ctx.scaling
        return grad_query_HTD, grad_key_KTD.to(key_KTD.dtype), grad_value_KTD.to(value_KTD.dtype), None, None, None


def _add_product(sum_KND: Tensor, left_KNM: Tensor, right_KMD: Tensor) -> None:
    """sum += left @ right, in the dtype of the sum."""
    if sum_KND.dtype == left_KNM.dtype:
        torch.baddbmm(sum_KND, left_KNM, right_KMD, out=sum_KND)  # torch's FLOP counter does not know baddbmm_
    else:
        sum_KND += left_KNM @ right_KMD
