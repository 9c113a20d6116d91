r"""Bradley–Terry with the two remedies against length bias: a penalty in the loss and a balanced sample.

Shapes: N pairs. A length difference is \(\Delta len = |y_w| - |y_l|\), in tokens or characters.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from prefsel.errors import invalid

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


def debiased_margins(reward_margins: Numbers, length_differences: Numbers, *, rho: float) -> Numbers:
    r"""Reward margins without what length explains: \(\Delta r - \rho\,\Delta len\), the logit of the loss.

    Args:
        reward_margins: \(r(x,y_w) - r(x,y_l)\), [N].
        length_differences: \(|y_w| - |y_l|\), [N].
        rho: Reward that one unit of length is worth, ρ.

    Returns:
        [N], in the dtype of the inputs.

    Source: "Data Selection for LLM Alignment Using Fine-Grained Preferences", equation 17. The paper subtracts the
    same term in the loss and in the score, so the debiased margin, not the raw one, is what was fitted to the labels.
    """
    return reward_margins - rho * length_differences


def length_penalised_loss(reward_margins: Tensor, length_differences: Tensor, *, rho: float) -> Tensor:
    r"""Bradley–Terry with a length penalty: \(-\log\sigma(\Delta r - \rho\,\Delta len)\), as a softplus.

    Args:
        reward_margins: \(r(x,y_w) - r(x,y_l)\), [N].
        length_differences: \(|y_w| - |y_l|\), [N].
        rho: ρ; 0 is plain Bradley–Terry.

    Returns:
        Losses, [N]; finite for every finite margin.

    Source: "Data Selection for LLM Alignment Using Fine-Grained Preferences", equation 17; ρ = 0: Bradley and Terry
    1952, as Ouyang et al. 2022 (arXiv 2203.02155), equation 1, train a reward model.
    """
    return F.softplus(-debiased_margins(reward_margins, length_differences, rho=rho))


def length_balanced_frequency(share: float, tau: float) -> float:
    r"""How often a pair whose chosen completion is at least as long is drawn.

    \(\hat f^+ = e^{f^+/\tau} / (e^{f^+/\tau} + e^{f^-/\tau})\) with \(f^- = 1 - f^+\): one half for τ → ∞; at τ below
    about 0.5 further from one half than the data, which is no remedy (f⁺ = 0.7, τ = 0.1 gives 0.98).

    Args:
        share: f⁺, the share of the pairs with \(|y_w| \ge |y_l|\), 0 to 1.
        tau: Temperature τ, above 0.

    Returns:
        f̂⁺, between 0 and 1.

    Raises:
        UserError: An argument outside its range.

    Source: "Data Selection for LLM Alignment Using Fine-Grained Preferences", equation 16.
    """
    if not 0 <= share <= 1:
        raise invalid("share", share, "0 to 1")
    if not tau > 0:
        raise invalid("length_balance_tau", tau, "above 0")
    # The logistic function of the difference: e^(f/τ) itself overflows below τ = 0.0014.
    odds = math.exp(-abs(2 * share - 1) / tau)
    return (1.0 if share >= 0.5 else odds) / (1.0 + odds)
