r"""Tangents: directions in the space of a model's weights, and what a model's numbers do along them.

    validation pairs ─ validation_gradient ─► mean gradient per stratum ─ precondition ─► tangent v
    groups, v ─ directional_logps ─► \(D_v \log\pi(y)\) per completion        pairs, v ─ PairFeatures ─► LESS

By the chain rule the influence of a pair, \(\langle\nabla\ell, v\rangle\), is
\(-\beta\,\sigma(-IRM)\,(D_v\log\pi(y_w) - D_v\log\pi(y_l))\), so one number per completion serves every pair and no
gradient of a pair is ever made or stored. The exact number takes one pass of forward-mode derivatives: values and
derivatives go through the model together, nothing is kept for a backward pass.

Shapes: N pairs, R response tokens, C completions, S directions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.models.chat import EncodedGroup, Encoder, Truncation
from prefsel.models.loading import supports_packing, unwrapped
from prefsel.models.logps import Route, chunk_rows, logps_route, model_device, packed_hidden, packed_logps, routed
from prefsel.models.padded import PaddedBatch, pad, padded_logps
from prefsel.models.tree import PackedBatch, pack

Direction = Mapping[str, Tensor]
"""Parameter name → tensor of its shape, fp32 or fp64; a parameter that is not named does not move. Tied weights are
one parameter."""
Directions = Mapping[str, Direction]

MANIFEST = "tangent.json"
ALL = "all"
"""The stratum of validation pairs that are not divided."""

Logps = list[list[float | None]]


# ---------------------------------------------------------------------------------------------------- directions


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that gradients are taken with respect to: all that require one, tied ones once.

    Raises:
        UserError: No weight does.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError("this model has no weight that requires a gradient, so it has no tangent")
    return found


def norm(direction: Direction) -> float:
    """Euclidean norm over all weights, summed in fp64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in direction.values()))


