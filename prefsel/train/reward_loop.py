"""Bradley–Terry reward models under DeepSpeed: one function, the same on one worker and on many.

    table ─ encode ─┬─► held-out prompts ─► accuracy and calibration, before and after
                    └─► draws ─► global batch t ─► worker's share ─► micro-batches ─► packed rows ─► engine
                         └ balanced by length         └► loss = mean over the draws of the global batch, exactly

Shapes: B draws of a global batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prefsel.errors import NonFiniteError
from prefsel.models.chat import Encoder
from prefsel.models.loading import load_tokenizer
from prefsel.models.packing import PackedBatch, pack
from prefsel.models.padded import PaddedBatch, pad
from prefsel.models.reward import supports_packed_rewards
from prefsel.train import checkpoint, data
from prefsel.train.data import Indices
from prefsel.train.deepspeed_config import build_deepspeed_config, lr_factor
from prefsel.train.export import shape_of
from prefsel.train.loop import is_due, start_worker
from prefsel.train.reward_batch import Record, RewardRun, batch_record, evaluate
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_data import RewardPairs, Sampling, encode_reward_pairs, next_draws, plan_sampling
from prefsel.train.reward_export import RewardModule, export_reward_model, load_start

Report = Callable[[Record, Path | None], None]

NUM_PROBE_PAIRS = 4
"""Pairs whose rewards are compared after the export, the shortest ones: they are run one by one on a CPU."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is measured on."""

    pairs: RewardPairs
    sampling: Sampling
    held_out: Indices


def train_reward_model(
    config: RewardConfig,
    pairs: pa.Table,
    *,
    model_dir: str | Path,
    output_dir: str | Path,
    report: Report,
    resume_dir: Path | None,
) -> dict[str, Any]:
    """Train a reward model on labelled pairs and export it; every worker calls this with the same arguments.

    Args:
        config: The run's options.
        pairs: Columns pair_id, prompt_id (hex strings or 16 bytes), prompt, chosen, rejected (messages).
        model_dir: Where the weights start: the Hugging Face folder or hub name of a classifier with one output, or of
            a causal language model, whose trunk gets a fresh head.
        output_dir: Receives `history.jsonl`, `checkpoints/step-*` and `model/`, in it `trained_on.parquet`. Workers
            may share it or have one each; worker 0 writes history and model.
        report: Called on every worker equally often, with a record and, where one was just saved, its checkpoint.
        resume_dir: A complete checkpoint to continue from, or None for a fresh start.

    Returns:
        Plain JSON: `history` (every record since the start), `num_steps`, `num_pairs` trained on, `dropped` by reason
        (with `reward_holdout`, the held-out pairs: all pairs of the table are in one of the two), `num_truncated`;
        `sampling` (see `reward_data.Sampling.facts`); `holdout_before` and `holdout_after`, see
        `calibration.holdout_report`, None with fewer than two held-out pairs; `flops_forward` of the training passes,
        by the formula of scoring, and `flops_train`, 3 times that, or 4 times with gradient checkpointing; `model_dir`
        and `max_output_difference` of the exported model.

    Raises:
        UserError: Options, table, model folder or checkpoint do not fit together.
        IntegrityError: The checkpoint's digests or the exported model's rewards are not what they must be.
        NonFiniteError: A reward or the gradient is NaN or infinite; names the pairs.
    """
    device, output_dir = start_worker(), Path(output_dir)
    tokenizer = load_tokenizer(str(model_dir), revision=config.revision, trust_remote_code=config.trust_remote_code)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.truncation)
    corpus = split_corpus(encode_reward_pairs(pairs, encoder, config), config)
    run = start_run(config, load_start(config, str(model_dir), tokenizer, device), device, corpus)
    if run.rank == 0:
        for warning in corpus.sampling.facts["warnings"]:
            logger.warning("%s", warning)
    identity = run_identity(config, corpus)
    if resume_dir is None:
        state: Record = {"step": 0, "consumed_pairs": 0, "identity": identity}
        history = start_records(run, corpus)
        for record in history:
            report(record, None)
    else:
        state = checkpoint.load_checkpoint(run.engine, resume_dir, identity=identity)
        history = checkpoint.read_history(resume_dir)
    optimize(run, corpus, state=state, history=history, output_dir=output_dir, report=report)
    probe, probe_tokens = probe_batch(run, corpus)
    folder, difference = export_reward_model(
        config,
        run.engine,
        tokenizer,
        output_dir,
        prompt_ids=corpus.pairs.prompt_ids,
        probe=probe,
        probe_tokens=probe_tokens,
    )
    evaluations = [record["holdout"] for record in history if record["event"] == "eval"]
    flops = sum(record["flops_forward"] for record in history if record["event"] == "step")
    return {
        "history": history,
        "num_steps": run.num_steps,
        "num_pairs": len(corpus.sampling.members),
        "dropped": {**corpus.pairs.dropped, "reward_holdout": len(corpus.held_out)},
        "num_truncated": corpus.pairs.num_truncated,
        "sampling": corpus.sampling.facts,
        "holdout_before": evaluations[0] if evaluations else None,
        "holdout_after": evaluations[-1] if evaluations else None,
        "flops_forward": flops,
        "flops_train": flops * (4 if config.gradient_checkpointing else 3),
        "model_dir": str(folder),
        "max_output_difference": difference,
    }


