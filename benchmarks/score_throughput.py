"""Log-probs of real pairs: our packed rows against TRL's own reference pass, same weights, same tokens, same pairs.

    python benchmarks/score_throughput.py [--data FOLDER] [--repeats 5] [--write]

Both sides start from token ids (TRL's own tokenisation is compared with ours) and end with numbers on the host: ours
packs and scores, with the route and the token budget of `CausalLogpsScorer`; TRL collates and calls
`DPOTrainer.compute_ref_log_probs` in the order of the data set, as its precompute pass does, with a reference model of
its own, whose head computes log-probs and nothing else. The limit is F_TRL / F_min.

`QA` has all labelled pairs, of which each completion is in several; `QA once` has each completion in one. `HH system`
is HH under one system prompt, which ours computes once for all groups of a row: below F_min, which counts by group.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefsel.config import FormatOptions
from prefsel.ingest.readers import read_rows
from prefsel.ingest.windows import ingest_windows
from prefsel.models.architecture import model_shape
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.models.logps import Route, logps_route, model_device
from prefsel.models.packing import ModelShape, flops_min
from prefsel.score.probes import calibrate_budget
from prefsel.scratch.tokenizer import train_tokenizer

FILES = {
    "UF": ("ultrafeedback_binarized_1k.jsonl.gz", "pairs.jsonl"),
    "HH": ("hh_rlhf_harmless_1156.jsonl.gz", "transcripts.jsonl"),
    "QA": ("qa_feedback_250x4.jsonl.gz", "ranked.jsonl"),
}
"""Samples of public data sets, and what stands for them in the repository's own."""
MAKE_SAMPLES = Path(__file__).resolve().parents[1] / "jobs/data/make_samples.py"
SIZES = {"uf_groups": 16, "hh_groups": 32, "qa_groups": 10, "hidden_size": 256, "layers": 5, "vocab_size": 8192}
"""Options that all three scripts on these samples share."""
QUICK_SIZES = {"uf_groups": 2, "hh_groups": 4, "qa_groups": 2, "hidden_size": 64, "layers": 2, "vocab_size": 1024}
SYSTEM = (
    "You are a careful assistant. Answer in plain words and in the language of the question. Say what you do not know. "
    "Refuse to help with anything that would harm somebody, say so in one sentence, and offer what you can do instead. "
    "Do not flatter, do not repeat the question, and keep the answer as short as it can be without leaving out a step."
)
DEFAULT_BATCH, BATCHES = 8, (1, 2, 4, 8, 16)
TOLERANCE = 1e-5
Values = dict[tuple[int, int], list[float]]
"""(group, completion) → the numbers of a route."""


@dataclass(frozen=True)
class Case:
    """Pairs of one sample, and what scores them."""

    name: str
    rows: list[dict[str, Any]]
    """Prompt and completions of each group, as messages."""
    groups: list[EncodedGroup]
    pairs: list[tuple[int, int, int]]
    """(group, chosen, rejected)."""
    tokenizer: Any
    model: LlamaForCausalLM

    @property
    def sides(self) -> list[tuple[int, int]]:
        """(group, completion) of every chosen completion, then of every rejected one."""
        return [(group, side[i]) for i in (0, 1) for group, *side in self.pairs]


def cases(args: Any) -> Iterator[Case]:
    """The three samples, two of them once more as the file's head says."""
    torch.set_num_threads(args.threads)
    for name in FILES:
        case = load(name, args)
        yield case
        if name == "QA":
            once = [(group, a, a + 1) for group, encoded in enumerate(case.groups) for a in range(0, 4, 2)]
            yield replace(case, name="QA once", pairs=once)
    yield replace(load("HH", args, system=SYSTEM), name="HH system")


def shrink(args: Any) -> None:
    """Sizes for CI."""
    vars(args).update(QUICK_SIZES)


