"""DPO from stored reference log-probs under DeepSpeed: one function, the same on one worker and on many.

    table ─ encode ─► permutation ─► global batch t ─► worker's share ─► micro-batches ─► packed rows ─► engine
                                          └► loss = mean over the pairs of the global batch, exactly

Every worker makes the same number of passes per batch (ZeRO-3 gathers weights inside them); a worker with fewer
micro-batches repeats the batch's shortest pair with weight zero.

Shapes: N pairs, B pairs of a global batch, P pairs of a micro-batch, S = len(STATS), C completions of packed rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from prefsel.errors import IntegrityError, NonFiniteError
from prefsel.models.chat import Encoder
from prefsel.models.loading import load_causal, load_tokenizer, supports_packing
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.tree import PackedBatch, pack
from prefsel.train import checkpoint, data
from prefsel.train.data import EncodedPairs, Indices, TrainingPairs, encode_pairs
from prefsel.train.deepspeed_config import DpoConfig, build_deepspeed_config, lr_factor
from prefsel.train.export import DTYPES, Policy, export_policy, load_policy
from prefsel.train.losses import LOSSES, preference_stats

Record = dict[str, Any]
Report = Callable[[Record, Path | None], None]

STATS = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "num_tokens")
STEP0_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""|loss − ln 2| before the first step. In bf16 a summed log-prob carries about 1 nat of noise, times beta / 2."""
REFERENCE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""|recomputed − stored| / max(1, |stored|). bf16 keeps 8 bits, and packing changes the order of its sums."""
NUM_PROBE_TOKENS = 256
"""Tokens of the first pair whose logits are compared after the export."""
LIKELY_CAUSES = (
    "Likely causes: another tokenizer, chat template, dtype, max_length or truncation than in scoring; another model."
)


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


def train_dpo(
    config: DpoConfig,
    pairs: TrainingPairs,
    eval_pairs: TrainingPairs | None,
    *,
    model_dir: str | Path,
    output_dir: str | Path,
    report: Report,
    resume_dir: Path | None,
) -> dict[str, Any]:
    """Train a policy on preference pairs and export it; every worker calls this with the same arguments.

    Args:
        config: The run's options.
        pairs: What to train on, with stored reference log-probs.
        eval_pairs: Held-out pairs, evaluated at the start, every `eval_every_steps` and at the end; or None.
        model_dir: The initial policy: a Hugging Face folder or hub name.
        output_dir: Receives `history.jsonl`, `checkpoints/step-*`, and `model/`, or `adapter/` and `merged/`. Workers
            may share it or have one each; worker 0 writes history and models.
        report: Called on every worker equally often, with a record and, where one was just saved, its checkpoint.
        resume_dir: A complete checkpoint to continue from, or None for a fresh start.

    Returns:
        `history` (every record since step 0), `num_steps`, `num_pairs`, `dropped` by reason, `num_truncated`,
        `model_dir`, `adapter_dir` (None without LoRA), `max_logit_difference` of the exported model.

    Raises:
        UserError: Options, table, model folder or checkpoint do not fit together.
        IntegrityError: A self-check failed: step-0 loss, reference log-probs, checkpoint digests, exported logits.
        NonFiniteError: A loss or the gradient is NaN or infinite; names the pairs.
    """
    device, output_dir = start_worker(), Path(output_dir)
    tokenizer = load_tokenizer(str(model_dir), revision=config.revision, trust_remote_code=config.trust_remote_code)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.truncation)
    train = encode_pairs(pairs, encoder)
    held_out = encode_pairs(eval_pairs, encoder) if eval_pairs is not None and len(eval_pairs) else None
    torch.manual_seed(config.seed)  # the same adapters on every worker
    model = load_policy(config, str(model_dir), device)
    run = start_run(config, model, device, num_pairs=len(train))
    torch.manual_seed(config.seed + 1 + run.rank)  # other dropout masks on every worker

    identity = checkpoint.run_identity(config, train)
    if resume_dir is None:
        state: Record = {"step": 0, "consumed_pairs": 0, "identity": identity}
        history = start_records(run, train, held_out)
        for record in history:
            report(record, None)
    else:
        state = checkpoint.load_checkpoint(
            run.engine, resume_dir, identity=identity, exclude_frozen=config.lora is not None
        )
        history = checkpoint.read_history(resume_dir)
    optimize(run, train, held_out, state=state, history=history, output_dir=output_dir, report=report)
    probe_tokens = [token for piece in train.pieces(0)[:2] for token in piece][:NUM_PROBE_TOKENS]
    export = export_policy(config, run.engine, tokenizer, str(model_dir), output_dir, probe_tokens=probe_tokens)
    return {
        "history": history,
        "num_steps": run.num_steps,
        "num_pairs": len(train),
        "dropped": train.dropped,
        "num_truncated": train.num_truncated,
        "model_dir": str(export.model_dir),
        "adapter_dir": None if export.adapter_dir is None else str(export.adapter_dir),
        "max_logit_difference": export.max_logit_difference,
    }


def start_worker() -> torch.device:
    """Join the process group that exists or that the launcher's variables describe, or make one of a single worker."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # A launcher shows every worker either all GPUs of its machine or exactly its own one.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return device