def split_corpus(pairs: RewardPairs, config: RewardConfig) -> Corpus:
    """The pairs to draw from, and those held out."""
    members, held_out = np.flatnonzero(~pairs.is_held_out_N), np.flatnonzero(pairs.is_held_out_N)
    return Corpus(pairs, plan_sampling(members, pairs.length_difference_N, config.length_balance_tau), held_out)


def start_run(config: RewardConfig, model: nn.Module, device: torch.device, corpus: Corpus) -> RewardRun:
    """A DeepSpeed engine around the model with AdamW and the warm-up and cosine schedule."""
    options = config.model_dump(include={"global_batch_pairs", "num_epochs", "max_steps"})
    num_steps = data.num_steps(len(corpus.sampling.members), **options)
    factor = partial(
        lr_factor,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(config.warmup_ratio * num_steps),
        min_ratio=config.min_lr_ratio,
    )
    module, world_size = RewardModule(model), dist.get_world_size()
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config=build_deepspeed_config(config, world_size=world_size),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
    )
    is_packed, reason = supports_packed_rewards(model)
    return RewardRun(
        config=config,
        engine=engine,
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        num_steps=num_steps,
        pad_token_id=model.config.pad_token_id,
        padding_reason=None if is_packed else reason,
        shape=shape_of(model),
    )


def run_identity(config: RewardConfig, corpus: Corpus) -> Record:
    """What must be the same for a checkpoint to be continued: the pairs, and every option that moves a weight."""
    pairs = corpus.pairs
    digest = hashlib.blake2b("".join(pairs.pair_ids).encode(), digest_size=16)
    for array in (pairs.tokens_T, pairs.offsets, pairs.length_difference_N, pairs.is_held_out_N):
        digest.update(array.tobytes())
    return {"pairs": digest.hexdigest(), **config.model_dump(mode="json", exclude=checkpoint.FREE_OPTIONS)}


def start_records(run: RewardRun, corpus: Corpus) -> list[Record]:
    """How the pairs are drawn, then the evaluation of the untrained model."""
    records: list[Record] = [
        {"event": "sampling", "step": 0, **corpus.sampling.facts, "padding_reason": run.padding_reason}
    ]
    return records + eval_records(run, corpus, {"step": 0, "epoch": 0.0, "consumed_pairs": 0})


