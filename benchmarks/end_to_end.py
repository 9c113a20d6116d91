"""Score, select and train on 30 % against training on all pairs, one epoch, and against stock TRL on all pairs.

    python benchmarks/end_to_end.py [--data FOLDER] [--repeats 5] [--write] [--quick]

One process, product functions, no Ray: a reward model with an eighth of the policy's trunk scores every completion,
`score_table` takes explicit margins, `select_table` keeps the top 30 %, `train_step` takes one epoch over them. Peers
are the same steps over all pairs, and `DPOTrainer.train()` with its defaults (batch 8, live reference, activation
checkpointing; fp32 like ours). The reference's log-probs are made beforehand and counted on neither of our sides, as
both read the same ones; TRL computes its own inside. Encoding is left out on all sides, model loading too.

The limit is R = (s + b τ) / τ: s the reward model's forward over the policy's, b the share of the training FLOPs
that the kept pairs have (kept sets lean long), τ = 3, or 4 with activation checkpointing. A reward model as large as
the policy is measured as well: the case that gains least. Weights are random: what is kept is not better, only fewer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import torch
import train_step as step
from score_throughput import FILES, SIZES, Case, load, ordinary, packed_pass, shrink
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

from prefsel.metrics import score_table
from prefsel.models.architecture import model_shape
from prefsel.models.chat import EncodedGroup
from prefsel.models.packing import flops_min
from prefsel.models.reward import reward_route
from prefsel.select import select_table
from prefsel.train.data import EncodedPairs
from prefsel.train.loop import train_step
from prefsel.train.objective import Run

RATIO = 0.3
NUM_GROUPS = {"uf_groups": 32, "hh_groups": 80, "qa_groups": 20, "layers": 4}
COUNTER_TOLERANCE = 1.06
"""Counted FLOPs over the formula's."""


@dataclass(frozen=True)
class Corpus:
    """A sample as the two ways find it."""

    case: Case
    groups: list[EncodedGroup]
    """One per pair."""
    pairs: EncodedPairs
    batch: int


def reward_model(case: Case, *, shrink_by: int) -> Any:
    """A random reward model; width and depth of the policy divided: by 2 it has an eighth of the trunk."""
    torch.manual_seed(2)
    options = case.model.config.to_dict()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        options[name] = max(1, options[name] // shrink_by)
    options["head_dim"] = options["hidden_size"] // options["num_attention_heads"]
    model = LlamaForSequenceClassification(
        LlamaConfig(
            **options | {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}, "architectures": None}
        )
    )
    return model.to(case.model.device).eval()


def kept_pairs(corpus: Corpus, rewards: Any) -> np.ndarray:
    """Score every completion once, take margins, keep the best: positions of pairs."""
    case = corpus.case
    values = packed_pass(rewards, reward_route(rewards), case.groups, 8192)
    table = pa.table(
        {
            "pair_id": corpus.pairs.pair_ids,
            "rm_small_chosen": [values[group, chosen][0] for group, chosen, _ in case.pairs],
            "rm_small_rejected": [values[group, rejected][0] for group, _, rejected in case.pairs],
        }
    )
    scored = table.append_column("score", pa.array(score_table(table, "explicit_margin", rm="small")))
    return select_table(scored, {"kind": "top", "score": "score", "ratio": RATIO})


def epoch(run: Run, corpus: Corpus, members: np.ndarray) -> list[float]:
    """One epoch over some pairs: losses of its steps."""
    starts = range(0, len(members), corpus.batch)
    return [train_step(run, corpus.pairs, members[start : start + corpus.batch])["loss"] for start in starts]


def selected(run: Run, corpus: Corpus, rewards: Any) -> list[float]:
    """Our way: score, select, train."""
    return epoch(run, corpus, kept_pairs(corpus, rewards))


