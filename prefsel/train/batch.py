"""One global batch through the engine, spread over the workers: forward, backward, and the means of what was seen.

Every worker makes the same number of passes per batch (ZeRO-3 gathers weights inside them); a worker with fewer
micro-batches repeats the batch's shortest pair with weight zero.

Shapes: B pairs of a global batch, P pairs of a micro-batch, N of either, S = len(STATS), C completions of packed rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefsel.config import DpoOptions
from prefsel.errors import NonFiniteError
from prefsel.models.attention import attention_area
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.tree import ModelShape, PackedBatch, pack
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
    shape: ModelShape
    """What the FLOPs of a pass follow from; adapters are not counted."""


@dataclass(frozen=True)
class PairInputs:
    """What is known of N pairs before the policy sees them; float64."""

    reference_N2: Tensor | None
    """Log-probs of chosen and rejected under the reference; None: not known."""
    num_tokens_N2: Tensor
    """Response tokens of chosen and rejected."""
    columns: Mapping[str, Tensor]
    """Further numbers, [N] each, by name."""

    @classmethod
    def of(cls, pairs: EncodedPairs, indices_N: Indices, device: torch.device | str = "cpu") -> PairInputs:
        """Those of some pairs."""

        def put(values: Any) -> Tensor:
            return torch.from_numpy(values[indices_N].astype(np.float64)).to(device)

        return cls(
            reference_N2=None if pairs.reference_logps_N2 is None else put(pairs.reference_logps_N2),
            num_tokens_N2=put(pairs.response_tokens_N2),
            columns={name: put(values) for name, values in pairs.columns.items()},
        )


def next_batch(config: DpoConfig, train: EncodedPairs, consumed_pairs: int) -> Indices:
    """The pairs of the global batch that follows `consumed_pairs`, [B]."""
    options = config.model_dump(include={"global_batch_pairs", "seed", "order"})
    batch_B = data.global_batch(consumed_pairs, len(train), **options)
    return train.by_score_N[batch_B] if config.order == "score" else batch_B


@torch.no_grad()
def evaluate(
    run: Run, pairs: EncodedPairs, batch_B: Indices | None = None, *, margins_N: Tensor | None = None
) -> Record:
    """Mean loss, accuracy, margin and rewards over the pairs (all of them unless told); every worker takes part."""
    run.engine.eval()
    batch_B = np.arange(len(pairs)) if batch_B is None else batch_B
    return run_batch(run, pairs, batch_B, is_training=False, margins_N=margins_N)


def held_out_record(run: Run, held_out: EncodedPairs, progress: Record) -> Record:
    """An evaluation on the held-out pairs as a record; of the first and the last one with the margin of every pair.

    From those the report compares two trainings pair by pair (`heldout.split_margins` takes them out of the history).
    """
    if progress["step"] not in (0, run.num_steps):
        return {"event": "eval", **progress, **evaluate(run, held_out)}
    margins_N = torch.zeros(len(held_out), dtype=torch.float64, device=run.device)
    record = {"event": "eval", **progress, **evaluate(run, held_out, margins_N=margins_N)}
    # A worker filled in the pairs of its share, the others' are 0 there.
    return record | {"margins": all_reduce(run, margins_N, dist.ReduceOp.SUM)}


def run_batch(
    run: Run, pairs: EncodedPairs, batch_B: Indices, *, is_training: bool, margins_N: Tensor | None = None
) -> Record:
    """Forward (and backward) every pair of a global batch once, spread over the workers.

    Args:
        run: What stays fixed.
        pairs: The pairs that the batch points at, N.
        batch_B: Positions of its pairs.
        is_training: Whether to take gradients.
        margins_N: Receives the margins of the pairs that this worker saw, float64 on the run's device.

    Returns:
        Means over the batch of `STATS` (`num_tokens` is a sum), `num_pairs`, and `flops_forward`, the sum over the
        forward passes (weightless ones of idle workers left out); the same on every worker. `loss` is None for pairs
        that lack a column of the loss, as held-out pairs may.

    Raises:
        NonFiniteError: A pair's loss is NaN or infinite; no weight was changed.
    """
    config, lengths = run.config, pairs.num_tokens_N
    has_loss = set(LOSSES[config.loss].columns) <= set(pairs.columns)
    share = data.rank_share(batch_B, lengths[batch_B], rank=run.rank, world_size=run.world_size)
    micro = data.micro_batches(
        share, lengths[share], micro_batch_pairs=config.micro_batch_pairs, token_budget=config.token_budget
    )
    num_passes = int(all_reduce(run, [len(micro)], dist.ReduceOp.MAX)[0])
    shortest = batch_B[[np.argmin(lengths[batch_B])]]
    sums_S, flops = torch.zeros(len(STATS), dtype=torch.float64, device=run.device), 0.0
    losses: list[Tensor] = []
    for number in range(num_passes):
        is_idle = number >= len(micro)
        if is_training:
            run.engine.set_gradient_accumulation_boundary(number == num_passes - 1)
        indices_P = shortest if is_idle else micro[number]
        batch = batch_of(run, pairs, indices_P)
        policy_P2, inputs = ordered(run.engine(batch), batch), PairInputs.of(pairs, indices_P, run.device)
        # What is not finite stays visible where there is no loss.
        losses_P = pair_losses(config, policy_P2, inputs) if has_loss else 0.0 * policy_P2.sum(dim=1)
        if is_training:
            # DeepSpeed averages gradients over the workers, hence the factor.
            weight = 0.0 if is_idle else run.world_size / len(batch_B)
            run.engine.backward(losses_P.sum() * weight, scale_wrt_gas=False)
        if not is_idle:
            num_tokens_P = torch.from_numpy(lengths[indices_P]).to(policy_P2)
            stats = {**pair_stats(config, policy_P2, inputs), "loss": losses_P.detach(), "num_tokens": num_tokens_P}
            sums_S += torch.stack([stats[name].sum() for name in STATS])
            if margins_N is not None:
                margins_N[torch.from_numpy(indices_P).to(run.device)] = stats["margin"]
            flops += forward_flops(run.shape, batch)
            losses.append(losses_P.detach())
    *sums, flops = all_reduce(run, torch.cat([sums_S, sums_S.new_tensor([flops])]), dist.ReduceOp.SUM)
    if not math.isfinite(sums[STATS.index("loss")]):
        raise_non_finite([pairs.pair_ids[i] for i in share], losses)
    means: Record = {name: value / len(batch_B) for name, value in zip(STATS, sums)}
    if not has_loss:
        means["loss"] = None
    num_tokens = int(sums[STATS.index("num_tokens")])
    return {**means, "num_tokens": num_tokens, "num_pairs": len(batch_B), "flops_forward": flops}


def pair_losses(options: DpoOptions, policy_N2: Tensor, inputs: PairInputs) -> Tensor:
    """The configured loss of every pair, [N], from the policy's log-probs of chosen and rejected, [N, 2]."""
    loss = LOSSES[options.loss]
    logps = list(policy_N2.unbind(1))
    if loss.uses_reference:
        assert inputs.reference_N2 is not None, "checked before the first step"
        logps += inputs.reference_N2.unbind(1)
    columns = {name: inputs.columns[name] for name in loss.columns}
    if loss.uses_lengths:
        columns |= dict(zip(("num_tokens_chosen", "num_tokens_rejected"), inputs.num_tokens_N2.unbind(1)))
    return loss.function(*logps, **columns, **loss.parameters(options))