def load(name: str, args: Any, *, system: str = "") -> Case:
    """Random groups of a sample, a tokenizer trained on all of it, and a random model of the size asked for."""
    with tempfile.TemporaryDirectory() as made:
        if not args.data:
            subprocess.run([sys.executable, str(MAKE_SAMPLES), "--into", made], check=True)
        rows = read_rows(str(sample_file(name, Path(args.data or made))), max_row_bytes=1 << 24)
        (window,) = ingest_windows(rows, file=name, format="auto", options=FormatOptions(), rows_per_shard=4096)
    labelled: dict[bytes, list[tuple[int, int]]] = {}
    for pair in window.pairs.to_pylist():
        labelled.setdefault(pair["prompt_id"], []).append((pair["chosen"], pair["rejected"]))
    groups = window.groups.select(["prompt_id", "prompt", "completions"]).to_pylist()
    turns = [turn for row in groups for one in row["completions"] for turn in (*row["prompt"], *one["messages"])]
    tokenizer = train_tokenizer([system, *(t["content"] for t in turns)], kind="bpe", vocab_size=args.vocab_size)
    # Where ties left a completion without a pair, TRL would have less to do.
    whole = [r for r in groups if len({*sum(labelled.get(r["prompt_id"], []), ())}) == len(r["completions"])]
    order = np.random.default_rng(0).permutation(len(whole))[: getattr(args, f"{name.lower()}_groups")]
    kept = [whole[i] for i in order]
    first = [{"role": "system", "content": system}] if system else []
    texts = [([*first, *row["prompt"]], [one["messages"] for one in row["completions"]]) for row in kept]
    return Case(
        name=name,
        rows=[{"prompt": prompt, "completions": completions} for prompt, completions in texts],
        groups=Encoder(tokenizer).encode_groups(texts),
        pairs=[(group, *sides) for group, row in enumerate(kept) for sides in labelled[row["prompt_id"]]],
        tokenizer=tokenizer,
        model=small_model(tokenizer, args).to(args.device),
    )


def sample_file(name: str, folder: Path) -> Path:
    """The file of a sample, under either of its names."""
    for file in FILES[name]:
        if (folder / file).is_file():
            return folder / file
    raise SystemExit(f"--data: {folder} holds neither {' nor '.join(FILES[name])}")


