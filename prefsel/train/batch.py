"""One global batch through the engine, spread over the workers: forward, backward, and what was seen of every pair.

Every worker makes the same number of passes per batch (ZeRO-3 gathers weights inside them); a worker with fewer
micro-batches repeats the batch's shortest pair with weight zero.

Shapes: B draws of a global batch, P pairs of a micro-batch, K numbers of each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prefsel.errors import NonFiniteError
from prefsel.models.layout import attention_area
from prefsel.models.packing import ModelShape, PackedBatch
from prefsel.models.pair_batch import Batch, by_pair, pair_batch
from prefsel.train import draws
from prefsel.train.data import EncodedPairs, Indices, Numbers
from prefsel.train.objective import Measured, Record, Run


@torch.no_grad()
def evaluate(run: Run, pairs: EncodedPairs, indices_B: Indices) -> Record:
    """What the objective says about these pairs under the weights of now; every worker takes part.

    Raises:
        NonFiniteError: An output or a loss is NaN or infinite.
    """
    run.engine.eval()
    return run.objective.evaluation(pairs, indices_B, run_batch(run, pairs, indices_B, is_training=False))


def run_batch(run: Run, pairs: EncodedPairs, draws_B: Indices, *, is_training: bool) -> Measured:
    """Forward (and backward) every draw of a global batch once, spread over the workers.

    Args:
        run: Engine and objective.
        pairs: What `draws_B` counts.
        draws_B: The pairs of the batch; one may be in it twice.
        is_training: Whether to add the gradient of the batch's mean loss.

    Returns:
        What the objective measures of every draw; the same on every worker.

    Raises:
        NonFiniteError: An output or a loss is NaN or infinite; no weight was changed.
    """
    config, length_B = run.objective.config, pairs.num_tokens_N[draws_B]
    # Positions in the batch, not pairs: a pair may have been drawn twice.
    share = draws.rank_share(np.arange(len(draws_B)), length_B, rank=run.rank, world_size=run.world_size)
    limits = {"micro_batch_pairs": config.micro_batch_pairs, "token_budget": config.token_budget}
    micro = draws.micro_batches(share, length_B[share], **limits)
    num_passes = torch.tensor(len(micro), device=run.device)
    dist.all_reduce(num_passes, op=dist.ReduceOp.MAX)
    shortest = np.array([np.argmin(length_B)])
    # What other workers fill in stays 0; the last number counts FLOPs.
    found = torch.zeros(2 * len(draws_B) + 1, dtype=torch.float64, device=run.device)
    for number in range(int(num_passes)):
        is_idle = number >= len(micro)
        at_P = shortest if is_idle else micro[number]
        outputs_P2, flops = pair_outputs(run, pairs, draws_B[at_P])
        if is_training:
            run.engine.set_gradient_accumulation_boundary(number == int(num_passes) - 1)
            losses_P = run.objective.losses(outputs_P2, pairs, draws_B[at_P])
            # DeepSpeed averages gradients over the workers, hence the factor.
            weight = 0.0 if is_idle else run.world_size / len(draws_B)
            run.engine.backward(losses_P.sum() * weight, scale_wrt_gas=False)
        if not is_idle:
            found[:-1].view(-1, 2)[torch.from_numpy(at_P).to(run.device)] = outputs_P2.detach()
            found[-1] += flops
    dist.all_reduce(found, op=dist.ReduceOp.SUM)
    outputs_B2 = found[:-1].view(-1, 2).cpu().numpy()
    _refuse_non_finite(outputs_B2, "output", pairs, draws_B)
    numbers = run.objective.measures(outputs_B2, pairs, draws_B)
    if "loss" in numbers:
        _refuse_non_finite(numbers["loss"][:, None], "loss", pairs, draws_B)
    return Measured(numbers, float(found[-1]))


def pair_outputs(run: Run, pairs: EncodedPairs, indices_P: Indices) -> tuple[Tensor, float]:
    """The engine's outputs for chosen and rejected, [P, 2] float64, and the FLOPs of the forward pass.

    One batch, whatever its size: under ZeRO-3 all workers must call the trunk equally often.
    """
    groups = [pairs.group(int(index)) for index in indices_P]
    batch = pair_batch(groups, is_packed=run.padding_reason is None, pad_token_id=run.pad_token_id).to(run.device)
    return by_pair(run.engine(batch), batch), _forward_flops(run.shape, batch)


def _forward_flops(shape: ModelShape, batch: Batch) -> float:
    """Floating-point operations of one forward pass, by the formula of scoring."""
    area = attention_area(batch.segments) if isinstance(batch, PackedBatch) else batch.attention_area
    return shape.flops(trunk_tokens=batch.trunk_tokens, head_rows=batch.head_rows, attention_area=area)


def _refuse_non_finite(values_BK: Numbers, what: str, pairs: EncodedPairs, draws_B: Indices) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(values_BK).all(axis=1))):
        named = ", ".join(pairs.pair_ids[index] for index in draws_B[bad[:5]])
        raise NonFiniteError(f"{what}: NaN or infinite for pair_ids {named}; no weight was changed")