def pair_stats(options: DpoOptions, policy_N2: Tensor, inputs: PairInputs) -> dict[str, Tensor]:
    """`preference_stats` of the rewards that the loss compares: with a reference or without, summed or per token."""
    loss = LOSSES[options.loss]
    reference_N2 = inputs.reference_N2 if loss.uses_reference else torch.zeros_like(policy_N2)
    assert reference_N2 is not None, "checked before the first step"
    if loss.compares_means(options):
        policy_N2, reference_N2 = policy_N2 / inputs.num_tokens_N2, reference_N2 / inputs.num_tokens_N2
    return preference_stats(*policy_N2.unbind(1), *reference_N2.unbind(1), beta=options.beta)


def batch_of(run: Run, pairs: EncodedPairs, indices_P: Indices) -> PackedBatch | PaddedBatch:
    """The pairs as one batch, whatever its size: under ZeRO-3 all workers must call the trunk equally often."""
    groups = [pairs.group(int(index)) for index in indices_P]
    lengths = [(len(group.prompt_tokens), *map(len, group.completion_tokens)) for group in groups]
    batches: list[PackedBatch] | list[PaddedBatch]
    if run.padding_reason is None:
        batches = pack(groups, sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths))
    else:
        # The padding is masked and follows the last token: any id will do.
        batches = pad(groups, 2 * len(groups) * max(map(sum, lengths)), pad_token_id=0)
    (batch,) = batches
    return batch.to(run.device)


def ordered(values_C: Tensor, batch: PackedBatch | PaddedBatch) -> Tensor:
    """A batch's outputs as one row per pair, chosen first, [P, 2]."""
    places = {key: place for place, key in enumerate(batch.completion_index)}
    order = [places[pair, side] for pair in range(len(values_C) // 2) for side in (0, 1)]
    return values_C[torch.tensor(order, device=values_C.device)].view(-1, 2)


def pair_logps(policy: nn.Module, run: Run, pairs: EncodedPairs, indices_P: Indices) -> Tensor:
    """Log-probs of chosen and rejected under a policy (or the engine around it), [P, 2] float64."""
    batch = batch_of(run, pairs, indices_P)
    return ordered(policy(batch), batch)


def forward_flops(shape: ModelShape, batch: PackedBatch | PaddedBatch) -> float:
    """Floating-point operations of one forward pass, by the formula of scoring."""
    area = attention_area(batch.runs) if isinstance(batch, PackedBatch) else batch.attention_area
    return shape.flops(trunk_tokens=batch.trunk_tokens, head_rows=batch.head_rows, attention_area=area)


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