def start_run(config: DpoConfig, model: nn.Module, device: torch.device, *, num_pairs: int) -> Run:
    """A DeepSpeed engine around `Policy(model)` with AdamW and the warm-up and cosine schedule."""
    options = config.model_dump(include={"global_batch_pairs", "num_epochs", "max_steps"})
    num_steps = data.num_steps(num_pairs, **options)
    factor = partial(
        lr_factor,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(config.warmup_ratio * num_steps),
        min_ratio=config.min_lr_ratio,
    )
    world_size = dist.get_world_size()
    policy = Policy(model, shares_weights=config.zero_stage == 3 and world_size > 1)
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[parameter for parameter in policy.parameters() if parameter.requires_grad],
        config=build_deepspeed_config(config, world_size=world_size),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
    )
    is_packed, reason = supports_packing(model)
    return Run(config, engine, device, dist.get_rank(), world_size, num_steps, None if is_packed else reason)


def optimize(
    run: Run,
    train: EncodedPairs,
    held_out: EncodedPairs | None,
    *,
    state: Record,
    history: list[Record],
    output_dir: Path,
    report: Report,
) -> None:
    """Take the optimizer steps that `state` says are left, recording, evaluating and saving on the way."""
    config = run.config
    checkpoint.write_history(output_dir, history)
    for step in range(state["step"] + 1, run.num_steps + 1):
        batch_B = next_batch(config, train, state["consumed_pairs"])
        consumed = state["consumed_pairs"] + len(batch_B)
        progress = {"step": step, "epoch": consumed / len(train), "consumed_pairs": consumed}
        records = [{"event": "step", **progress, **train_step(run, train, batch_B)}]
        if held_out and is_due(step, config.eval_every_steps, run.num_steps):
            records.append({"event": "eval", **progress, **evaluate(run, held_out)})
        state |= {"step": step, "consumed_pairs": consumed}
        history += records
        checkpoint.write_history(output_dir, records, append=True)
        saved = None
        if config.checkpoint_every_steps and is_due(step, config.checkpoint_every_steps, run.num_steps):
            saved = output_dir / "checkpoints" / f"step-{step:08d}"
            checkpoint.save_checkpoint(
                run.engine, saved, state=state, history=history, exclude_frozen=config.lora is not None
            )
        for record in records:
            report(record, saved if record is records[-1] else None)
        if saved:
            checkpoint.prune_checkpoints(saved.parent, keep=config.keep_checkpoints)


def is_due(step: int, every_steps: int | None, num_steps: int) -> bool:
    """Whether something done every so many steps, and after the last one, is done after this one."""
    return step == num_steps or (every_steps is not None and step % every_steps == 0)


def next_batch(config: DpoConfig, train: EncodedPairs, consumed_pairs: int) -> Indices:
    """The pairs of the global batch that follows `consumed_pairs`, [B]."""
    options = config.model_dump(include={"global_batch_pairs", "seed", "order"})
    return data.global_batch(consumed_pairs, len(train), **options)


