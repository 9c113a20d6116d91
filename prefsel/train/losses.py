r"""Preference losses from sequence log-probabilities: pure functions of a few numbers per pair.

Shapes: N pairs. Every log-probability is in nats, summed over the response tokens; every loss is one value per pair,
so that the caller decides the weighting of an incomplete batch. In the equations

    h = (log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)        m = β h, the implicit reward margin
    h̄ = the same with both terms divided by the number of their response tokens, |y_w| and |y_l|

`prefsel.config.losses.LOSSES` names them; a new one is a function here, or anywhere, and a line there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from prefsel.config.losses import loss_named
from prefsel.errors import UserError
from prefsel.numbers.agreement import agreement


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


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    r"""Robust DPO: \([(1-\varepsilon)\,\mathrm{softplus}(-m) - \varepsilon\,\mathrm{softplus}(m)] / (1-2\varepsilon)\).

    Its expectation over labels flipped with probability \(\varepsilon\) is the DPO loss of the true labels; the price
    is that it has no lower bound: it falls like \(-\varepsilon m/(1-2\varepsilon)\) for large margins.

    Args:
        policy_chosen: As in `dpo_loss`, like the three that follow.
        policy_rejected: [N].
        reference_chosen: [N].
        reference_rejected: [N].
        beta: Inverse temperature of the implicit reward, > 0.
        label_smoothing: \(\varepsilon\), the probability that a label is flipped, in (0, 0.5).

    Returns:
        Losses, [N]; may be negative.

    Source: Chowdhury et al. 2024 (arXiv 2403.00409), "Provably Robust DPO", the unbiased loss.
    """
    margins = reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    as_labelled, flipped = F.softplus(-margins), F.softplus(margins)
    return ((1.0 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    num_tokens_chosen: Tensor,
    num_tokens_rejected: Tensor,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""IPO: \((h - 1/(2\beta))^2\), or \((\bar h - 1/(2\beta))^2\) with the reduction "mean".

    The paper's equation has the log-probability of the whole response ("sum"). TRL divides both by their numbers of
    tokens ("mean") and says that the authors confirmed it; then \(\beta\) is about |y| times larger for the same pull.

    Args:
        policy_chosen: As in `dpo_loss`, like the three that follow.
        policy_rejected: [N].
        reference_chosen: [N].
        reference_rejected: [N].
        beta: The paper's \(\tau\), > 0: the margin h is pulled towards 1 / (2 beta).
        num_tokens_chosen: Response tokens of the chosen completions, the end of turn included, [N]; for "mean".
        num_tokens_rejected: The same for the rejected completions, [N].
        reduction: Whether log-probs are compared as they are or per token.

    Returns:
        Losses, [N], in squared nats.

    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if reduction == "mean":
        chosen, rejected = chosen / num_tokens_chosen, rejected / num_tokens_rejected
    return (chosen - rejected - 0.5 / beta) ** 2


def hinge_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> Tensor:
    r"""Hinge on the normalised likelihood: \(\max(0, 1 - m)\) with m the reward margin.

    SLiC's hinge, with the log-probabilities divided by the reference's, and without its regulariser: the reference in
    the margin does that work.

    Args:
        policy_chosen: As in `dpo_loss`, like the three that follow.
        policy_rejected: [N].
        reference_chosen: [N].
        reference_rejected: [N].
        beta: Inverse temperature of the implicit reward, > 0; 1 / beta nats is the margin asked for.

    Returns:
        Losses, [N].

    Source: Zhao et al. 2023 (arXiv 2305.10425), SLiC-HF; in this form Liu et al. 2024 (arXiv 2309.06657), RSO, the
    hinge-norm loss.
    """
    return F.relu(1.0 - reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta))


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float,
    num_tokens_chosen: Tensor,
    num_tokens_rejected: Tensor,
    gamma: float,
) -> Tensor:
    r"""SimPO: \(\mathrm{softplus}(\gamma - \beta[\log\pi_\theta(y_w)/|y_w| - \log\pi_\theta(y_l)/|y_l|])\).

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed.
        policy_rejected: The same for the rejected completions, [N].
        beta: Scale of the reward, > 0; the paper takes 2 to 10.
        num_tokens_chosen: Response tokens of the chosen completions, the end of turn included, [N].
        num_tokens_rejected: The same for the rejected completions, [N].
        gamma: Target reward margin, >= 0; `gamma_beta_ratio` of the authors' code is gamma / beta.

    Returns:
        Losses, [N]. There is no reference model.

    Source: Meng et al. 2024 (arXiv 2405.14734), equation 6.
    """
    return F.softplus(gamma - beta * (policy_chosen / num_tokens_chosen - policy_rejected / num_tokens_rejected))


def length_normalised_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    num_tokens_chosen: Tensor,
    num_tokens_rejected: Tensor,
) -> Tensor:
    r"""Length-normalised DPO: \(\mathrm{softplus}(-\beta\bar h)\), policy and reference both per token.

    Args:
        policy_chosen: As in `dpo_loss`, like the three that follow.
        policy_rejected: [N].
        reference_chosen: [N].
        reference_rejected: [N].
        beta: Scale of the per-token reward, > 0; about |y| times that of plain DPO.
        num_tokens_chosen: Response tokens of the chosen completions, the end of turn included, [N].
        num_tokens_rejected: The same for the rejected completions, [N].

    Returns:
        Losses, [N].

    Source: Lambert et al. 2024 (arXiv 2411.15124), Tülu 3, its length-normalised DPO.
    """
    chosen = (policy_chosen - reference_chosen) / num_tokens_chosen
    rejected = (policy_rejected - reference_rejected) / num_tokens_rejected
    return F.softplus(-beta * (chosen - rejected))


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


def weighted_dfpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    preference_divergence: Tensor,
    aspect_weight: Tensor,
) -> Tensor:
    r"""Weighted DFPO: \(\mathrm{softplus}(-(m/w_k + \mathrm{PD}_w))\), k the pair's own aspect.

    With equal weights, \(w_k = 1/\kappa\), it is `dfpo_loss`.

    Args:
        policy_chosen: As in `dpo_loss`, like the three that follow.
        policy_rejected: [N].
        reference_chosen: [N].
        reference_rejected: [N].
        beta: Inverse temperature of the implicit reward, > 0.
        preference_divergence: \(\mathrm{PD}_w = -(1/w_k)\sum_{k'\ne k} w_{k'}\Delta r_{k'}\) of each pair, [N].
        aspect_weight: \(w_k\), the share of the own aspect in the sum of all weights, in (0, 1], [N].

    Returns:
        Losses, [N].

    Source: our extension of the DFPO objective; of the form of MODPO (Zhou et al. 2023, arXiv 2310.03708), whose one
    preference vector is here the pair's own aspect.
    """
    margins = reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return F.softplus(-(margins / aspect_weight + preference_divergence))


def preference_stats(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> dict[str, Tensor]:
    r"""Implicit rewards, their margin, and whether the pair is ordered as labelled; detached, one value per pair.

    Args:
        policy_chosen: Log-probs of the chosen completions under the policy, [N], nats, summed or per token.
        policy_rejected: The same for the rejected completions, [N].
        reference_chosen: Log-probs of the chosen completions under the reference, [N].
        reference_rejected: The same for the rejected completions, [N].
        beta: Inverse temperature of the implicit reward, > 0.

    Returns:
        `reward_chosen`, `reward_rejected`, `margin` and `accuracy` (`numbers.agreement`: 1.0 where the margin is
        positive, 0.5 for a tie), each [N].
    """
    reward_chosen = (beta * (policy_chosen - reference_chosen)).detach()
    reward_rejected = (beta * (policy_rejected - reference_rejected)).detach()
    margin = reward_chosen - reward_rejected
    return {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": margin,
        "accuracy": agreement(margin).to(margin.dtype),
    }


def loss_function(name: str) -> Callable[..., Tensor]:
    """The function of a loss, by the loss's configuration name, imported from where its line in `LOSSES` says it lies.

    Raises:
        UserError: There is no such loss, or no such function.
    """
    found = loss_named(name).function
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"loss {name!r}: its function {found} cannot be imported: {error}") from error
