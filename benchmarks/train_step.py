"""A DPO optimizer step on real pairs: packed rows and stored reference log-probs against TRL's, same weights and batch.

    python benchmarks/train_step.py [--data FOLDER] [--batch 8] [--repeats 5] [--write] [--quick]

Ours is the product's `train_step`, DeepSpeed engine included (stage 0, fp32: a plain torch AdamW). TRL's is
`DPOTrainer.training_step` on its collator's batch, then what its loop does next: clipping, torch AdamW, zeroed
gradients. Both begin at token ids and take one epoch over the same pairs in the same batches at a constant learning
rate. TRL runs with log-probs of the reference at hand and with a live reference, its default; padding-free rows, its
other flag, are switched off in the installed version. Ours with a live reference scores each batch first.

Limits are 3 F_TRL / 3 F_min with stored, (3 + 1) F_TRL / 3 F_min with live log-probs of the reference; neither has
the optimizer, nor the logits that TRL computes again in its backward pass. Both policies are moved off the reference
first, so that no loss is ln 2.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from score_throughput import SIZES, Case, cases, flops_trl, ordinary, packed_pass, shrink
from torch.utils.flop_counter import FlopCounterMode

from prefsel.models.architecture import model_shape
from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import logps_route
from prefsel.models.packing import flops_min
from prefsel.train.batch import run_batch
from prefsel.train.data import EncodedPairs
from prefsel.train.engine import start_run, start_worker
from prefsel.train.loop import train_step
from prefsel.train.objective import Run
from prefsel.train.preference import Preference
from prefsel.train.run_config import DpoConfig

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
"""Of every loss of the epoch, absolute, beyond what TRL's fp32 sums resolve (`resolution`); and of all gradients of the
first batch, |difference| / |gradient|: in fp32 those of chosen and rejected cancel in part."""
NUM_GROUPS = {"uf_groups": 8, "hh_groups": 16, "qa_groups": 4}
"""Fewer than when scoring: a batch of 8 of UltraFeedback takes TRL 20 seconds and more on two cores."""
BETA, LEARNING_RATE = 0.1, 1e-6
NOISE = 0.02
"""Of each weight's deviation: moves the losses by hundredths and more."""


@dataclass(frozen=True)
class Sides:
    """One epoch of each way, and the two trainers."""

    run: Run
    pairs: EncodedPairs
    batches: list[np.ndarray]
    trainer: Any
    examples: list[dict[str, Any]]
    epochs: dict[str, Callable[[], list[float]]]
    """Name → losses of the steps."""


def pair_groups(case: Case) -> list[EncodedGroup]:
    """Every pair as a prompt with two completions, chosen first."""
    return [
        EncodedGroup(group.prompt_tokens, [group.completion_tokens[side] for side in sides], ["ok", "ok"], 0)
        for group, sides in ((case.groups[number], sides) for number, *sides in case.pairs)
    ]


def encoded(groups: list[EncodedGroup], reference_N2: np.ndarray) -> EncodedPairs:
    """The pairs as the training loop holds them."""
    pieces = [tokens for group in groups for tokens in (group.prompt_tokens, *group.completion_tokens)]
    return EncodedPairs(
        pair_ids=[f"{number:032x}" for number in range(len(groups))],
        tokens_T=np.concatenate(pieces).astype(np.int32),
        offsets=np.cumsum([0, *map(len, pieces)]),
        prompt_starts_N2=np.zeros((len(groups), 2), np.int32),
        reference_logps_N2=reference_N2,
        dropped={},
        num_truncated=0,
        rows_N=np.arange(len(groups)),
    )


def reference_logps(model: Any, groups: list[EncodedGroup], token_budget: int = 8192) -> np.ndarray:
    """Log-probs of every pair by the scoring pass, [N, 2]."""
    values = packed_pass(model, logps_route(model), groups, token_budget)
    return np.array([[values[number, side][0] for side in (0, 1)] for number in range(len(groups))])