def train_step(run: Run, pairs: EncodedPairs, batch_B: Indices) -> Record:
    """One optimizer step on the mean loss of a global batch; its metrics are those before the update."""
    run.engine.train()
    stats = run_batch(run, pairs, batch_B, is_training=True)
    learning_rate = run.engine.get_lr()[0]
    # Stage 0 in fp32 is a plain optimizer that keeps no norm; its gradients are whole on every worker.
    gradients = [p.grad for p in run.engine.module.parameters() if p.grad is not None]
    own_norm = torch.nn.utils.get_total_norm(gradients) if run.config.zero_stage == 0 else None
    run.engine.step()
    grad_norm = float(run.engine.get_global_grad_norm() if own_norm is None else own_norm)
    if not (math.isfinite(grad_norm) and run.engine.was_step_applied()):
        named = ", ".join(pairs.pair_ids[i] for i in batch_B[:5])
        raise NonFiniteError(f"grad_norm: got {grad_norm} in the batch that begins with pair_ids {named}")
    return {**stats, "lr": learning_rate, "grad_norm": grad_norm}


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


def start_records(run: Run, train: EncodedPairs, held_out: EncodedPairs | None) -> list[Record]:
    """The self-checks, then the evaluation of the untrained policy."""
    step0_loss, reference_error = check_step0_loss(run, train), check_reference(run, train)
    checks = {
        "step0_loss": step0_loss,
        "step0_tolerance": STEP0_TOLERANCE[run.config.dtype],
        "reference_relative_error": reference_error,
        "reference_tolerance": REFERENCE_TOLERANCE[run.config.dtype],
        "padding_reason": run.padding_reason,
    }
    records: list[Record] = [{"event": "self_check", "step": 0, **checks}]
    if held_out:
        records.append({"event": "eval", "step": 0, "epoch": 0.0, "consumed_pairs": 0, **evaluate(run, held_out)})
    return records


def check_step0_loss(run: Run, train: EncodedPairs) -> float | None:
    r"""The loss of the first global batch before any update: ln 2 when the policy is the reference.

    Returns:
        The loss, or None (not checked) when the policy is another model than the reference.

    Raises:
        IntegrityError: It differs from ln 2 by more than `STEP0_TOLERANCE`.
    """
    if not run.config.policy_is_reference:
        return None
    loss, tolerance = evaluate(run, train, next_batch(run.config, train, 0))["loss"], STEP0_TOLERANCE[run.config.dtype]
    if not abs(loss - math.log(2.0)) <= tolerance:
        raise IntegrityError(
            f"step-0 loss: got {loss:.6f}; with policy_is_reference it must be ln 2 = {math.log(2.0):.6f} "
            f"within {tolerance:g}. {LIKELY_CAUSES}"
        )
    return float(loss)


@torch.no_grad()
def check_reference(run: Run, train: EncodedPairs) -> float | None:
    """Recompute the reference log-probs of a few pairs, from the shortest to the longest, and compare.

    Returns:
        The largest relative error, or None (not checked) when the reference model is not at hand.

    Raises:
        IntegrityError: An error above `REFERENCE_TOLERANCE`; names the first pairs.
    """
    config, num_checked = run.config, min(run.config.reference_check_pairs, len(train))
    if num_checked == 0 or not (config.policy_is_reference or config.reference_dir):
        return None
    spread = np.linspace(0, len(train) - 1, num_checked).round().astype(np.int64)
    checked = np.argsort(train.num_tokens_N, kind="stable")[spread]
    reference = run.engine
    if not config.policy_is_reference:
        reference = Policy(load_causal(str(config.reference_dir), dtype=DTYPES[config.dtype], device=run.device))
    reference.eval()
    # The same pairs on every worker: a few sequences are cheaper than agreeing on who failed.
    recomputed_N2 = (
        torch.cat([pair_logps(reference, run, train, checked[[i]]) for i in range(num_checked)]).cpu().numpy()
    )
    stored_N2 = train.reference_logps_N2[checked]
    error_N = (np.abs(recomputed_N2 - stored_N2) / np.maximum(1.0, np.abs(stored_N2))).max(axis=1)
    bad = np.flatnonzero(~(error_N <= REFERENCE_TOLERANCE[config.dtype]))
    if len(bad):
        shown = "; ".join(
            f"pair_id {train.pair_ids[checked[i]]} stored {stored_N2[i].tolist()}, got {recomputed_N2[i].tolist()}"
            for i in bad[:3]
        )
        raise IntegrityError(
            f"reference log-probs: {len(bad)} of {num_checked} recomputed pairs differ by more than "
            f"{REFERENCE_TOLERANCE[config.dtype]:g} relative: {shown}. {LIKELY_CAUSES}"
        )
    return float(error_N.max())


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
