"""Score, select and train on 30 % of real pairs, one epoch, against training on all of them; and against stock TRL.

    python benchmarks/end_to_end.py [--data ../shared/data/real] [--repeats 5] [--trl-repeats 2] [--write] [--quick]

Ours: a reward model of about an eighth of the policy's trunk scores every completion, the explicit margin is its
arithmetic, `select_table` keeps 30 %, and the product's optimizer steps go over what was kept. The other side takes the
same steps over all pairs. Log-probs of the reference are at hand on both (they are columns that other runs use, too) and
counted on neither. Stock TRL trains on all pairs with its defaults: batch 8, a live reference. The weights are random,
so which pairs are kept means nothing; that kept pairs may be longer does, and their share of the training FLOPs is
printed.

The losing case stands beside them: a scorer as large as the policy, used for this one epoch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import torch
from score_throughput import Case, cases, packed_pass, shrink
from train_step import LEARNING_RATE, encoded, moved, pair_groups, reference_logps, trl_trainer
from transformers import LlamaConfig, LlamaForSequenceClassification

from prefsel.metrics import score_table
from prefsel.models.loading import model_shape
from prefsel.models.reward import reward_route
from prefsel.models.tree import flops_min
from prefsel.select import select_table
from prefsel.train.batch import Run
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.loop import start_run, start_worker, train_step

RATIO, BATCH = 0.3, 8
SMALL = {"uf_groups": 24, "hh_groups": 96, "qa_groups": 12, "hidden_size": 256, "layers": 5, "vocab_size": 8192}
GOALS = {False: "≤ 0.55", True: "≤ 0.5"}
"""Without activation checkpointing, where a step is three forwards, and with it, where it is four."""


@dataclass(frozen=True)
class Scorer:
    """A reward model, and its trunk's size as a share of the policy's."""

    model: Any
    share: float


def reward_model(case: Case, hidden_size: int, layers: int) -> Scorer:
    """Random weights in heads of 32."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(case.tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=4096,
        initializer_range=hidden_size**-0.5,
        num_labels=1,
        pad_token_id=case.tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config).eval().to(case.model.device)
    return Scorer(model, model_shape(model).trunk_parameters / model_shape(case.model).trunk_parameters)


def kept(case: Case, scorer: Scorer) -> np.ndarray:
    """Places of the pairs that are kept: rewards of all completions, margins, the best 30 %."""
    values = packed_pass(scorer.model, reward_route(scorer.model), case.groups, 8192)
    rewards = [[values[group, side][0] for group, *sides in case.pairs for side in sides[i : i + 1]] for i in (0, 1)]
    ids = [np.random.default_rng(place).bytes(16) for place in range(len(case.pairs))]
    table = pa.table(
        {"pair_id": pa.array(ids, pa.binary(16)), "rm_rm_chosen": rewards[0], "rm_rm_rejected": rewards[1]}
    )
    table = table.append_column("score_margin", pa.array(score_table(table, "explicit_margin", rm="rm")))
    return select_table(table, {"kind": "top", "score": "score_margin", "ratio": RATIO})


def engine(policy: Any, num_pairs: int, *, checkpointing: bool) -> Run:
    """The product's engine around a policy, at a constant learning rate."""
    config = DpoConfig(
        policy_is_reference=False,
        max_length=None,
        learning_rate=LEARNING_RATE,
        beta=0.1,
        dtype="fp32",
        global_batch_pairs=BATCH,
        micro_batch_pairs=BATCH,
        gradient_checkpointing=checkpointing,
        zero_stage=0,
        warmup_ratio=0.0,
        min_lr_ratio=1.0,
        order="given",
    )
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return start_run(config, policy, start_worker(), num_pairs=num_pairs)


def epoch(run: Run, pairs: Any, places: np.ndarray) -> float:
    """The optimizer steps over some pairs; the FLOPs of their forward passes."""
    return sum(
        train_step(run, pairs, places[start : start + BATCH])["flops_forward"] for start in range(0, len(places), BATCH)
    )


def check(case: Case, scorer: Scorer) -> np.ndarray:
    """The kept pairs, against the model's own forward of one sequence at a time and a sort.

    Raises:
        SystemExit: Other pairs are kept.
    """
    margins = []
    with torch.no_grad():
        for group in pair_groups(case):
            rows = [group.prompt_tokens + tokens for tokens in group.completion_tokens]
            ids = [torch.tensor([row], device=scorer.model.device) for row in rows]
            chosen, rejected = (float(scorer.model(input_ids=one).logits[0, 0]) for one in ids)
            margins.append(chosen - rejected)
    places = kept(case, scorer)
    expected = np.argsort(-np.array(margins))[: int(RATIO * len(margins))]
    if set(places.tolist()) != set(expected.tolist()):
        raise SystemExit(f"{case.name}: other pairs are kept than a sort of the model's own rewards keeps")
    return places


