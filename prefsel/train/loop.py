"""The training loop under DeepSpeed: one function for every objective, the same on one worker and on many.

    pairs ─ tokens ─► draws ─► global batch t ─► worker's share ─► micro-batches ─► packed rows ─► engine
                                      └► loss = mean over the draws of the global batch, exactly
    every so often: evaluation, checkpoint        at the end: export, reloaded and compared

No Ray here: a notebook, a profiler or a lone GPU may call it.

    config = DpoConfig(policy_is_reference=True, learning_rate=1e-6, max_length=2048)
    train(Preference(config), TrainingPairs.from_parquet("pairs"), model_dir="my-model", output_dir="out")
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from prefsel.errors import NonFiniteError
from prefsel.models.chat import Encoder
from prefsel.models.loading import check_vocabulary, load_tokenizer
from prefsel.train import checkpoint
from prefsel.train.batch import evaluate, run_batch
from prefsel.train.data import EncodedPairs, Indices, TrainingPairs
from prefsel.train.draws import next_batch
from prefsel.train.engine import start_run, start_worker
from prefsel.train.export import export_model
from prefsel.train.objective import Corpus, Objective, Record, Report, Run, mean_record
from prefsel.train.randomness import require_equal_forwards


def train(
    objective: Objective,
    pairs: TrainingPairs,
    eval_pairs: TrainingPairs | None = None,
    *,
    model_dir: str | Path,
    output_dir: str | Path,
    report: Report = lambda record, checkpoint_dir: None,
    resume_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a model on pairs and export it; every worker calls this with the same arguments.

    Args:
        objective: What is trained and how: `Preference(DpoConfig(…))` or `BradleyTerry(RewardConfig(…))`.
        pairs: What to train on, with the columns that the objective asks for.
        eval_pairs: Held-out pairs, evaluated at the start, every `eval_every_steps` and at the end; None where there
            are none, or where the objective holds prompts out itself.
        model_dir: The initial model: a Hugging Face folder or hub name.
        output_dir: Receives `history.jsonl`, `checkpoints/step-*`, and `model/`, or `adapter/` and `merged/`. Workers
            may share it or have one each; worker 0 writes history and model.
        report: Called on every worker equally often, with a record and, where one was just saved, its checkpoint.
        resume_dir: A complete checkpoint to continue from, or None for a fresh start.

    Returns:
        Plain JSON: `history` (every record since step 0), `num_steps`, `num_pairs` of an epoch, `dropped` by reason,
        `examples` with the first pair of each, `num_truncated`; `flops_forward` of all training passes, by the formula
        of scoring, and `flops_train`, 3 times that, or 4 times with gradient checkpointing (with adapters an upper
        bound: frozen weights need no gradient); `model_dir` of the exported model, `adapter_dir` (None without LoRA);
        and what the objective adds in `finish`. Where the objective says the `margins` of single pairs, the first and
        the last evaluation of `history` hold
        them.

    Raises:
        UserError: Options, table, model folder or checkpoint do not fit together; or the model's forward stays random
            in training although its dropout is off.
        IntegrityError: A self-check failed: what the objective checks before the first step, checkpoint digests, or
            the outputs of the exported model.
        NonFiniteError: An output, a loss or the gradient is NaN or infinite; names the pairs.
    """
    config, device, output_dir = objective.config, start_worker(), Path(output_dir)
    tokenizer = load_tokenizer(str(model_dir), revision=config.revision, trust_remote_code=config.trust_remote_code)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.truncation)
    corpus = objective.prepare(pairs, eval_pairs, encoder)
    torch.manual_seed(config.seed)  # the same adapters on every worker
    model = objective.load_model(str(model_dir), tokenizer, device)
    check_vocabulary(tokenizer, model, path=str(model_dir))
    run = start_run(objective, model, device, num_pairs=corpus.draws.num_pairs)
    require_equal_forwards(run, corpus.pairs)
    torch.manual_seed(config.seed + 1 + run.rank)  # other dropout masks on every worker

    identity = checkpoint.run_identity(config, corpus.digest)
    if resume_dir is None:
        state: Record = {"step": 0, "consumed_pairs": 0, "identity": identity}
        history = [objective.start_record(run, corpus)]
        history += _eval_records(run, corpus, {"step": 0, "epoch": 0.0, "consumed_pairs": 0})
        for record in history:
            report(record, None)
    else:
        state = checkpoint.load_checkpoint(run.engine, resume_dir, identity=identity)
        history = checkpoint.read_history(resume_dir)
    _optimize(run, corpus, state=state, history=history, output_dir=output_dir, report=report)
    probe = objective.probe(run, corpus)
    export = export_model(run, tokenizer, str(model_dir), output_dir, probe=probe, prompt_ids=corpus.prompt_ids)
    flops_forward = sum(record["flops_forward"] for record in history if record["event"] == "step")
    return {
        "history": history,
        "num_steps": run.num_steps,
        "num_pairs": corpus.draws.num_pairs,
        "dropped": dict(corpus.dropped),
        "examples": corpus.pairs.examples,
        "num_truncated": corpus.pairs.num_truncated,
        "flops_forward": flops_forward,
        "flops_train": flops_forward * (4 if config.gradient_checkpointing else 3),
        "model_dir": str(export.model_dir),
        "adapter_dir": None if export.adapter_dir is None else str(export.adapter_dir),
        "max_output_difference": export.max_difference,
        **objective.finish(run, corpus, history, output_dir),
    }