def small_model(tokenizer: Any, args: Any) -> LlamaForCausalLM:
    """Random weights, large enough that every token's context changes the prediction; heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=4096,
        initializer_range=args.hidden_size**-0.5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def packed_pass(model: nn.Module, route: Route, groups: Sequence[EncodedGroup], token_budget: int) -> Values:
    """Our side: pack, one forward per row, numbers on the host."""
    outputs = []
    with route.context():
        for row in route.rows(groups, token_budget):
            outputs.append((row.completion_index, route.forward(row.to(model_device(model)))))
    return {
        key: numbers
        for keys, output in outputs
        for key, numbers in zip(keys, output.reshape(len(keys), -1).tolist(), strict=True)
    }


def our_side(case: Case) -> Callable[[], Values]:
    """A pass of ours; the budget is fixed beforehand, as a workspace does."""
    route = logps_route(case.model, case.tokenizer.pad_token_id)
    return partial(packed_pass, case.model, route, case.groups, calibrate_budget(route, model_device(case.model)))


def trl_side(case: Case) -> Callable[[int], list[float]]:
    """A pass of TRL's at a batch size; log-probs in the order of `Case.sides`.

    Raises:
        SystemExit: TRL's tokens are not ours.
    """
    import datasets
    import trl

    datasets.disable_progress_bars()
    conversations = [
        {"prompt": row["prompt"], "chosen": row["completions"][chosen], "rejected": row["completions"][rejected]}
        for row, chosen, rejected in ((case.rows[group], *sides) for group, *sides in case.pairs)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=ordinary(case.model),
            ref_model=ordinary(case.model),
            train_dataset=datasets.Dataset.from_list(conversations),
            processing_class=case.tokenizer,
            args=trl.DPOConfig(
                output_dir=folder,
                max_length=None,
                bf16=False,
                use_cpu=model_device(case.model).type == "cpu",
                gradient_checkpointing=False,
                report_to=[],
            ),
        )
        examples = trainer.train_dataset.to_list()
    for example, (group, chosen, rejected) in zip(examples, case.pairs, strict=True):
        ours = case.groups[group]
        expected = (ours.prompt_tokens, ours.completion_tokens[chosen], ours.completion_tokens[rejected])
        if (example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]) != expected:
            raise SystemExit(f"{case.name}: TRL's tokens of group {group} are not ours")
    return partial(_trl_pass, trainer, examples)


def _trl_pass(trainer: Any, examples: list[dict[str, Any]], batch: int) -> list[float]:
    sides: tuple[list[float], list[float]] = ([], [])
    for start in range(0, len(examples), batch):
        inputs = trainer.data_collator(examples[start : start + batch])
        inputs = {name: tensor.to(trainer.accelerator.device) for name, tensor in inputs.items()}
        for side, logps_B in zip(sides, trainer.compute_ref_log_probs(trainer.ref_model, inputs), strict=True):
            side += logps_B.tolist()
    return [*sides[0], *sides[1]]


def ordinary(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy with transformers' own attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return other


def flops_trl(case: Case, batch: int, shape: ModelShape) -> float:
    r"""F_TRL: \(\sum_{batches} (2t + 2h) 2B T_{max} + 2dL\,2B\,T_{max}^2\), each pair padded to its batch's longest.

    Where Triton is present TRL's head runs on responses only; then so does its term.
    """
    total = 0.0
    for start in range(0, len(case.pairs), batch):
        members = [(g, side) for g, *sides in case.pairs[start : start + batch] for side in sides]
        responses = [len(case.groups[g].completion_tokens[side]) for g, side in members]
        longest = max(len(case.groups[g].prompt_tokens) + r for (g, _), r in zip(members, responses, strict=True))
        tokens = len(members) * longest
        is_compact = model_device(case.model).type == "cuda"
        head_rows = sum(responses) if is_compact else tokens
        total += shape.flops(trunk_tokens=tokens, head_rows=head_rows, attention_area=tokens * longest / 2)
    return total


def check(case: Case, ours: Values, theirs: Sequence[float]) -> float:
    """The largest relative difference of the log-probs; stops where it is above `TOLERANCE`."""
    error = max(abs(ours[key][0] - lp) / abs(lp) for key, lp in zip(case.sides, theirs, strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: log-probs differ by {error:.2g} of their size, more than {TOLERANCE:g}")
    return error


def measure(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    """Equality, then the search for TRL's fastest batch, then the alternation with that one and the default."""
    ours, theirs, shape = our_side(case), trl_side(case), model_shape(case.model)
    error = check(case, ours(), theirs(DEFAULT_BATCH))
    seconds: dict[int, float] = {}
    for batch in BATCHES:
        started = time.perf_counter()
        theirs(batch)
        seconds[batch] = time.perf_counter() - started
    fastest = min(seconds, key=lambda batch: seconds[batch])
    print(f"{case.name}: TRL by batch, s: " + ", ".join(f"{b}: {s:.2f}" for b, s in seconds.items()), flush=True)
    sides: dict[int, Callable[[], Any]] = {batch: partial(theirs, batch) for batch in (DEFAULT_BATCH, fastest)}
    timings = harness.alternate({"ours": ours} | {str(batch): side for batch, side in sides.items()}, repeats)
    for batch in sides:
        limit = flops_trl(case, batch, shape) / flops_min(case.groups, shape)
        line = harness.row(case.name, timings["ours"], timings[str(batch)], "of_limit ≥ 0.9")
        facts = {"pairs": len(case.pairs), "batch": batch, "is_fastest": batch == fastest, "tried_s": seconds}
        of_limit = line["ratio"] / limit
        gflops_per_s = flops_min(case.groups, shape) / line["ours_s"] / 1e9
        yield line | facts | {"limit": limit, "of_limit": of_limit, "error": error, "min_gflops_per_s": gflops_per_s}


def main() -> None:
    args = harness.arguments(__doc__, threads=2, **SIZES)
    if args.quick:
        shrink(args)
        for case in cases(args):
            print(
                f"{case.name}: relative difference {check(case, our_side(case)(), trl_side(case)(DEFAULT_BATCH)):.1g}"
            )
        return
    rows = [line for case in cases(args) for line in measure(case, args.repeats)]
    columns = ("case", "pairs", "batch", "is_fastest", "ours_s", "peer_s", "ratio", "limit", "of_limit", "goal")
    claims = [
        harness.claim(
            f"log-probs of {line['case']}: {line['ratio']:.1f} × TRL at batch {line['batch']}"
            + (", its fastest," if line["is_fastest"] else ",")
            + f" where F_TRL / F_min = {line['limit']:.2f}",
            line["of_limit"],
            "of the limit",
            "≥ 0.9",
        )
        for line in rows
    ]
    if rows:
        columns = (*columns, "spread", "error", "min_gflops_per_s")
        harness.finish("score_throughput", args, rows, columns, claims, ("trl",), threads=args.threads)


if __name__ == "__main__":
    main()