def eval_records(run: RewardRun, corpus: Corpus, progress: Record) -> list[Record]:
    """The evaluation as a record, its main numbers on top; none with fewer than two held-out pairs."""
    found = evaluate(run, corpus.pairs, corpus.held_out)
    if found is None:
        return []
    main = {name: found[name] for name in ("loss", "accuracy", "margin", "num_pairs")}
    return [{"event": "eval", **progress, **main, "holdout": found}]


def optimize(
    run: RewardRun, corpus: Corpus, *, state: Record, history: list[Record], output_dir: Path, report: Report
) -> None:
    """Take the optimizer steps that `state` says are left, recording, evaluating and saving on the way."""
    config, num_pairs = run.config, len(corpus.sampling.members)
    checkpoint.write_history(output_dir, history)
    for step in range(state["step"] + 1, run.num_steps + 1):
        draws_B = next_draws(corpus.sampling, config, state["consumed_pairs"])
        consumed = state["consumed_pairs"] + len(draws_B)
        progress = {"step": step, "epoch": consumed / num_pairs, "consumed_pairs": consumed}
        records = [{"event": "step", **progress, **train_step(run, corpus.pairs, draws_B)}]
        if is_due(step, config.eval_every_steps, run.num_steps):
            records += eval_records(run, corpus, progress)
        state |= {"step": step, "consumed_pairs": consumed}
        history += records
        checkpoint.write_history(output_dir, records, append=True)
        saved = None
        if config.checkpoint_every_steps and is_due(step, config.checkpoint_every_steps, run.num_steps):
            saved = output_dir / "checkpoints" / f"step-{step:08d}"
            checkpoint.save_checkpoint(run.engine, saved, state=state, history=history)
        for record in records:
            report(record, saved if record is records[-1] else None)
        if saved:
            checkpoint.prune_checkpoints(saved.parent, keep=config.keep_checkpoints)


def train_step(run: RewardRun, pairs: RewardPairs, draws_B: Indices) -> Record:
    """One optimizer step on the mean loss of a global batch; its metrics are those before the update."""
    run.engine.train()
    stats = batch_record(run, pairs, draws_B, is_training=True)
    learning_rate = run.engine.get_lr()[0]
    # Stage 0 in fp32 is a plain optimizer that keeps no norm; its gradients are whole on every worker.
    gradients = [p.grad for p in run.engine.module.parameters() if p.grad is not None]
    own_norm = torch.nn.utils.get_total_norm(gradients) if run.config.zero_stage == 0 else None
    run.engine.step()
    grad_norm = float(run.engine.get_global_grad_norm() if own_norm is None else own_norm)
    if not (math.isfinite(grad_norm) and run.engine.was_step_applied()):
        named = ", ".join(pairs.pair_ids[i] for i in draws_B[:5])
        raise NonFiniteError(f"grad_norm: got {grad_norm} in the batch that begins with pair_ids {named}")
    return {**stats, "lr": learning_rate, "grad_norm": grad_norm}


def probe_batch(run: RewardRun, corpus: Corpus) -> tuple[PackedBatch | PaddedBatch, list[list[int]]]:
    """The shortest pairs as one batch, and each of its completions with its prompt as a sequence of its own."""
    shortest = np.argsort(corpus.pairs.num_tokens_N, kind="stable")[:NUM_PROBE_PAIRS]
    groups = [corpus.pairs.group(int(index)) for index in shortest]
    budget = 2 * len(groups) * int(corpus.pairs.num_tokens_N[shortest].max())
    batch: PackedBatch | PaddedBatch
    if run.padding_reason is None:
        (batch,) = pack(groups, budget)
    else:
        (batch,) = pad(groups, budget, pad_token_id=run.pad_token_id)
    starts = [group.prompt_starts or (0, 0) for group in groups]
    tokens = [
        groups[group].prompt_tokens[starts[group][side] :] + groups[group].completion_tokens[side]
        for group, side in batch.completion_index
    ]
    return batch, tokens
