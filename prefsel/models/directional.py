r"""What log-probs do along a direction of the weights: exactly, by forward-mode derivatives, or by a difference.

    groups, v ─ directional_logps ─► \(D_v \log\pi(y)\) per completion

Values and derivatives go through the model together, in one pass over packed rows; nothing is kept for a backward
pass, so memory does not grow with the number of layers.

Shapes: R response tokens, C completions, S directions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefsel.errors import UserError, invalid
from prefsel.models.architecture import in_evaluation_mode, unwrapped
from prefsel.models.chat import Encoder, Truncation
from prefsel.models.head import chunk_rows
from prefsel.models.loading import check_vocabulary
from prefsel.models.logps import Route, logps_route, packed_hidden, packed_logps, routed
from prefsel.models.packing import PackedBatch
from prefsel.models.padded import PaddedBatch, padded_logps
from prefsel.models.tangent import Direction, Directions, check_direction, norm

Logps = list[list[float | None]]


def directional_logps(
    model: nn.Module,
    tokenizer: Any,
    groups: Any,
    tangent: Direction | Directions,
    *,
    token_budget: int = 8192,
    template: str = "auto",
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> dict[str, list[Any]]:
    r"""The derivative of every completion's log-probability along a direction of the weights, exactly.

    \(D_v \log\pi(y \mid x) = \langle\nabla_\theta \log\pi(y \mid x), v\rangle\) comes from one pass of forward-mode
    derivatives per direction, about three forwards each; no gradient is ever stored. By the chain rule it gives the
    influence of every pair: \(-\beta\,\sigma(-IRM)\,(D_v\log\pi(y_w) - D_v\log\pi(y_l))\), the metric `influence`.

    Args:
        model: A causal language model of transformers; one in training is scored without dropout.
        tokenizer: Its tokenizer.
        groups: As `score_groups` takes them: dictionaries or any table, with `prompt` and `completions`.
        tangent: The direction v, parameter name to a tensor of the parameter's shape (fp32 or fp64; parameters that are
            not named do not move), or several directions by name.
        token_budget: Most tokens of one packed row.
        template: As `score_groups` takes it.
        max_length: Most tokens of prompt and response together; None: no limit.
        truncation: As `score_groups` takes it: `drop`, `right` or `left`.

    Returns:
        The columns of `score_groups`, and `dlogps`, nats per unit of v, a list over the completions of each group; of
        several directions one column `dlogps_<name>` each. None where `status` is not "ok".

    Raises:
        UserError: The groups lack a column, or template, tokenizer, arguments or direction do not fit the model.
        NonFiniteError: The model or the direction gave NaN or infinity.

    Source: the influence of a pair as in "Towards Understanding Valuable Preference Data for LLM Alignment", with the
    identity as Hessian; directional derivatives by forward-mode differentiation with dual numbers.
    """
    check_vocabulary(tokenizer, model)
    directions, names = _named(tangent)
    encoder = Encoder(tokenizer, template, max_length, truncation)
    with in_evaluation_mode(model):
        route = directional_route(model, directions, pad_token_id=getattr(tokenizer, "pad_token_id", None))
        columns, values = routed(model, encoder, groups, route, token_budget)
    return columns | {name: column(values, number) for number, name in enumerate(["logps", *names])}


def finite_difference_logps(
    model: nn.Module,
    tokenizer: Any,
    groups: Any,
    tangent: Direction | Directions,
    *,
    step: float = 3e-5,
    logps: Logps | None = None,
    token_budget: int = 8192,
    template: str = "auto",
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> dict[str, list[Any]]:
    r"""What `directional_logps` gives, approximately: \((\log\pi_{\theta+\epsilon v} - \log\pi_\theta) / \epsilon\).

    Args:
        model: As `directional_logps`; fp32 or fp64.
        tokenizer: As `directional_logps`.
        groups: As `directional_logps`.
        tangent: As `directional_logps`.
        step: ε is `step` times the norm of the weights over that of v.
        logps: What `score_groups` gave for these groups and this very model, in the same dtype: then one forward per
            direction is all; None: one more.
        token_budget: As `directional_logps`.
        template: As `directional_logps`.
        max_length: As `directional_logps`.
        truncation: As `directional_logps`.

    Returns:
        As `directional_logps`. The error is the caller's to measure, see `largest_error`.

    Raises:
        UserError: As `directional_logps`, or the model is in 16 bits.
        NonFiniteError: As `directional_logps`.
    """
    check_vocabulary(tokenizer, model)
    directions, names = _named(tangent)
    encoder, pad_token_id = (
        Encoder(tokenizer, template, max_length, truncation),
        getattr(tokenizer, "pad_token_id", None),
    )
    with in_evaluation_mode(model):
        route, epsilons = finite_difference_route(
            model, directions, step=step, pad_token_id=pad_token_id, has_logps=logps is not None
        )
        columns, values = routed(model, encoder, groups, route, token_budget)
    base, derivatives = differences(values, epsilons, logps)
    return columns | {"logps": base} | dict(zip(names, derivatives))


def directional_route(model: nn.Module, directions: Directions, *, pad_token_id: int | None = None) -> Route:
    """The route whose numbers are, per completion, its log-prob and its derivative along each direction, [C, 1 + S].

    One pass of dual numbers per direction, about three forwards. Vectorising over directions (`torch.func.vmap`) was
    measured to save nothing: it batches the values, too, so four directions took 12.9 forwards of a model of width 256.

    Raises:
        UserError, NonFiniteError: A direction does not fit the model, see `check_direction`.
    """
    base = logps_route(model, pad_token_id)
    duals = _Placed(model, _packed_dual_logps if base.is_packed else _padded_dual_logps)
    placed = [_scaled(model, name, direction) for name, direction in directions.items()]
    return replace(
        base,
        forward=partial(_jvp, duals, placed),
        # Derivatives are made in the forward pass, so that autograd has nothing to keep.
        context=torch.no_grad,
        num_forwards=3.0 * len(placed),
    )


class _Placed(nn.Module):
    """A function of a model and a batch as a module, so that `functional_call` can put other weights in."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: PackedBatch | PaddedBatch) -> Tensor:
        return self.function(self.model, batch)

    def at(self, weights: Direction, batch: PackedBatch | PaddedBatch) -> Tensor:
        """The function where the named weights have these values; tied ones together."""
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        result: Tensor = functional_call(self, named, (batch,))
        return result