def moved(model: Any) -> Any:
    """A policy a little off its reference."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter += NOISE * (parameter.std() if parameter.ndim > 1 else 1.0) * noise
    return policy


def our_run(policy: Any, num_pairs: int, batch: int) -> Run:
    """The product's engine around a policy, at a constant learning rate."""
    config = DpoConfig(
        policy_is_reference=False,
        max_length=None,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        dtype="fp32",
        global_batch_pairs=batch,
        micro_batch_pairs=batch,
        zero_stage=0,
        warmup_ratio=0.0,
        min_lr_ratio=1.0,
        order="given",
    )
    return start_run(Preference(config), policy, start_worker(), num_pairs=num_pairs)


def trl_trainer(case: Case, policy: Any) -> tuple[Any, list[dict[str, Any]]]:
    """TRL's trainer of the policy with a live reference, and its tokenised pairs.

    Raises:
        SystemExit: Its tokens are not ours.
    """
    import datasets
    import trl

    datasets.disable_progress_bars()
    rows = [
        {name: case.rows[group]["completions"][side] for name, side in (("chosen", chosen), ("rejected", rejected))}
        | {"prompt": case.rows[group]["prompt"]}
        for group, chosen, rejected in case.pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=ordinary(policy),
            ref_model=ordinary(case.model),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=case.tokenizer,
            args=trl.DPOConfig(
                output_dir=folder,
                beta=BETA,
                max_length=None,
                bf16=False,
                use_cpu=policy.device.type == "cpu",
                gradient_checkpointing=False,
                report_to=[],
            ),
        )
    trainer.current_gradient_accumulation_steps = 1  # its loop sets it
    examples = trainer.train_dataset.to_list()
    for example, group in zip(examples, pair_groups(case), strict=True):
        if [example[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] != [
            group.prompt_tokens,
            *group.completion_tokens,
        ]:
            raise SystemExit(f"{case.name}: TRL's tokens are not ours")
    return trainer, examples


def sides_of(case: Case, batch: int) -> Sides:
    """Both trainers at the same weights, reference log-probs at hand."""
    groups, policy = pair_groups(case), moved(case.model)
    pairs = encoded(groups, reference_logps(case.model, groups))
    batches = [np.arange(start, min(start + batch, len(pairs))) for start in range(0, len(pairs), batch)]
    trainer, examples = trl_trainer(case, policy)
    for example, (chosen, rejected) in zip(examples, pairs.reference_logps_N2.tolist(), strict=True):
        example |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    run = our_run(policy, len(pairs), batch)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def ours(is_live: bool) -> list[float]:
        losses = []
        for batch_B in batches:
            known = pairs
            if is_live:
                known_N2 = np.full((len(pairs), 2), np.nan)
                known_N2[batch_B] = reference_logps(case.model, [groups[index] for index in batch_B])
                known = replace(pairs, reference_logps_N2=known_N2)
            losses.append(train_step(run, known, batch_B)["loss"])
        return losses

    def trls(is_live: bool) -> list[float]:
        trainer.precompute_ref_logps, losses = not is_live, []
        for batch_B in batches:
            inputs = trainer.data_collator([examples[index] for index in batch_B])
            losses.append(trainer.training_step(trainer.model, inputs).item())
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            trainer.model.zero_grad()
        return losses

    epochs = {
        "ours": partial(ours, False),
        "ours, live": partial(ours, True),
        "TRL, stored": partial(trls, False),
        "TRL, live": partial(trls, True),
    }
    return Sides(run, pairs, batches, trainer, examples, epochs)


def resolution(pairs: EncodedPairs) -> float:
    """What one unit in the last place of an fp32 log-prob is worth in the loss: 1.2e-5 at 1 000 nats and β = 0.1."""
    assert pairs.reference_logps_N2 is not None
    return BETA * float(np.abs(pairs.reference_logps_N2).max()) * 2.0**-23


def check(case: Case, sides: Sides) -> dict[str, float]:
    """Largest differences of gradients (first batch, before any step) and of losses; FLOPs of that batch over 3 F_min.

    Raises:
        SystemExit: One is above its tolerance.
    """
    run, trainer, first = sides.run, sides.trainer, sides.batches[0]
    run.engine.train()
    with FlopCounterMode(display=False) as counter:
        run_batch(run, sides.pairs, first, is_training=True)
    least = flops_min([sides.pairs.group(int(index)) for index in first], model_shape(case.model))
    trainer.precompute_ref_logps = True
    trainer.training_step(trainer.model, trainer.data_collator([sides.examples[index] for index in first]))
    theirs = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    mine = dict(run.engine.module.model.named_parameters())
    squares = sum(float((mine[name].grad - theirs[name].grad).square().sum()) for name in theirs)
    gradient_error = (squares / sum(float(one.grad.square().sum()) for one in theirs.values())) ** 0.5
    trainer.model.zero_grad()
    run.engine.zero_grad()
    run.engine.optimizer.zero_grad()
    # Every pass moves the weights a little, on both sides alike.
    losses = {name: epoch() for name, epoch in sides.epochs.items() if name in ("ours", "TRL, stored")}
    live = {name: epoch() for name, epoch in sides.epochs.items() if name not in losses}
    loss_error = max(abs(a - b) for pass_ in (losses, live) for a, b in zip(*pass_.values(), strict=True))
    if not (loss_error <= LOSS_TOLERANCE + resolution(sides.pairs) and gradient_error <= GRADIENT_TOLERANCE):
        raise SystemExit(f"{case.name}: losses differ by {loss_error:.2g}, gradients by {gradient_error:.2g} of theirs")
    return {
        "loss": losses["ours"][0],
        "loss_error": loss_error,
        "loss_resolution": resolution(sides.pairs),
        "gradient_error": gradient_error,
        "flops_over_min": counter.get_total_flops() / (3 * least),
    }


def measure(case: Case, args: Any) -> Iterator[dict[str, Any]]:
    """Equality, then the four ways in turn."""
    sides = sides_of(case, args.batch)
    facts = check(case, sides) | {"pairs": len(sides.pairs), "batch": args.batch}
    if args.quick:
        print(f"{case.name}: {facts}")
        if facts["flops_over_min"] > 1.05:
            raise SystemExit(f"{case.name}: a step took {facts['flops_over_min']:.3f} of 3 F_min, above 1.05")
        return
    timings = harness.alternate(sides.epochs, args.repeats)
    shape = model_shape(case.model)
    work = flops_trl(case, args.batch, shape) / flops_min(pair_groups(case), shape)
    for peer, limit, goal in (
        ("TRL, stored", work, "≥ 2"),
        ("TRL, live", 4 / 3 * work, "≥ 2"),
        ("ours, live", 4 / 3, "≥ 1.15"),
    ):
        line = harness.row(case.name, timings["ours"], timings[peer], goal)
        yield line | {"peer": peer, "limit": limit, "of_limit": line["ratio"] / limit} | facts


def main() -> None:
    args = harness.arguments(__doc__, threads=2, batch=8, **SIZES | NUM_GROUPS)
    if args.quick:
        shrink(args)
    rows = [line for case in cases(args) for line in measure(case, args)]
    if not rows:
        return
    claims = [
        harness.claim(
            f"DPO step on {line['case']}, stored reference, against {line['peer']} (limit {line['limit']:.2f})",
            line["ratio"],
            "×",
            line["goal"],
        )
        for line in rows
    ]
    columns = ("case", "pairs", "peer", "ours_s", "peer_s", "ratio", "limit", "of_limit", "goal", "spread")
    columns = (*columns, "loss_error", "gradient_error", "flops_over_min")
    harness.finish("train_step", args, rows, columns, claims, ("trl", "deepspeed"), threads=args.threads)


if __name__ == "__main__":
    main()
