"""Five responses to each of real prompts: our engine against `transformers.generate`, same weights, same settings.

    python benchmarks/generation.py [--data FOLDER] [--repeats 5] [--write]

Both sides start from prompt tokens and end with the tokens of the responses. The peer gets prompts of similar length
together, padded on the left, and `num_return_sequences=5`: at `DEFAULT_BATCH` prompts a batch, and at the fastest of
`BATCHES`. Of a batch it computes every row until the last one has ended; ours lets rows leave.

The models are random, with logits as far apart as a trained model's, and end a response with probability
1/`MEAN_TOKENS` after every token: lengths are spread as those of real answers are, about geometrically. Every pass
draws other tokens on their side, the same on ours, so that seconds are compared per token of a response.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import torch
from score_throughput import QUICK_SIZES, SIZES, load
from torch import nn

from prefsel.generate.engine import Generator, Sampling

NUM_SAMPLES = 5
MEAN_TOKENS = 64
"""Of a response: a quarter of the limit, which then cuts one in fifty."""
LOGIT_SPREAD = 4.0
"""Standard deviation of a row of logits: of 8 192 tokens about 50 make up 0.95 at temperature 0.8."""
DEFAULT_BATCH, BATCHES = 8, (1, 2, 4, 8, 16)
"""Prompts, of which each has five rows."""
MODELS = ((128, 3), (256, 5))
"""(hidden size, layers)."""
LONGEST_PROMPT = 400


@dataclass(frozen=True)
class Case:
    """A model and its prompts."""

    name: str
    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    sampling: Sampling


def cases(args: Any) -> Iterator[Case]:
    """The same prompts for a small and a larger model."""
    torch.set_num_threads(args.threads)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=args.max_new_tokens, seed=1)
    for hidden_size, layers in MODELS:
        if args.quick and hidden_size != MODELS[0][0]:
            continue
        args.hidden_size, args.layers, args.uf_groups = hidden_size, layers, 4 * args.prompts
        case = load("UF", args)
        prompts = [group.prompt_tokens for group in case.groups if len(group.prompt_tokens) <= LONGEST_PROMPT]
        model = with_ends(case.model, case.tokenizer, args.max_new_tokens // 4)
        yield Case(f"{hidden_size} x {layers}", model, case.tokenizer, prompts[: args.prompts], sampling)


def with_ends(model: Any, tokenizer: Any, mean_tokens: int) -> Any:
    """The model with logits apart from each other, and an end token of probability 1/mean_tokens, roughly."""
    old = model.lm_head
    model.lm_head = head = nn.Linear(old.in_features, old.out_features, bias=True, device=old.weight.device)
    with torch.no_grad():
        head.weight.copy_(old.weight * (LOGIT_SPREAD / old.weight.std() / math.sqrt(old.in_features)))
        head.bias.zero_()
        # At temperature 0.8 the other tokens weigh e^{σ²/2} each on average, σ = 4 / 0.8; few rows hold the mean.
        head.weight[tokenizer.eos_token_id] = 0.0
        hidden = torch.randn(256, old.in_features, device=head.weight.device)
        total = (head(hidden).double() / 0.8).logsumexp(dim=-1).median()
        head.bias[tokenizer.eos_token_id] = 0.8 * (float(total) - math.log(mean_tokens))
    return model.eval()


def our_side(case: Case) -> Callable[[], list[list[list[int]]]]:
    """A pass of ours."""

    def run() -> list[list[list[int]]]:
        generator = Generator(case.model, case.tokenizer)
        found = generator.generate(case.prompts, range(len(case.prompts)), NUM_SAMPLES, case.sampling)
        return [[one.tokens for one in many] for many in found]

    return run


def peer_side(case: Case, batch: int, **options: Any) -> list[list[list[int]]]:
    """A pass of theirs, `batch` prompts at a time."""
    tokenizer, found = case.tokenizer, [[[]] for _ in case.prompts]
    order = sorted(range(len(case.prompts)), key=lambda number: len(case.prompts[number]))
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": case.sampling.temperature,
        "top_p": case.sampling.top_p,
        "top_k": 0,
        "num_return_sequences": NUM_SAMPLES,
    }
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [case.prompts[number] for number in chosen]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            new_BT = case.model.generate(
                ids_BT.to(case.model.device),
                attention_mask=mask_BT.to(case.model.device),
                max_new_tokens=case.sampling.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **(options or settings),
            )[:, longest:]
        ends = [[*row, tokenizer.eos_token_id] for row in new_BT.tolist()]
        responses = [row[: row.index(tokenizer.eos_token_id)] for row in ends]
        size = len(responses) // len(chosen)
        for place, number in enumerate(chosen):
            found[number] = responses[place * size : (place + 1) * size]
    return found


def check(case: Case) -> None:
    """Greedy tokens are equal, in fp64; stops where they are not."""
    few = [prompt for prompt in sorted(case.prompts, key=len)[::7]][:4]
    model = case.model.double()
    greedy = Case(case.name, model, case.tokenizer, few, Sampling(temperature=0.0, max_new_tokens=24))
    ours, theirs = our_side(greedy)(), peer_side(greedy, len(few), do_sample=False)
    model.float()
    if ours != [many * NUM_SAMPLES for many in theirs]:
        raise SystemExit(f"{case.name}: greedy tokens differ")


def tokens_of(found: list[list[list[int]]]) -> int:
    return sum(len(response) for many in found for response in many)


def compare_lengths(case: Case, ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> float:
    """How far the mean lengths are apart, in standard errors; stops where chance does not explain it."""
    lengths = [[len(response) for many in found for response in many] for found in (ours, theirs)]
    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in lengths))
    apart = (statistics.mean(lengths[0]) - statistics.mean(lengths[1])) / error
    if abs(apart) > 4:
        raise SystemExit(f"{case.name}: mean lengths are {apart:.1f} standard errors apart")
    return apart


def measure(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    """Equality, then the search for their fastest batch, then the alternation with that one and the default."""
    check(case)
    ours, lengths = our_side(case), {}
    rates: dict[int, float] = {}
    found = ours()
    for batch in BATCHES:
        started = time.perf_counter()
        theirs = peer_side(case, batch)
        rates[batch] = tokens_of(theirs) / (time.perf_counter() - started)
        lengths[batch] = compare_lengths(case, found, theirs)
        print(f"{case.name}: batch {batch}: {rates[batch]:.0f} tokens/s", flush=True)
    fastest = max(rates, key=lambda batch: rates[batch])
    counted: dict[int, list[int]] = {batch: [] for batch in (DEFAULT_BATCH, fastest)}
    sides: dict[str, Callable[[], Any]] = {"ours": ours}
    for batch, counts in counted.items():
        sides[str(batch)] = lambda batch=batch, counts=counts: counts.append(tokens_of(peer_side(case, batch)))
    timings = harness.alternate(sides, repeats)
    our_rate = tokens_of(found) / timings["ours"].median
    for batch, counts in counted.items():
        peer_rates = [count / wall for count, wall in zip(counts[1:], timings[str(batch)].wall)]
        line = harness.row(case.name, timings["ours"], timings[str(batch)], "≥ 2")
        peer_rate = statistics.median(peer_rates)
        yield line | {
            "batch": batch,
            "is_fastest": batch == fastest,
            "prompts": len(case.prompts),
            "ours_tokens_per_s": our_rate,
            "peer_tokens_per_s": peer_rate,
            "ratio": our_rate / peer_rate,
            "mean_tokens": tokens_of(found) / len(found) / NUM_SAMPLES,
            "apart": lengths[batch],
            "tried": rates,
        }


def quick(case: Case) -> None:
    """Equality, and exact counts: every prompt read once, no token drawn in vain."""
    check(case)
    generator = Generator(case.model, case.tokenizer)
    found = generator.generate(case.prompts, range(len(case.prompts)), NUM_SAMPLES, case.sampling)
    drawn = sum(len(one.tokens) + (one.stop == "end") for many in found for one in many)
    assert generator.counters["prefill_tokens"] == sum(map(len, case.prompts))
    assert generator.counters["rows_decoded"] == drawn
    apart = compare_lengths(case, [[one.tokens for one in many] for many in found], peer_side(case, DEFAULT_BATCH))
    print(f"{case.name}: greedy equal, {drawn} tokens drawn and none in vain, mean lengths {apart:.1f} errors apart")


def main() -> None:
    args = harness.arguments(__doc__, threads=2, prompts=32, max_new_tokens=4 * MEAN_TOKENS, **SIZES)
    if args.quick:
        vars(args).update(QUICK_SIZES | {"prompts": 6, "max_new_tokens": 32})
        for case in cases(args):
            quick(case)
        return
    rows = [line for case in cases(args) for line in measure(case, args.repeats)]
    columns = ("case", "prompts", "batch", "is_fastest", "ours_tokens_per_s", "peer_tokens_per_s", "ratio", "goal")
    claims = [
        harness.claim(
            f"{NUM_SAMPLES} responses to each prompt, model {line['case']}: {line['ours_tokens_per_s']:,.0f} tokens/s "
            f"against transformers.generate at batch {line['batch']}" + (", its fastest" if line["is_fastest"] else ""),
            line["ratio"],
            "×",
            "≥ 2",
        )
        for line in rows
    ]
    harness.finish("generation", args, rows, (*columns, "spread", "mean_tokens", "apart"), claims, threads=args.threads)


if __name__ == "__main__":
    main()
