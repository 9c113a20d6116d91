r"""Log-probs of given tokens from hidden states: the logits of a language model's head, never all at once.

To score, the head is called for some rows at a time. To train, a function of its own does what autograd would, without
keeping every row's log-softmax: with p = softmax(Wh) and \(L = \log p_y\),

    \(\partial L/\partial h = W_y - p W\)        \(\partial L/\partial W = (1_y - p) \otimes h\)

forward goes through the rows, as a log-sum-exp needs whole rows; backward through the vocabulary, as p follows from
that log-sum-exp: each slice of the weight's gradient is then written once, in one product over all rows.

Shapes: R response tokens, T tokens of a packed row, D hidden size, V vocabulary, S tokens of a slice of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from prefsel.models.architecture import unwrapped

LOGITS_BYTES = 400_000_000
"""Most memory for logits, with what is computed from them in fp32."""
CACHED_LOGITS_BYTES, CACHED_ROWS = 16_000_000, 128
"""On a CPU chunks of 16 MB, though at least 128 rows: with V = 8 000, 256 rows a chunk took 0.7 to 0.95 of the time of
1 024, whose fresh pages cost more than the product."""
KEPT_SHARE = 0.5
"""Logits up to this share of the memory are kept for the backward pass. Against one call under autograd, which holds
twice as much, keeping took 0.79, 0.85 and 0.94 of the time (R, D, V = 4 000, 256, 8 192; 1 500, 256, 8 192; 700, 512,
32 000), computing them again 0.96, 1.04 and 1.2."""
MIN_COLUMNS = 64


def head_logps(model: nn.Module, hidden_TD: Tensor, rows_R: Tensor, targets_R: Tensor, most_rows: int = 1024) -> Tensor:
    """Log-prob of each target token given the hidden row before it.

    Args:
        model: Whose head it is. With gradient a plain `nn.Linear` takes 0.4 GB at most; any other is called once for
            all rows: adapters, weights partitioned by ZeRO-3, modules with hooks.
        hidden_TD: Hidden states.
        rows_R: Which of them predict, int64.
        targets_R: What they predict, int64.
        most_rows: Rows whose logits exist at once without gradient; fewer where they would exceed 0.4 GB, or a CPU's
            caches.

    Returns:
        [R] nats, in fp32 (fp64 for an fp64 model); with gradient if enabled, once differentiable.
    """
    head = unwrapped(model).get_output_embeddings()
    if torch.is_grad_enabled() and hidden_TD.requires_grad and is_plain(head):
        hidden_RD = hidden_TD.index_select(0, rows_R)
        logps_R: Tensor = _Logps.apply(hidden_RD, head.weight, head.bias, targets_R)
        return logps_R
    chunk = chunk_rows(model, head, hidden_TD, most_rows)
    return torch.cat(
        [
            target_logps(head(hidden_TD.index_select(0, rows)), targets)
            for rows, targets in zip(rows_R.split(chunk), targets_R.split(chunk))
        ]
    )


def is_plain(head: nn.Module) -> bool:
    """Whether the head is its weight and bias and nothing else, so that products with slices of them can stand in."""
    is_watched = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and not is_watched and not _is_partitioned(head)


def _is_partitioned(head: nn.Module) -> bool:
    """Whether ZeRO-3 gathers the weights in every call, so that all workers must make equally many."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def target_logps(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Log-probs of the target tokens, [R], in fp32 (fp64 for fp64 logits).

    `log_softmax` reads and writes a chunk once on each side; `logsumexp` minus the target's logit took 2 to 4.6 times
    as long on a CPU.
    """
    logps_RV = logits_RV.log_softmax(dim=-1, dtype=_wide(logits_RV.dtype))
    return logps_RV.gather(1, targets_R[:, None])[:, 0]


def chunk_rows(model: nn.Module, head: nn.Module, hidden_TD: Tensor, most_rows: int = 1024) -> int:
    """Rows of a call of the head: all of them where it is partitioned, or autograd would keep all logits anyway."""
    if _is_partitioned(head) or (torch.is_grad_enabled() and hidden_TD.requires_grad):
        return max(1, len(hidden_TD))
    return min(most_rows, _fitting(unwrapped(model).config.vocab_size, hidden_TD, CACHED_ROWS))


def _fitting(length: int, like: Tensor, least: int, share: float = 1.0) -> int:
    """How many vectors of logits of that length fit into the share of the memory, with their image in fp32."""
    bytes_each = max(1, length) * (like.dtype.itemsize + _wide(like.dtype).itemsize)
    most = int(LOGITS_BYTES * share) // bytes_each
    if like.device.type == "cpu":
        most = min(most, max(least, CACHED_LOGITS_BYTES // bytes_each))
    return max(1, most)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Logps(torch.autograd.Function):
    """`target_logps` of a plain head. The weight is an argument, so its gradient arrives as from any other layer."""

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> Tensor:
        rows, vocab = len(hidden_RD), len(weight_VD)
        logps_R = hidden_RD.new_empty(rows, dtype=_wide(hidden_RD.dtype))
        log_sums_R = torch.empty_like(logps_R)
        is_kept = rows * vocab * hidden_RD.dtype.itemsize <= LOGITS_BYTES * KEPT_SHARE
        kept_RV = hidden_RD.new_empty(rows, vocab) if is_kept else None
        for start in range(0, rows, chunk := _fitting(vocab, hidden_RD, CACHED_ROWS, 1 - KEPT_SHARE)):
            part = slice(start, start + chunk)
            logits_CV = linear(hidden_RD[part], weight_VD, bias_V)
            if kept_RV is not None:
                kept_RV[part] = logits_CV
            logps_R[part] = target_logps(logits_CV, targets_R[part])
            log_sums_R[part] = logits_CV.gather(1, targets_R[part, None])[:, 0] - logps_R[part]
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, targets_R, log_sums_R, kept_RV)
        return logps_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden_RD, weight_VD, bias_V, targets_R, log_sums_R, kept_RV = ctx.saved_tensors
        rows, vocab, dtype = len(hidden_RD), len(weight_VD), hidden_RD.dtype
        # The factor of each row goes to the narrow side of a product; its sign, too.
        scaled_RD = (hidden_RD * -grad_R[:, None]).to(dtype)
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=_wide(dtype))
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        row_R = torch.arange(rows, device=hidden_RD.device)
        for start in range(0, vocab, step := _fitting(rows, hidden_RD, MIN_COLUMNS, 1 - KEPT_SHARE)):
            part = slice(start, min(start + step, vocab))
            bias_S = None if bias_V is None else bias_V[part]
            logits_RS = linear(hidden_RD, weight_VD[part], bias_S) if kept_RV is None else kept_RV[:, part]
            excess_RS = (logits_RS - log_sums_R[:, None]).exp_()
            # p − 1 is taken before rounding to 16 bits, which would leave nothing of it where p is nearly 1.
            is_here_R = (targets_R >= part.start) & (targets_R < part.stop)
            column_R = (targets_R - part.start).clamp(0, part.stop - part.start - 1)
            excess_RS[row_R, column_R] -= is_here_R.to(excess_RS.dtype)
            if grad_bias_V is not None:
                grad_bias_V[part] = -(grad_R @ excess_RS)
            excess_RS = excess_RS.to(dtype)
            grad_hidden_RD += excess_RS @ weight_VD[part]
            if grad_weight_VD is not None:
                torch.mm(excess_RS.T, scaled_RD, out=grad_weight_VD[part])
        grad_hidden_RD *= -grad_R[:, None]
        return grad_hidden_RD.to(dtype), grad_weight_VD, grad_bias_V, None