def check_direction(model: nn.Module, name: str, direction: Direction) -> None:
    """Refuse a direction that is none of this model.

    Raises:
        UserError: It is empty or zero, or names a weight that the model lacks or has in another shape.
        NonFiniteError: It holds NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    if unknown := [key for key in direction if key not in parameters]:
        raise UserError(f"tangent {name}: the model has no weights {unknown[:3]} ({len(unknown)} unknown)")
    for key, tensor in direction.items():
        if tensor.shape != parameters[key].shape:
            raise UserError(
                f"tangent {name}: {key} has the shape {list(tensor.shape)}, in the model {list(parameters[key].shape)}"
            )
    length = norm(direction)
    if not math.isfinite(length):
        bad = [key for key, tensor in direction.items() if not torch.isfinite(tensor).all()]
        raise NonFiniteError(f"tangent {name}: NaN or infinity in {bad[:3]} ({len(bad)} weights)")
    if length == 0:
        raise UserError(f"tangent {name}: got norm 0; valid: a direction that moves some weight")


@dataclass(frozen=True)
class Tangents:
    """What a folder of tangents holds."""

    directions: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]
    """What was stored with them: beta, numbers of pairs, …"""


def save_tangent(folder: Path, directions: Directions, facts: Mapping[str, Any]) -> None:
    """Write one safetensors file per direction, and `tangent.json` with their names and norms and the facts.

    Files are numbered because a stratum may be called anything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (name, direction) in enumerate(directions.items()):
        file = f"direction-{number:05d}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in direction.items()}, folder / file)
        listed.append({"name": name, "file": file, "norm": norm(direction)})
    manifest = {"directions": listed, "facts": dict(facts)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load_tangents(folder: Path) -> Tangents:
    """Read what `save_tangent` wrote, in its order.

    Raises:
        UserError: The folder lacks something, or something in it cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        directions = {entry["name"]: load_file(folder / entry["file"]) for entry in manifest["directions"]}
        facts = manifest["facts"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"tangent {folder}: cannot be read: {error!r}") from error
    if not directions:
        raise UserError(f"tangent {folder}: {MANIFEST} names no direction; valid: at least 1")
    return Tangents(directions, facts)


def precondition(gradient: Direction, second_moment: Direction, damping: float) -> dict[str, Tensor]:
    """The direction `g / (sqrt(s) + damping)`, elementwise, in the gradient's dtype.

    Args:
        gradient: g.
        second_moment: s of the same weights, not negative: Adam's `exp_avg_sq`, or `fisher_diagonal`.
        damping: Above 0; OPEN, see `config.Tangent`.

    Raises:
        UserError: The second moment lacks a weight, has one in another shape, or a negative one; or the damping is 0.
    """
    if damping <= 0:
        raise invalid("damping", damping, "a number above 0")
    for key, tensor in gradient.items():
        if key not in second_moment or second_moment[key].shape != tensor.shape:
            raise UserError(f"second moment: it lacks {key} in the shape {list(tensor.shape)}")
        if bool((second_moment[key] < 0).any()):
            raise UserError(f"second moment: {key} has negative entries")
    return {
        key: tensor / (second_moment[key].to(tensor.device, tensor.dtype).sqrt() + damping)
        for key, tensor in gradient.items()
    }


# ----------------------------------------------------------------------------------------- gradients of the DPO loss


@dataclass(frozen=True)
class ValidationGradient:
    """Mean gradients of the DPO loss, by stratum."""

    directions: dict[str, dict[str, Tensor]]
    num_pairs: dict[str, int]
    losses: dict[str, float]
    """Mean loss."""


def validation_gradient(
    model: nn.Module,
    groups: Sequence[EncodedGroup],
    reference_logps_N2: npt.NDArray[np.float64],
    *,
    beta: float,
    strata: Sequence[str] | None = None,
    token_budget: int = 8192,
) -> ValidationGradient:
    r"""\((1/|V|) \sum_{v \in V} \nabla_\theta \mathrm{softplus}(-IRM_v)\) for each stratum.

    Args:
        model: A causal language model in evaluation mode, packable or not.
        groups: Pairs as prompts with two `ok` completions, chosen first.
        reference_logps_N2: Log-probs of chosen and rejected under the reference, nats, summed.
        beta: Of the loss, above 0.
        strata: The stratum of each pair; None: all are one, called "all".
        token_budget: Tokens of one row, which holds whole pairs, a longer pair alone. One backward pass per row.

    Returns:
        Gradients in fp32, fp64 for an fp64 model, summed in that dtype in the order of the pairs.

    Raises:
        UserError: No pair, or the model has no trainable weight.
        NonFiniteError: A loss or a gradient is NaN or infinite.
        TemplateError, OutOfMemoryError: As the model raises them; a row is not retried in parts.

    Source: METHODS §2: "Towards Understanding Valuable Preference Data for LLM Alignment", influence with the identity
    in place of the Hessian.
    """
    if not groups:
        raise UserError("validation pairs: got none; valid: at least 1")
    labels = [ALL] * len(groups) if strata is None else list(strata)
    directions: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, float] = {}
    for label in dict.fromkeys(labels):
        members = [number for number, other in enumerate(labels) if other == label]
        total: dict[str, Tensor] = {}
        loss_sum = 0.0
        for run in _runs(groups, members, token_budget):
            loss, gradient = _gradient(model, [groups[i] for i in run], reference_logps_N2[run], beta)
            if not math.isfinite(loss):
                raise NonFiniteError(f"validation loss: NaN or infinity among the pairs {run[:5]}")
            loss_sum += loss
            for name, tensor in gradient.items():
                total[name] = total[name] + tensor if name in total else tensor
        directions[label] = {name: tensor / len(members) for name, tensor in total.items()}
        losses[label] = loss_sum / len(members)
        if not math.isfinite(norm(directions[label])):
            raise NonFiniteError(f"validation gradient: NaN or infinity in stratum {label!r}")
    return ValidationGradient(directions, {label: labels.count(label) for label in directions}, losses)


def fisher_diagonal(
    model: nn.Module, groups: Sequence[EncodedGroup], reference_logps_N2: npt.NDArray[np.float64], *, beta: float
) -> dict[str, Tensor]:
    """Mean over pairs of their squared gradients, the empirical Fisher's diagonal; one backward pass per pair.

    Arguments and errors as `validation_gradient`. It costs about three forwards of the pairs, one pair at a time, and
    two more passes over the weights per pair.
    """
    if not groups:
        raise UserError("validation pairs: got none; valid: at least 1")
    total: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        loss, gradient = _gradient(model, [group], reference_logps_N2[[number]], beta)
        if not math.isfinite(loss):
            raise NonFiniteError(f"validation loss: NaN or infinity for pair {number}")
        for name, tensor in gradient.items():
            total[name] = total[name].addcmul_(tensor, tensor) if name in total else tensor.square_()
    return {name: tensor.div_(len(groups)) for name, tensor in total.items()}


def pair_logps(model: nn.Module, groups: Sequence[EncodedGroup]) -> Tensor:
    """Log-probs of chosen and rejected, [N, 2] float64 with gradient, from one row (or padded batch) of all pairs."""
    tokens = [2 * len(group.prompt_tokens) + sum(map(len, group.completion_tokens)) for group in groups]
    is_packed, _ = supports_packing(model)
    if is_packed:
        (row,) = pack(groups, sum(tokens))
        logps_C = packed_logps(model, row.to(model_device(model)))
        index = row.completion_index
    else:
        # The padding is masked and follows the last token: any id will do.
        (batch,) = pad(groups, 2 * len(groups) * max(tokens), pad_token_id=0)
        logps_C = padded_logps(model, batch.to(model_device(model)))
        index = batch.completion_index
    order = [index.index((number, side)) for number in range(len(groups)) for side in (0, 1)]
    return logps_C[torch.tensor(order, device=logps_C.device)].view(len(groups), 2)


def _gradient(
    model: nn.Module, groups: Sequence[EncodedGroup], reference_N2: npt.NDArray[np.float64], beta: float
) -> tuple[float, dict[str, Tensor]]:
    """Sum of the pairs' DPO losses and its gradient, fp32 or fp64, of weights that the loss does not read zeros."""
    parameters = parameters_of(model)
    with torch.enable_grad():
        policy_N2 = pair_logps(model, groups)
        log_ratios_N2 = policy_N2 - torch.as_tensor(reference_N2, dtype=torch.float64, device=policy_N2.device)
        loss = nn.functional.softplus(-beta * (log_ratios_N2[:, 0] - log_ratios_N2[:, 1])).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in zip(parameters, found)
    }


