r"""Preference losses from sequence log-probabilities: pure functions of four numbers per pair.

Shapes: N pairs. Every input is a log-probability in nats, summed over the response tokens; every loss is one value
per pair, so that the caller decides the weighting of an incomplete batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor


def reward_margins(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> Tensor:
    r"""Implicit reward margins \(\beta[(\log\pi_\theta-\log\pi_{ref})(y_w) - (\log\pi_\theta-\log\pi_{ref})(y_l)]\).

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed.
        policy_rejected: The same for the rejected completions, [N].
        reference_chosen: Log-probs of the chosen completions under the reference, [N].
        reference_rejected: The same for the rejected completions, [N].
        beta: Inverse temperature of the implicit reward, > 0.

    Returns:
        Signed margins, [N], in the dtype of the inputs.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), the argument of the sigmoid in equation 7.
    """
    return beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""DPO: \((1-\varepsilon)\,\mathrm{softplus}(-m) + \varepsilon\,\mathrm{softplus}(m)\) with m the reward margin.

    The softplus form stays finite and exact where log(sigmoid(m)) underflows.

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed.
        policy_rejected: The same for the rejected completions, [N].
        reference_chosen: Log-probs of the chosen completions under the reference, [N].
        reference_rejected: The same for the rejected completions, [N].
        beta: Inverse temperature of the implicit reward, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5); 0 is plain DPO, above it conservative DPO.

    Returns:
        Losses, [N].

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3.
    """
    margins = reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return (1.0 - label_smoothing) * F.softplus(-margins) + label_smoothing * F.softplus(margins)


def dfpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    num_aspects: int,
    preference_divergence: Tensor,
) -> Tensor:
    r"""Preference-divergence-weighted DPO: \(\mathrm{softplus}(-(\kappa m + \mathrm{PD}))\), m the reward margin.

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed.
        policy_rejected: The same for the rejected completions, [N].
        reference_chosen: Log-probs of the chosen completions under the reference, [N].
        reference_rejected: The same for the rejected completions, [N].
        beta: Inverse temperature of the implicit reward, > 0.
        num_aspects: Number of aspects \(\kappa\), the pair's own one included, >= 1.
        preference_divergence: PD of each pair, [N]; positive where the other aspects contradict the label.

    Returns:
        Losses, [N].

    Source: "Data Selection for LLM Alignment Using Fine-Grained Preferences", the DFPO objective.
    """
    margins = reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return F.softplus(-(num_aspects * margins + preference_divergence))


def preference_stats(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> dict[str, Tensor]:
    r"""Implicit rewards, their margin, and whether the pair is ordered as labelled; detached, one value per pair.

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed.
        policy_rejected: The same for the rejected completions, [N].
        reference_chosen: Log-probs of the chosen completions under the reference, [N].
        reference_rejected: The same for the rejected completions, [N].
        beta: Inverse temperature of the implicit reward, > 0.

    Returns:
        `reward_chosen`, `reward_rejected`, `margin` and `accuracy` (1.0 where the margin is positive, a tie counts
        as wrong), each [N].
    """
    reward_chosen = (beta * (policy_chosen - reference_chosen)).detach()
    reward_rejected = (beta * (policy_rejected - reference_rejected)).detach()
    margin = reward_chosen - reward_rejected
    return {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
    }


PairLoss = Callable[..., Tensor]
"""(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta, label_smoothing) -> losses [N]."""

LOSSES: Final[dict[str, PairLoss]] = {"dpo": dpo_loss}
"""Every loss the training loop offers, by its configuration name."""