def _jvp(duals: _Placed, placed: Sequence[tuple[dict[str, Tensor], float]], batch: PackedBatch | PaddedBatch) -> Tensor:
    """[C, 1 + S]: values, then derivatives along every direction."""
    weights = {name: parameter.detach() for name, parameter in duals.model.named_parameters()}
    columns: list[Tensor] = []
    for direction, scale in placed:
        # What `torch.func.jvp` does, without its wrappers, whose dispatch took a tenth of the time and more.
        with forward_ad.dual_level():
            moved = {name: forward_ad.make_dual(weights[name], tensor) for name, tensor in direction.items()}
            logps_C, dlogps_C = forward_ad.unpack_dual(duals.at(moved, batch))
        columns = columns or [logps_C]
        columns.append(torch.zeros_like(logps_C) if dlogps_C is None else dlogps_C * scale)
    return torch.stack(columns, dim=1)


def _scaled(model: nn.Module, name: str, direction: Direction) -> tuple[dict[str, Tensor], float]:
    """The direction where the weights are and in their dtype, divided by a power of two, and that power.

    Gradients reach down to where half precision ends; a power of two changes no digit.
    """
    check_direction(model, name, direction)
    largest = max(float(tensor.abs().max()) for tensor in direction.values() if tensor.numel())
    scale = 2.0 ** math.floor(math.log2(largest))
    parameters = dict(model.named_parameters())
    return {
        key: (tensor / scale).to(parameters[key].device, parameters[key].dtype) for key, tensor in direction.items()
    }, scale


def _packed_dual_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    r"""`packed_logps` of a model whose weights are dual numbers, as dual numbers, [C] float64.

    The trunk's derivative is automatic. The head's is written out: with p = softmax(Wh),

    \(D \log p_y = \dot h \cdot (W_y - p W) + h \cdot (\dot W_y - p \dot W)\)

    needs no derivative of the logits, so each chunk of them is read twice and written once.
    """
    head = unwrapped(model).get_output_embeddings()
    if type(head) is not nn.Linear:  # an adapter, say: then the derivative of the logits is made
        return packed_logps(model, batch, kernel="matmul")
    hidden_TD = packed_hidden(model, batch, kernel="matmul")
    rows_R, targets_R = batch.rows_R.to(hidden_TD.device), batch.targets_R.to(hidden_TD.device)
    chunk = chunk_rows(model, head, hidden_TD)
    values_R, dots_R = (
        torch.cat(parts)
        for parts in zip(
            *(
                _head_parts(head, hidden_TD.index_select(0, rows), targets)
                for rows, targets in zip(rows_R.split(chunk), targets_R.split(chunk))
            )
        )
    )
    return forward_ad.make_dual(batch.sums(values_R), batch.sums(dots_R))


