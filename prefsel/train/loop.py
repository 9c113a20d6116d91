"""Preference losses from stored reference log-probs under DeepSpeed: one function, the same on one worker and on many.

    table ─ encode ─► permutation ─► global batch t ─► worker's share ─► micro-batches ─► packed rows ─► engine
                                          └► loss = mean over the pairs of the global batch, exactly

Shapes: B pairs of a global batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prefsel.errors import NonFiniteError
from prefsel.models.chat import Encoder
from prefsel.models.loading import load_tokenizer, supports_packing
from prefsel.train import checkpoint, data
from prefsel.train.batch import Record, Run, held_out_record, next_batch, run_batch
from prefsel.train.data import EncodedPairs, Indices, TrainingPairs, columns_for, encode_pairs
from prefsel.train.deepspeed_config import DpoConfig, build_deepspeed_config, lr_factor
from prefsel.train.export import Policy, export_optimizer_state, export_policy, load_policy, shape_of
from prefsel.train.selfchecks import start_records

Report = Callable[[Record, Path | None], None]

NUM_PROBE_TOKENS = 256
"""Tokens of the first pair whose logits are compared after the export."""


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
        pairs: What to train on, with stored reference log-probs unless the loss has no reference, and the columns that
            the loss and the order need (`data.columns_for`).
        eval_pairs: Held-out pairs, evaluated at the start, every `eval_every_steps` and at the end; or None. They may
            lack `preference_divergence`: then their `loss` is None.
        model_dir: The initial policy: a Hugging Face folder or hub name.
        output_dir: Receives `history.jsonl`, `checkpoints/step-*`, and `model/`, or `adapter/` and `merged/`; with
            `keep_optimizer_state` also `optimizer/`. Workers may share it or have one each; worker 0 writes history,
            models and moments.
        report: Called on every worker equally often, with a record and, where one was just saved, its checkpoint.
        resume_dir: A complete checkpoint to continue from, or None for a fresh start.

    Returns:
        `history` (every record since step 0; the first and the last evaluation hold `margins`, those of the pairs
        `held_out_ids`, None without any), `num_steps`, `num_pairs`, `dropped` by reason, `num_truncated`,
        `model_dir`, `adapter_dir` (None without LoRA), `max_logit_difference` of the exported model, `optimizer_dir`
        (None unless kept); `flops_forward` of all training passes, by the formula of scoring, and `flops_train`, 3
        times that, or 4 times with gradient checkpointing (with adapters an upper bound: frozen weights need no
        gradient).

    Raises:
        UserError: Options, table, model folder or checkpoint do not fit together.
        IntegrityError: A self-check failed: step-0 loss, reference log-probs, checkpoint digests, exported logits.
        NonFiniteError: A loss or the gradient is NaN or infinite; names the pairs.
    """
    device, output_dir = start_worker(), Path(output_dir)
    tokenizer = load_tokenizer(str(model_dir), revision=config.revision, trust_remote_code=config.trust_remote_code)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.truncation)
    train, held_out = encode_pairs(pairs, encoder, columns_for(config, pairs)), None
    if eval_pairs is not None and len(eval_pairs):
        held_out = encode_pairs(eval_pairs, encoder, columns_for(config, eval_pairs, is_training=False))
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
    optimizer_dir, steps = None, [record for record in history if record["event"] == "step"]
    if config.keep_optimizer_state:
        last = {"step": run.num_steps, "learning_rate": steps[-1]["lr"]}
        optimizer_dir = str(export_optimizer_state(config, run.engine, output_dir, **last))
    flops_forward = sum(record["flops_forward"] for record in steps)
    return {
        "history": history,
        "held_out_ids": held_out.pair_ids if held_out else None,
        "num_steps": run.num_steps,
        "num_pairs": len(train),
        "dropped": train.dropped,
        "num_truncated": train.num_truncated,
        "model_dir": str(export.model_dir),
        "adapter_dir": None if export.adapter_dir is None else str(export.adapter_dir),
        "max_logit_difference": export.max_logit_difference,
        "optimizer_dir": optimizer_dir,
        "flops_forward": flops_forward,
        "flops_train": flops_forward * (4 if config.gradient_checkpointing else 3),
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
    shape = shape_of(model)
    policy = Policy(model, shares_weights=config.zero_stage == 3 and world_size > 1)
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[parameter for parameter in policy.parameters() if parameter.requires_grad],
        config=build_deepspeed_config(config, world_size=world_size),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
    )
    is_packed, reason = supports_packing(model)
    padding_reason = None if is_packed else reason
    return Run(config, engine, device, dist.get_rank(), world_size, num_steps, padding_reason, shape)


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
            records.append(held_out_record(run, held_out, progress))
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
