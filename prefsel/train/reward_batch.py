"""One global batch through the reward model, spread over the workers: forward, backward, and the rewards seen.

Every worker makes the same number of passes per batch, each one call of the trunk and one of the head (ZeRO-3 gathers
weights inside them); a worker with fewer micro-batches repeats the batch's shortest pair with weight zero.

Shapes: B draws of a global batch, P pairs of a micro-batch, C completions of a packed row, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from prefsel.errors import NonFiniteError
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.tree import ModelShape, PackedBatch, pack
from prefsel.train import data
from prefsel.train.batch import forward_flops, ordered
from prefsel.train.calibration import agreement, holdout_report
from prefsel.train.data import Indices
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_data import RewardPairs
from prefsel.train.reward_losses import debiased_margins, length_penalised_loss

Record = dict[str, Any]
Rewards = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RewardRun:
    """What stays fixed while training: options, engine, and this worker's place among the others."""

    config: RewardConfig
    engine: Any
    """DeepSpeed's, around a `RewardModule`."""
    device: torch.device
    rank: int
    world_size: int
    num_steps: int
    pad_token_id: int
    padding_reason: str | None
    """Why batches are padded, one completion per row; None: they are packed."""
    shape: ModelShape
    """What FLOPs follow from."""


def batch_record(run: RewardRun, pairs: RewardPairs, draws_B: Indices, *, is_training: bool) -> Record:
    """Forward (and backward) a global batch, and the means over it; the same on every worker.

    Raises:
        NonFiniteError: A reward is NaN or infinite; no weight was changed.
    """
    rewards_B2, flops = run_batch(run, pairs, draws_B, is_training=is_training)
    difference_B = pairs.length_difference_N[draws_B]
    margin_B = debiased_margins(rewards_B2[:, 0] - rewards_B2[:, 1], difference_B, rho=run.config.length_penalty_rho)
    chosen, rejected = rewards_B2.mean(axis=0).tolist()
    return {
        "loss": float(np.logaddexp(0.0, -margin_B).mean()),
        "accuracy": float(agreement(margin_B).mean()),
        "margin": float(margin_B.mean()),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "longer_chosen": float((difference_B >= 0).mean()),
        "num_tokens": int(pairs.num_tokens_N[draws_B].sum()),
        "num_pairs": len(draws_B),
        "flops_forward": flops,
    }


@torch.no_grad()
def evaluate(run: RewardRun, pairs: RewardPairs, held_out: Indices) -> Record | None:
    """`holdout_report` of the held-out pairs; every worker takes part.

    Raises:
        NonFiniteError: A reward is NaN or infinite.
    """
    if len(held_out) < 2:
        return None
    run.engine.eval()
    rewards_N2, _ = run_batch(run, pairs, held_out, is_training=False)
    difference_N = pairs.length_difference_N[held_out]
    margin_N = debiased_margins(rewards_N2[:, 0] - rewards_N2[:, 1], difference_N, rho=run.config.length_penalty_rho)
    return holdout_report(margin_N, difference_N)


def run_batch(run: RewardRun, pairs: RewardPairs, draws_B: Indices, *, is_training: bool) -> tuple[Rewards, float]:
    """Forward (and backward) every draw of a global batch once, spread over the workers.

    Returns:
        Rewards of chosen and rejected, [B, 2] float64, and the FLOPs of the forward passes (idle ones apart); the same
        on every worker.

    Raises:
        NonFiniteError: A reward is NaN or infinite; no weight was changed.
    """
    config, length_B = run.config, pairs.num_tokens_N[draws_B]
    # Positions in the batch, not pairs: a pair may have been drawn twice.
    share = data.rank_share(np.arange(len(draws_B)), length_B, rank=run.rank, world_size=run.world_size)
    limits = {"micro_batch_pairs": config.micro_batch_pairs, "token_budget": config.token_budget}
    micro = data.micro_batches(share, length_B[share], **limits)
    num_passes = torch.tensor(len(micro), device=run.device)
    dist.all_reduce(num_passes, op=dist.ReduceOp.MAX)
    shortest = np.array([np.argmin(length_B)])
    # What other workers fill in stays 0; the last number counts FLOPs.
    found = torch.zeros(2 * len(draws_B) + 1, dtype=torch.float64, device=run.device)
    for number in range(int(num_passes)):
        is_idle = number >= len(micro)
        at_P = shortest if is_idle else micro[number]
        rewards_P2, flops = pair_rewards(run, pairs, draws_B[at_P])
        if is_training:
            run.engine.set_gradient_accumulation_boundary(number == int(num_passes) - 1)
            difference_P = torch.from_numpy(pairs.length_difference_N[draws_B[at_P]]).to(run.device)
            losses_P = length_penalised_loss(
                rewards_P2[:, 0] - rewards_P2[:, 1], difference_P, rho=config.length_penalty_rho
            )
            # DeepSpeed averages gradients over the workers, hence the factor.
            weight = 0.0 if is_idle else run.world_size / len(draws_B)
            run.engine.backward(losses_P.sum() * weight, scale_wrt_gas=False)
        if not is_idle:
            found[:-1].view(-1, 2)[torch.from_numpy(at_P).to(run.device)] = rewards_P2.detach()
            found[-1] += flops
    dist.all_reduce(found, op=dist.ReduceOp.SUM)
    rewards_B2 = found[:-1].view(-1, 2).cpu().numpy()
    if len(bad := np.flatnonzero(~np.isfinite(rewards_B2).all(axis=1))):
        named = ", ".join(pairs.pair_ids[index] for index in draws_B[bad[:5]])
        raise NonFiniteError(f"reward: NaN or infinite for pair_ids {named}; no weight was changed")
    return rewards_B2, float(found[-1])


def pair_rewards(run: RewardRun, pairs: RewardPairs, indices_P: Indices) -> tuple[Tensor, float]:
    """Rewards of chosen and rejected, [P, 2] float64 with gradient, and the FLOPs of the forward pass."""
    groups = [pairs.group(int(index)) for index in indices_P]
    lengths = [(len(group.prompt_tokens), *map(len, group.completion_tokens)) for group in groups]
    # One batch, whatever its size: under ZeRO-3 all workers must call the trunk equally often.
    batches: list[PackedBatch] | list[PaddedBatch]
    if run.padding_reason is None:
        batches = pack(groups, sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths))
    else:
        batches = pad(groups, 2 * len(groups) * max(map(sum, lengths)), pad_token_id=run.pad_token_id)
    (batch,) = batches
    rewards_C = run.engine(batch.to(run.device))
    return ordered(rewards_C, batch), forward_flops(run.shape, batch)
