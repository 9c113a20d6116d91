"""What a device can do: the longest row its memory holds, and the matrix products it makes in a second."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import Route

CPU_TOKEN_BUDGET = 8192
MAX_TOKEN_BUDGET = 65536
PROBE_TOKENS = (4096, 8192)
MATMUL_SIZE = {"cuda": 8192, "cpu": 768}
"""Rows and columns of the product: large enough for a GPU to reach its peak (1.1 TFLOP), small enough for a slow core
to make several in the time there is (0.9 GFLOP)."""


def calibrate_budget(route: Route, device: torch.device) -> int:
    """Tokens of a row that use a device well: 8 192 on a CPU; on a GPU what its free memory holds, at most 65 536.

    Two probes with made-up tokens give the bytes per token. They grow linearly: the weights are there already,
    attention keeps no square and gathers a bounded number of keys a token, and the head works in chunks.
    """
    if device.type != "cuda":
        return CPU_TOKEN_BUDGET
    free_bytes, _ = torch.cuda.mem_get_info(device)
    peaks = [_peak_bytes(route, device, num_tokens) for num_tokens in PROBE_TOKENS]
    return budget_from_probes(PROBE_TOKENS, peaks, free_bytes)


def budget_from_probes(num_tokens: tuple[int, int], peak_bytes: Sequence[int], free_bytes: int) -> int:
    """The row, in multiples of 1 024 tokens, whose linearly extrapolated peak is 0.75 of the free memory."""
    slope = max(1.0, (peak_bytes[1] - peak_bytes[0]) / (num_tokens[1] - num_tokens[0]))
    tokens = num_tokens[0] + (0.75 * free_bytes - peak_bytes[0]) / slope
    return int(min(MAX_TOKEN_BUDGET, max(1024, tokens)) // 1024 * 1024)


def _peak_bytes(route: Route, device: torch.device, num_tokens: int) -> int:
    """Memory that a row of prompts and responses of 256 tokens takes beyond what is allocated."""
    group = probe_group(num_tokens)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with route.context():
        for row in route.rows([group], num_tokens):
            route.forward(row.to(device))
    return torch.cuda.max_memory_allocated(device) - before


def probe_group(num_tokens: int) -> EncodedGroup:
    """A prompt and responses of 256 tokens, together so many; each begins with another, so that none are shared."""
    responses = [[number] + [1] * 255 for number in range(num_tokens // 256 - 1)]
    return EncodedGroup([1] * 256, responses, ["ok"] * len(responses), 0)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.25) -> float:
    """The fastest of some square matrix products: what a model's useful work is held against.

    Args:
        device: Where; a CPU with as many threads as torch has now.
        dtype: Of the factors.
        seconds: How long to try; three products at least, the first of which does not count.
    """
    size = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    # Random numbers: a GPU multiplies constants with less power, and so faster, than anything real.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    ends = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < ends:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(taken[1:])
