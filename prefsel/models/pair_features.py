"""What LESS needs of a pair: its Adam feature's norm and inner products, from the pair's own gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup
from prefsel.models.tangent import Direction, Directions, check_direction, norm, pair_gradient, parameters_of


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
        _, gradient = pair_gradient(self.model, [group], np.asarray(reference_2)[None], self.beta)
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