def _runs(groups: Sequence[EncodedGroup], members: Iterable[int], token_budget: int) -> Iterator[list[int]]:
    """Consecutive pairs of at most so many tokens together; a longer pair goes alone."""
    run: list[int] = []
    tokens = 0
    for number in members:
        length = len(groups[number].prompt_tokens) + sum(map(len, groups[number].completion_tokens))
        if run and tokens + length > token_budget:
            yield run
            run, tokens = [], 0
        run.append(number)
        tokens += length
    if run:
        yield run


# ----------------------------------------------------------------------------------------- directional derivatives


def directional_logps(
    model: nn.Module,
    tokenizer: Any,
    groups: pa.Table | Iterable[Mapping[str, Any]],
    tangent: Direction | Directions,
    *,
    token_budget: int = 8192,
    template: str = "auto",
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> dict[str, list[Any]]:
    r"""\(D_v \log\pi(y \mid x)\) of every completion of every group, exact, by forward-mode derivatives.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        groups: A table with the columns of `schema.GROUPS`, or `{prompt, completions}` with strings or messages.
        tangent: v, or several by name.
        token_budget: Tokens of one packed row.
        template: As `chat.Encoder` takes it.
        max_length: Most tokens of prompt + response; None: no limit.
        truncation: `drop`, `right` or `left`.

    Returns:
        The columns of `score_groups` and `dlogps`, nats per unit of v; of several directions `dlogps_<name>` each.
        None where `status` is not "ok".

    Raises:
        UserError: Template, tokenizer, arguments or tangent do not fit.
        NonFiniteError: The model or the tangent gave NaN or infinity.
    """
    directions, names = _named(tangent)
    route = directional_route(model, directions, pad_token_id=getattr(tokenizer, "pad_token_id", None))
    encoder = Encoder(tokenizer, template, max_length, truncation)
    columns, values = routed(model, encoder, groups, route, token_budget)
    return columns | {name: column(values, number) for number, name in enumerate(["logps", *names])}


def finite_difference_logps(
    model: nn.Module,
    tokenizer: Any,
    groups: pa.Table | Iterable[Mapping[str, Any]],
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
    directions, names = _named(tangent)
    route, epsilons = finite_difference_route(
        model, directions, step=step, pad_token_id=getattr(tokenizer, "pad_token_id", None), has_logps=logps is not None
    )
    encoder = Encoder(tokenizer, template, max_length, truncation)
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
    duals = _Placed(model, packed_dual_logps if base.is_packed else padded_dual_logps)
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


def packed_dual_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
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
    zeros_C = torch.zeros(batch.num_completions, dtype=torch.float64, device=values_R.device)
    owner_R = batch.completion_R.to(values_R.device)
    logps_C, dlogps_C = (zeros_C.index_add(0, owner_R, parts_R.double()) for parts_R in (values_R, dots_R))
    return forward_ad.make_dual(logps_C, dlogps_C)


def _head_parts(head: nn.Linear, hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and their derivatives, [R] each; see `packed_dual_logps`."""
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


def padded_dual_logps(model: nn.Module, batch: PaddedBatch) -> Tensor:
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


# -------------------------------------------------------------------------------------------------- LESS, per pair


class PairFeatures:
    r"""What LESS needs of a pair: \(\Gamma = m' / \sqrt{v' + \epsilon}\) with \(m' = \beta_1 m + (1-\beta_1) g\),
    \(v' = \beta_2 v + (1-\beta_2) g^2\), g the pair's own gradient of the DPO loss, (m, v) the warm-up's Adam state.

    The feature is nonlinear in g, so unlike influence it takes a backward pass per pair (about three forwards of the
    pair, alone in its row) and some five passes over the weights. One gradient exists at a time.

    Source: LESS (arXiv 2402.04333), section 3 and the authors' code: ε inside the root, no bias correction; with the
    DPO loss, and inner products in place of random projections.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        *,
        exp_avg: Direction,
        exp_avg_sq: Direction,
        beta: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Place unit directions and decayed moments beside the weights.

        Args:
            model: The warm-up, in evaluation mode.
            directions: Validation gradients; each is divided by its norm.
            exp_avg: m of every trainable weight.
            exp_avg_sq: v of every trainable weight.
            beta: Of the DPO loss.
            betas: Adam's decays.
            eps: ε, added below the root.

        Raises:
            UserError: A direction does not fit the model, or a moment lacks a weight.
            NonFiniteError: A direction holds NaN or infinity.
        """
        self.model, self.beta, self.betas = model, beta, betas
        dtypes = {n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters_of(model).items()}
        devices = {n: p.device for n, p in parameters_of(model).items()}
        for title, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            shapes = {name: tensor.shape for name, tensor in moment.items()}
            if missing := [n for n, p in parameters_of(model).items() if shapes.get(n) != p.shape]:
                raise UserError(f"{title}: it lacks {missing[:3]} ({len(missing)} weights) in the shape of the model's")
        self.decayed_m = {n: (betas[0] * exp_avg[n].to(devices[n], dtypes[n])) for n in dtypes}
        self.decayed_v = {n: (betas[1] * exp_avg_sq[n].to(devices[n], dtypes[n])).add_(eps) for n in dtypes}
        self.units = []
        for name, direction in directions.items():
            check_direction(model, name, direction)
            length = norm(direction)
            self.units.append({n: (direction[n] / length).to(devices[n], dtypes[n]) for n in direction})

    def __call__(
        self, group: EncodedGroup, reference_2: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], float]:
        """Inner products of Γ with the unit directions, [S], and ‖Γ‖; NaN where the model gave NaN."""
        _, gradient = _gradient(self.model, [group], np.asarray(reference_2)[None], self.beta)
        dots_S, square = np.zeros(len(self.units)), 0.0
        for name, g in gradient.items():
            root = torch.addcmul(self.decayed_v[name], g, g, value=1 - self.betas[1]).sqrt_()
            feature = torch.add(self.decayed_m[name], g, alpha=1 - self.betas[0]).div_(root).flatten()
            square += float(torch.linalg.vector_norm(feature, dtype=torch.float64)) ** 2
            for number, unit in enumerate(self.units):
                if name in unit:
                    dots_S[number] += float(torch.dot(feature, unit[name].flatten()))
        return dots_S, math.sqrt(square) if square >= 0 else math.nan


def pair_features(
    model: nn.Module,
    groups: Sequence[EncodedGroup],
    reference_logps_N2: npt.NDArray[np.float64],
    directions: Directions,
    *,
    exp_avg: Direction,
    exp_avg_sq: Direction,
    beta: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    r"""Of every pair \(\langle\Gamma, \hat g\rangle\) for each direction's unit vector, [N, S], and ‖Γ‖, [N].

    Arguments and errors as `PairFeatures`; `groups` and `reference_logps_N2` as `validation_gradient`.
    """
    features = PairFeatures(model, directions, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, beta=beta, betas=betas, eps=eps)
    found = [features(group, reference_2) for group, reference_2 in zip(groups, reference_logps_N2)]
    dots_NS = np.array([dots for dots, _ in found]).reshape(len(found), len(directions))
    return dots_NS, np.array([length for _, length in found])