def stock_trl(corpus: Corpus) -> Callable[[], Any]:
    """`DPOTrainer.train()` on all pairs, every time from the weights the last time left."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    case = corpus.case
    sides = (("chosen", 1), ("rejected", 2))
    rows = [
        {"prompt": case.rows[pair[0]]["prompt"]}
        | {name: case.rows[pair[0]]["completions"][pair[i]] for name, i in sides}
        for pair in case.pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=ordinary(case.model),
            ref_model=ordinary(case.model),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=case.tokenizer,
            args=trl.DPOConfig(
                output_dir=folder,
                num_train_epochs=1,
                max_length=None,
                bf16=False,
                use_cpu=case.model.device.type == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
    return trainer.train


def corpus_of(name: str, args: Any) -> Corpus:
    """The sample, encoded, with its reference log-probs."""
    torch.set_num_threads(args.threads)
    case = load(name, args)
    if name == "QA":
        once = [(group, first, first + 1) for group in range(len(case.groups)) for first in (0, 2)]
        case = replace(case, pairs=once)
    groups = step.pair_groups(case)
    return Corpus(case, groups, step.encoded(groups, step.reference_logps(case.model, groups)), args.batch)


def engine(corpus: Corpus, *, is_checkpointed: bool) -> Run:
    """An engine around a policy of its own."""
    policy = step.moved(corpus.case.model)
    if is_checkpointed:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return step.our_run(policy, len(corpus.pairs), corpus.batch)


def facts_of(corpus: Corpus, rewards: Any, tau: int) -> dict[str, float]:
    """The terms of the formula, and the share of pairs and of tokens that is kept."""
    kept, shape = kept_pairs(corpus, rewards), model_shape(corpus.case.model)
    every, groups = flops_min(corpus.groups, shape), corpus.case.groups
    s = flops_min(groups, model_shape(rewards)) / every
    b = flops_min([corpus.groups[index] for index in kept], shape) / every
    tokens = corpus.pairs.num_tokens_N
    shares = {"kept": len(kept) / len(tokens), "kept_tokens": float(tokens[kept].sum() / tokens.sum())}
    return {"s": s, "b": b, "tau": float(tau), "limit": (s + b * tau) / tau, **shares}


def check(corpus: Corpus) -> None:
    """Both ways do what the formula says, counted; the same pairs are kept every time.

    Raises:
        SystemExit: They do not.
    """
    rewards, run = reward_model(corpus.case, shrink_by=2), engine(corpus, is_checkpointed=False)
    facts, everything = facts_of(corpus, rewards, 3), np.arange(len(corpus.pairs))
    kept_groups = [corpus.groups[index] for index in kept_pairs(corpus, rewards)]
    counted = []
    for way in (partial(selected, run, corpus, rewards), partial(epoch, run, corpus, everything)):
        with FlopCounterMode(display=False) as counter:
            way()
        counted.append(counter.get_total_flops() / flops_min(corpus.groups, model_shape(corpus.case.model)))
    print(f"{corpus.case.name}: FLOPs over F_min {counted}, {facts}")
    # The backward pass computes again what it could not keep of the logits: at most the head once more.
    shape = model_shape(corpus.case.model)
    heads = replace(shape, trunk_parameters=0, num_layers=0)
    again = [flops_min(groups, heads) / flops_min(corpus.groups, shape) for groups in (kept_groups, corpus.groups)]
    expected = (facts["s"] + 3 * facts["b"] + again[0], 3.0 + again[1])
    is_exact = int(RATIO * len(everything)) == round(facts["kept"] * len(everything))
    if not is_exact or any(not c <= COUNTER_TOLERANCE * e for c, e in zip(counted, expected, strict=True)):
        raise SystemExit(f"{corpus.case.name}: counted {counted} F_min, expected {expected}; kept {facts['kept']:.3f}")


def measure(corpus: Corpus, args: Any) -> Iterator[dict[str, Any]]:
    """Our way against all pairs, without and with activation checkpointing; then the same-size scorer; then TRL."""
    small, large = (reward_model(corpus.case, shrink_by=factor) for factor in (2, 1))
    everything, name = np.arange(len(corpus.pairs)), corpus.case.name
    for tau, goal in ((3, "≤ 0.55"), (4, "≤ 0.50")):
        run = engine(corpus, is_checkpointed=tau == 4)
        ways = {"small": partial(selected, run, corpus, small), "large": partial(selected, run, corpus, large)}
        timings = harness.alternate(ways | {"all": partial(epoch, run, corpus, everything)}, args.repeats)
        for scorer, rewards, wanted in (("small", small, goal), ("large", large, "-")):
            line = harness.row(name, timings[scorer], timings["all"], wanted)
            label = {"peer": f"all pairs, τ = {tau}", "scorer": "an eighth" if scorer == "small" else "same size"}
            yield line | label | {"R": 1 / line["ratio"], "repeats": args.repeats} | facts_of(corpus, rewards, tau)
    if not args.trl_repeats:
        return
    run = engine(corpus, is_checkpointed=False)
    sides = {"ours": partial(selected, run, corpus, small), "trl": stock_trl(corpus)}
    timings = harness.alternate(sides, args.trl_repeats)
    line = harness.row(name, timings["ours"], timings["trl"], "≤ 0.30")
    label = {"peer": "stock TRL, all pairs", "scorer": "an eighth", "limit": "-", "repeats": args.trl_repeats}
    yield facts_of(corpus, small, 3) | line | label | {"R": 1 / line["ratio"]}


def main() -> None:
    sizes = SIZES | NUM_GROUPS
    args = harness.arguments(__doc__, threads=2, batch=8, trl_repeats=2, samples="UF,HH", **sizes)
    if args.quick:
        shrink(args)
        args.layers = 2  # a reward model has half
        args.uf_groups, args.hh_groups = 8, 12
    names = [name for name in args.samples.split(",") if name in FILES]
    rows = []
    for name in names:
        corpus = corpus_of(name, args)
        check(corpus)
        if not args.quick:
            for line in measure(corpus, args):
                print(f"{name}, {line['scorer']}: {line['R']:.3f} of {line['peer']}", flush=True)
                rows.append(line)
    if not rows:
        return
    claims = [
        harness.claim(
            f"score + select + train 30 % of {line['case']} ÷ {line['peer']}",
            line["R"],
            "×",
            line["goal"],
        )
        for line in rows
        if line["goal"] != "-"
    ]
    columns = ("case", "peer", "scorer", "ours_s", "peer_s", "R", "limit", "goal", "s", "b", "kept_tokens", "repeats")
    harness.finish("end_to_end", args, rows, (*columns, "spread"), claims, ("trl", "deepspeed"), threads=args.threads)


if __name__ == "__main__":
    main()