def measure(case: Case, args: Any) -> Iterator[dict[str, Any]]:
    """Equality, then ours in turn with training on all pairs, without and with checkpointing; then stock TRL."""
    hidden = args.hidden_size // 2
    small, large = reward_model(case, hidden, 3), reward_model(case, args.hidden_size, args.layers)
    places = check(case, small)
    groups = pair_groups(case)
    pairs, everything = encoded(groups, reference_logps(case.model, groups)), np.arange(len(groups))
    shape = model_shape(case.model)
    flops_share = flops_min([groups[i] for i in places], shape) / flops_min(groups, shape)
    if args.quick:
        run = engine(moved(case.model), len(groups), checkpointing=False)
        share = epoch(run, pairs, places) / epoch(run, pairs, everything)
        print(f"{case.name}: {len(places)} of {len(groups)} pairs, {share:.3f} of the training FLOPs")
        if not 0.9 <= share / flops_share <= 1.1:
            raise SystemExit(
                f"{case.name}: the kept pairs take {share:.3f} of the FLOPs, by the formula {flops_share:.3f}"
            )
        return

    def selected(run: Run, scorer: Scorer) -> None:
        epoch(run, pairs, kept(case, scorer))

    facts = {"pairs": len(groups), "kept": len(places), "flops_share": flops_share, "rm_share": small.share}
    ours: harness.Timing | None = None
    for checkpointing in (False, True):
        run = engine(moved(case.model), len(groups), checkpointing=checkpointing)
        sides: dict[str, Callable[[], Any]] = {
            "ours": partial(selected, run, small),
            "all": partial(epoch, run, pairs, everything),
            "score": partial(kept, case, small),
            "ours, large scorer": partial(selected, run, large),
        }
        timings = harness.alternate(sides, args.repeats)
        ours = timings["ours"] if ours is None else ours
        how = "with checkpointing" if checkpointing else "no checkpointing"
        line = harness.row(case.name, timings["ours"], timings["all"], GOALS[checkpointing])
        more = {"peer": f"all pairs, {how}", "score_s": timings["score"].median} | facts
        yield line | more | {"share": timings["ours"].median / timings["all"].median}
        line = harness.row(case.name, timings["ours, large scorer"], timings["all"], "-")
        share = timings["ours, large scorer"].median / timings["all"].median
        yield line | more | {"peer": f"all pairs, {how}; scorer of the policy's size", "share": share}
    trainer, examples = trl_trainer(case, moved(case.model))
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def stock() -> None:
        for start in range(0, len(examples), BATCH):
            trainer.training_step(trainer.model, trainer.data_collator(examples[start : start + BATCH]))
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            trainer.model.zero_grad()

    theirs = harness.alternate({"TRL": stock}, args.trl_repeats)["TRL"]
    assert ours is not None
    line = harness.row(case.name, ours, theirs, "≤ 0.3")
    yield line | {"peer": "stock TRL on all pairs", "share": ours.median / theirs.median, "score_s": 0.0} | facts


def main() -> None:
    args = harness.arguments(__doc__, data="../shared/data/real", threads=2, trl_repeats=2, **SMALL)
    if args.quick:
        shrink(args)
        args.uf_groups, args.hh_groups, args.qa_groups = 4, 10, 2
    rows = [line for case in cases(args) if case.name in ("UF", "HH") for line in measure(case, args)]
    if not rows:
        return
    claims = [
        harness.claim(
            f"{line['case']}: score + select + train {RATIO:.0%} of {line['pairs']} pairs "
            f"({line['flops_share']:.2f} of the training FLOPs)",
            line["share"],
            f"of {line['peer']}",
            line["goal"],
        )
        for line in rows
        if line["goal"] != "-"
    ]
    columns = ("case", "pairs", "kept", "peer", "ours_s", "peer_s", "share", "goal", "score_s", "flops_share")
    harness.finish("end_to_end", args, rows, (*columns, "rm_share", "spread"), claims, ("trl", "deepspeed"))


if __name__ == "__main__":
    main()
