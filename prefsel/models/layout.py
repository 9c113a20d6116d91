"""How the segments of a packed row attend: blocks of queries with the keys that they see, built once for all layers.

Shapes: T tokens of the row, N keys of a segment, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefsel.models.trie import Range, Segment

BLOCK_QUERIES = 64
"""Queries of one matmul–softmax–matmul. On one core 64 was as fast as 128, 256 and torch's fused kernel, or
faster, from 4 heads of 16 to 14 of 64, and its excess over the causal triangle is the smallest: 32 scores a query."""

KEYS_PER_TOKEN = 4
"""Keys and values that one call of the variable-length kernel gathers: of a prompt with four responses there are two to
four a token."""

Kernel = Literal["auto", "matmul", "varlen"]


@dataclass(frozen=True)
class Block:
    """Queries [start, end) of the row attend to `keys`: the last of them causally, the others in full."""

    start: int
    end: int
    context: tuple[Range, ...]
    """The rows of the segment's ancestors."""
    own: int
    """The row where the block's own segment begins."""
    num_keys: int
    """Rows of the context and of the own part up to the last query."""


@dataclass(frozen=True)
class Layout:
    """How one packed row attends; built once per row, used by every layer."""

    blocks: tuple[tuple[Block, ...], ...]
    """Per segment, in row order: its blocks."""
    causal: Tensor
    """[B, B] of 0 and −inf: the diagonal corner of a block."""
    varlen: tuple[VarlenLayout, ...] | None
    """For the variable-length kernel, one call each; None: matrix products."""


@dataclass(frozen=True)
class VarlenLayout:
    """Consecutive segments as sequences of the variable-length kernel, their keys gathered with their ancestors'."""

    queries: Range
    key_rows: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def blocks_of(segments: Sequence[Segment]) -> Iterator[tuple[Block, ...]]:
    """The blocks of every segment."""
    for segment in segments:
        before = sum(end - start for start, end in segment.context) - segment.start
        starts = range(segment.start, segment.end, BLOCK_QUERIES)
        ends = [min(start + BLOCK_QUERIES, segment.end) for start in starts]
        yield tuple(Block(start, end, segment.context, segment.start, before + end) for start, end in zip(starts, ends))


def attention_area(segments: Sequence[Segment]) -> int:
    """Query-key products per head that the matrix products compute for a row."""
    return sum((block.end - block.start) * block.num_keys for blocks in blocks_of(segments) for block in blocks)


def build_layout(
    segments: tuple[Segment, ...], *, dtype: torch.dtype, device: torch.device, head_dim: int, kernel: Kernel = "auto"
) -> Layout:
    """Prepare the attention of one row.

    Args:
        segments: Where prompts and responses lie.
        dtype: Of queries and keys.
        device: Where they are.
        head_dim: D; the variable-length kernel takes multiples of 8 up to 256.
        kernel: `auto` takes the variable-length kernel where it serves this dtype and device, else matrix products;
            `matmul` is what forward-mode derivatives need (fused kernels have none).
    """
    blocks = tuple(blocks_of(segments))
    varlen = None
    if kernel == "varlen" or (kernel == "auto" and has_varlen(dtype, device, head_dim)):
        varlen = tuple(varlen_layouts(blocks, device))
    corner = torch.full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf"), dtype=dtype, device=device).triu(1)
    return Layout(blocks=blocks, causal=corner, varlen=varlen)


def has_varlen(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether torch's variable-length kernel serves these tensors (half precision on Ampere or newer)."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and varlen_kernel() is not None


def varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's variable-length attention; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_layouts(blocks: tuple[tuple[Block, ...], ...], device: torch.device) -> Iterator[VarlenLayout]:
    """Calls of whole segments, each of at most `KEYS_PER_TOKEN` gathered keys for a token of the row where it can be.

    A beginning that many segments share is gathered for each of them: 256 groups under a prompt of 2 000 tokens have 35
    keys a token of the row.
    """
    most = KEYS_PER_TOKEN * sum(piece[-1].end - piece[-1].own for piece in blocks)
    first, keys = 0, 0
    for number, piece in enumerate(blocks):
        if keys and keys + piece[-1].num_keys > most:
            yield _varlen_layout(blocks[first:number], device)
            first, keys = number, 0
        keys += piece[-1].num_keys
    if blocks[first:]:
        yield _varlen_layout(blocks[first:], device)


def _varlen_layout(blocks: tuple[tuple[Block, ...], ...], device: torch.device) -> VarlenLayout:
    last = [piece[-1] for piece in blocks]
    ranges = [bounds for block in last for bounds in (*block.context, (block.own, block.end))]
    rows = np.concatenate([np.arange(start, end) for start, end in ranges])
    num_queries, num_keys = [block.end - block.own for block in last], [block.num_keys for block in last]
    cu_queries, cu_keys = (
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32) for lengths in (num_queries, num_keys)
    )
    queries = (last[0].own, last[-1].end)
    return VarlenLayout(
        queries, torch.from_numpy(rows).to(device), cu_queries, cu_keys, max(num_queries), max(num_keys)
    )


def ranges_of(last: Block) -> list[Range]:
    """Where the keys of a segment lie up to the end of its last block: its ancestors, then the segment itself."""
    ranges = [*last.context, (last.own, last.end)]
    if len(ranges) > 1 and ranges[-2][1] == last.own:  # the first child follows its parent
        ranges[-2:] = [(ranges[-2][0], last.end)]
    return ranges


def with_context(rows_KTD: Tensor, last: Block) -> Tensor:
    """The rows of `ranges_of`."""
    ranges = ranges_of(last)
    if len(ranges) == 1:
        return rows_KTD[:, slice(*ranges[0])]  # nothing to copy
    return torch.cat([rows_KTD[:, start:end] for start, end in ranges], dim=1)
