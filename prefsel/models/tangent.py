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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.models.chat import EncodedGroup
from prefsel.models.pair_batch import pair_logps

Direction = Mapping[str, Tensor]
"""Parameter name → tensor of its shape, fp32 or fp64; a parameter that is not named does not move. Tied weights are
one parameter."""
Directions = Mapping[str, Direction]

MANIFEST = "tangent.json"
ALL = "all"
"""The stratum of validation pairs that are not divided."""


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

    Source: "Towards Understanding Valuable Preference Data for LLM Alignment", influence with the identity
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
            loss, gradient = pair_gradient(model, [groups[i] for i in run], reference_logps_N2[run], beta)
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
        loss, gradient = pair_gradient(model, [group], reference_logps_N2[[number]], beta)
        if not math.isfinite(loss):
            raise NonFiniteError(f"validation loss: NaN or infinity for pair {number}")
        for name, tensor in gradient.items():
            total[name] = total[name].addcmul_(tensor, tensor) if name in total else tensor.square_()
    return {name: tensor.div_(len(groups)) for name, tensor in total.items()}


def pair_gradient(
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