def _head_parts(head: nn.Linear, hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and their derivatives, [R] each; see `_packed_dual_logps`."""
    hidden_RD, hidden_dot_RD = forward_ad.unpack_dual(hidden_RD)
    weight_VD, weight_dot_VD = forward_ad.unpack_dual(head.weight)
    bias_V, bias_dot_V = (None, None) if head.bias is None else forward_ad.unpack_dual(head.bias)
    logits_RV = nn.functional.linear(hidden_RD, weight_VD, bias_V)
    logps_RV = logits_RV.log_softmax(dim=-1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
    logps_R = logps_RV.gather(1, targets_R[:, None])[:, 0]
    probs_RV = logps_RV.exp_().to(weight_VD.dtype)
    dots_R = torch.zeros_like(logps_R)
    if hidden_dot_RD is not None:
        dots_R += ((weight_VD.index_select(0, targets_R) - probs_RV @ weight_VD) * hidden_dot_RD).sum(-1)
    if weight_dot_VD is not None:
        dots_R += ((weight_dot_VD.index_select(0, targets_R) - probs_RV @ weight_dot_VD) * hidden_RD).sum(-1)
    if bias_dot_V is not None:
        dots_R += bias_dot_V.index_select(0, targets_R) - probs_RV @ bias_dot_V
    return logps_R, dots_R


def _padded_dual_logps(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """`padded_logps` with the attention that has a forward derivative: fused kernels have none."""
    with sdpa_kernel(SDPBackend.MATH):
        return padded_logps(model, batch)


def finite_difference_route(
    model: nn.Module, directions: Directions, *, step: float, pad_token_id: int | None = None, has_logps: bool = False
) -> tuple[Route, list[float]]:
    r"""The route whose numbers are log-probs at θ, unless they are at hand, and at \(\theta + \epsilon v\) of each
    direction, [C, 1 + S] or [C, S]; and the steps ε, [S].

    The model keeps its weights: the shifted ones are a copy per direction, put in for the call.

    Raises:
        UserError: A direction does not fit the model, it is in 16 bits, or the step is not above 0.
        NonFiniteError: A direction holds NaN or infinity.
    """
    if step <= 0:
        raise invalid("step", step, "a number above 0")
    if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.float64):
        raise invalid("dtype", str(dtype), "fp32 for finite differences, which half precision would drown")
    base = logps_route(model, pad_token_id)
    parameters = dict(model.named_parameters())
    shifted: list[dict[str, Tensor]] = [] if has_logps else [{}]
    epsilons = []
    for name, direction in directions.items():
        check_direction(model, name, direction)
        epsilon = step * norm({key: parameters[key].detach() for key in direction}) / norm(direction)
        epsilons.append(epsilon)
        shifted.append(
            {
                key: torch.add(parameters[key].detach().double(), tensor.to(parameters[key].device), alpha=epsilon).to(
                    parameters[key].dtype
                )
                for key, tensor in direction.items()
            }
        )
    placed = _Placed(model, packed_logps if base.is_packed else padded_logps)

    def forward(batch: PackedBatch | PaddedBatch) -> Tensor:
        return torch.stack([placed.at(weights, batch) for weights in shifted], dim=1)

    return replace(base, forward=forward, num_forwards=float(len(shifted))), epsilons


def differences(
    values: Sequence[Sequence[Sequence[float] | None]], epsilons: Sequence[float], logps: Logps | None = None
) -> tuple[Logps, list[Logps]]:
    """The numbers of a `finite_difference_route` as log-probs at θ and, per direction, quotients.

    Raises:
        UserError: `logps` lack a completion that has values.
    """
    first = int(logps is None)
    if logps is None:
        logps = column(values, 0)
    shapes = [[[v is None for v in row] for row in table] for table in (values, logps)]
    if shapes[0] != shapes[1]:
        raise UserError("logps: they do not belong to these groups: other completions are null")
    quotients = [
        [
            [None if v is None or lp is None else (v[first + number] - lp) / epsilon for v, lp in zip(row, base)]
            for row, base in zip(values, logps)
        ]
        for number, epsilon in enumerate(epsilons)
    ]
    return logps, quotients


def largest_error(approximate: Logps, exact: Logps) -> float | None:
    """max|Δ| / max|exact| over the completions that have both; None without any."""
    pairs = [
        (a, e) for row, other in zip(approximate, exact) for a, e in zip(row, other) if a is not None and e is not None
    ]
    largest = max((abs(e) for _, e in pairs), default=0.0)
    return max(abs(a - e) for a, e in pairs) / largest if largest else None


def column(values: Sequence[Sequence[Sequence[float] | None]], number: int) -> Logps:
    """One of a route's numbers for every group and completion."""
    return [[None if v is None else v[number] for v in row] for row in values]


def _named(tangent: Direction | Directions) -> tuple[Directions, list[str]]:
    """Directions by name, and what their columns are called.

    Raises:
        UserError: There is none.
    """
    if not tangent:
        raise UserError("tangent: got no direction; valid: at least 1")
    if all(isinstance(value, Tensor) for value in tangent.values()):
        return {"v": tangent}, ["dlogps"]
    return tangent, [f"dlogps_{name}" for name in tangent]