def _optimize(
    run: Run, corpus: Corpus, *, state: Record, history: list[Record], output_dir: Path, report: Report
) -> None:
    """Take the optimizer steps that `state` says are left, recording, evaluating and saving on the way."""
    config = run.objective.config
    checkpoint.write_history(output_dir, history)
    for step in range(state["step"] + 1, run.num_steps + 1):
        draws_B = next_batch(corpus.draws, state["consumed_pairs"], config.global_batch_pairs)
        consumed = state["consumed_pairs"] + len(draws_B)
        progress = {"step": step, "epoch": consumed / corpus.draws.num_pairs, "consumed_pairs": consumed}
        records = [{"event": "step", **progress, **train_step(run, corpus.pairs, draws_B)}]
        if _is_due(step, config.eval_every_steps, run.num_steps):
            records += _eval_records(run, corpus, progress)
        state |= {"step": step, "consumed_pairs": consumed}
        history += records
        checkpoint.write_history(output_dir, records, append=True)
        saved = None
        if config.checkpoint_every_steps and _is_due(step, config.checkpoint_every_steps, run.num_steps):
            saved = output_dir / "checkpoints" / f"step-{step:08d}"
            checkpoint.save_checkpoint(run.engine, saved, state=state, history=history)
        for record in records:
            report(record, saved if record is records[-1] else None)
        if saved:
            checkpoint.prune_checkpoints(saved.parent, keep=config.keep_checkpoints)


def _is_due(step: int, every_steps: int | None, num_steps: int) -> bool:
    """Whether something done every so many steps, and after the last one, is done after this one."""
    return step == num_steps or (every_steps is not None and step % every_steps == 0)


def _eval_records(run: Run, corpus: Corpus, progress: Record) -> list[Record]:
    """The evaluation as a record; none where nothing is held out.

    Two trainings are compared by the margins of single pairs at their ends; those on the way would only be bulk.
    """
    if not len(corpus.eval_indices):
        return []
    record = {"event": "eval", **progress, **evaluate(run, corpus.eval_pairs, corpus.eval_indices)}
    if progress["step"] not in (0, run.num_steps):
        record.pop("margins", None)
    return [record]


def train_step(run: Run, pairs: EncodedPairs, draws_B: Indices) -> Record:
    """One optimizer step on the mean loss of a global batch; its metrics are those before the update.

    Raises:
        NonFiniteError: An output, a loss or the gradient is NaN or infinite; names the pairs.
    """
    run.engine.train()
    measured = run_batch(run, pairs, draws_B, is_training=True)
    learning_rate = run.engine.get_lr()[0]
    # Stage 0 in fp32 is a plain optimizer that keeps no norm; its gradients are whole on every worker.
    gradients = [p.grad for p in run.engine.module.parameters() if p.grad is not None]
    is_plain = run.objective.config.zero_stage == 0
    own_norm = torch.nn.utils.get_total_norm(gradients) if is_plain else None
    run.engine.step()
    grad_norm = float(run.engine.get_global_grad_norm() if own_norm is None else own_norm)
    if not (math.isfinite(grad_norm) and run.engine.was_step_applied()):
        named = ", ".join(pairs.pair_ids[i] for i in draws_B[:5])
        raise NonFiniteError(f"grad_norm: got {grad_norm} in the batch that begins with pair_ids {named}")
    return {**mean_record(pairs, draws_B, measured), "lr": learning_rate, "grad_norm": grad_norm}
