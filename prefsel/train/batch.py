"""One global batch through the engine, spread over the workers: forward, backward, and the means of what was seen.

Every worker makes the same number of passes per batch (ZeRO-3 gathers weights inside them); a worker with fewer
micro-batches repeats the batch's shortest pair with weight zero.

Shapes: B pairs of a global batch, P pairs of a micro-batch, S = len(STATS), C completions of packed rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefsel.errors import NonFiniteError
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.tree import PackedBatch, pack
from prefsel.train import data
from prefsel.train.data import EncodedPairs, Indices
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.losses import LOSSES, preference_stats

Record = dict[str, Any]

STATS = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "num_tokens")


@dataclass(frozen=True)
class Run:
    """What stays fixed while training: options, engine, and this worker's place among the others."""

    config: DpoConfig
    engine: Any
    device: torch.device
    rank: int
    world_size: int
    num_steps: int
    padding_reason: str | None
    """Why batches are padded, one completion per row; None: they are packed."""


def next_batch(config: DpoConfig, train: EncodedPairs, consumed_pairs: int) -> Indices:
    """The pairs of the global batch that follows `consumed_pairs`, [B]."""
    options = config.model_dump(include={"global_batch_pairs", "seed", "order"})
    return data.global_batch(consumed_pairs, len(train), **options)


@torch.no_grad()
def evaluate(run: Run, pairs: EncodedPairs, batch_B: Indices | None = None) -> Record:
    """Mean loss, accuracy, margin and rewards over the pairs (all of them unless told); every worker takes part."""
    run.engine.eval()
    return run_batch(run, pairs, np.arange(len(pairs)) if batch_B is None else batch_B, is_training=False)


def run_batch(run: Run, pairs: EncodedPairs, batch_B: Indices, *, is_training: bool) -> Record:
    """Forward (and backward) every pair of a global batch once, spread over the workers.

    Returns:
        Means over the batch of `STATS` (`num_tokens` is a sum), and `num_pairs`; the same on every worker.

    Raises:
        NonFiniteError: A pair's loss is NaN or infinite; no weight was changed.
    """
    config, lengths = run.config, pairs.num_tokens_N
    share = data.rank_share(batch_B, lengths[batch_B], rank=run.rank, world_size=run.world_size)
    micro = data.micro_batches(
        share, lengths[share], micro_batch_pairs=config.micro_batch_pairs, token_budget=config.token_budget
    )
    num_passes = int(all_reduce(run, [len(micro)], dist.ReduceOp.MAX)[0])
    shortest = batch_B[[np.argmin(lengths[batch_B])]]
    sums_S = torch.zeros(len(STATS), dtype=torch.float64, device=run.device)
    losses: list[Tensor] = []
    for number in range(num_passes):
        is_idle = number >= len(micro)
        if is_training:
            run.engine.set_gradient_accumulation_boundary(number == num_passes - 1)
        losses_P, stats_PS = pair_losses(run, pairs, shortest if is_idle else micro[number])
        if is_training:
            # DeepSpeed averages gradients over the workers, hence the factor.
            weight = 0.0 if is_idle else run.world_size / len(batch_B)
            run.engine.backward(losses_P.sum() * weight, scale_wrt_gas=False)
        if not is_idle:
            sums_S += stats_PS.sum(dim=0)
            losses.append(losses_P.detach())
    sums = all_reduce(run, sums_S, dist.ReduceOp.SUM)
    if not math.isfinite(sums[STATS.index("loss")]):
        raise_non_finite([pairs.pair_ids[i] for i in share], losses)
    means = {name: value / len(batch_B) for name, value in zip(STATS, sums)}
    return {**means, "num_tokens": int(sums[STATS.index("num_tokens")]), "num_pairs": len(batch_B)}


def pair_losses(run: Run, pairs: EncodedPairs, indices_P: Indices) -> tuple[Tensor, Tensor]:
    """Losses, [P] float64 with gradient, and the detached `STATS` of each pair, [P, S]."""
    config = run.config
    policy_P2 = pair_logps(run.engine, run, pairs, indices_P)
    reference_P2 = torch.from_numpy(pairs.reference_logps_N2[indices_P]).to(run.device)
    logps = (*policy_P2.unbind(1), *reference_P2.unbind(1))
    losses_P = LOSSES[config.loss](*logps, beta=config.beta, label_smoothing=config.label_smoothing)
    num_tokens_P = torch.from_numpy(pairs.num_tokens_N[indices_P].astype(np.float64)).to(run.device)
    stats = {**preference_stats(*logps, beta=config.beta), "loss": losses_P.detach(), "num_tokens": num_tokens_P}
    return losses_P, torch.stack([stats[name] for name in STATS], dim=1)


def pair_logps(policy: nn.Module, run: Run, pairs: EncodedPairs, indices_P: Indices) -> Tensor:
    """Log-probs of chosen and rejected under a policy (or the engine around it), [P, 2] float64."""
    groups = [pairs.group(int(index)) for index in indices_P]
    lengths = [(len(group.prompt_tokens), *map(len, group.completion_tokens)) for group in groups]
    # One batch, whatever its size: under ZeRO-3 all workers must call the trunk equally often.
    batches: list[PackedBatch] | list[PaddedBatch]
    if run.padding_reason is None:
        batches = pack(groups, sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths))
    else:
        # The padding is masked and follows the last token: any id will do.
        batches = pad(groups, 2 * len(groups) * max(map(sum, lengths)), pad_token_id=0)
    (batch,) = batches
    logps_C = policy(batch.to(run.device))
    order = [batch.completion_index.index((pair, side)) for pair in range(len(groups)) for side in (0, 1)]
    return logps_C[torch.tensor(order, device=logps_C.device)].view(len(groups), 2)


def all_reduce(run: Run, values: Tensor | list[int], op: dist.ReduceOp) -> list[float]:
    """Reduce a few numbers over the workers, as float64."""
    tensor = torch.as_tensor(values, dtype=torch.float64, device=run.device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def raise_non_finite(pair_ids: list[str], losses: list[Tensor]) -> None:
    """Raise the `NonFiniteError` that names the pairs, of all workers, whose loss is not finite."""
    is_bad = ~torch.isfinite(torch.cat(losses)) if losses else torch.zeros(0)
    named: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(named, [pair_ids[i] for i in torch.nonzero(is_bad).flatten().tolist()])
    offenders = [pair_id for part in named for pair_id in part]
    raise NonFiniteError(f"loss: NaN or infinite for pair_ids {', '.join(offenders[:5])}; no weight was changed")
