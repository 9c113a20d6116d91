r"""Influence of every pair: derivatives of log-probs along v, against a gradient per pair and its product with v.

    python benchmarks/influence_cost.py [--data FOLDER] [--repeats 5] [--write]

Both sides give \(\langle\nabla\ell(d), v\rangle\) of the DPO loss of every pair, from token ids, with the reference's
log-probs at hand. Ours takes one number per completion, exact or by a finite difference (whose log-probs at the weights
themselves are at hand, too, as scores); the peer is what users of per-sample gradients write: a pair at a time, chosen
and rejected as two padded sequences, loss, backward, dot product. Both are checked against that loop in fp64. The unit
is one forward of our packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from score_throughput import SIZES, Case, Values, cases, ordinary, packed_pass, shrink
from torch import nn

from prefsel.models.chat import EncodedGroup
from prefsel.models.directional import differences, directional_route, finite_difference_route, largest_error
from prefsel.models.logps import logps_route, model_device
from prefsel.models.tangent import Direction, validation_gradient
from prefsel.score.probes import calibrate_budget

BETA = 0.1
STEP = 3e-5
TOLERANCE = 3e-5
"""Of the largest influence: derivatives of a pair's two sides cancel."""
GOALS = {"UF": 1.5, "HH": 1.8, "QA": 3.0}
Reference = dict[tuple[int, int], float]


def pair_of(group: EncodedGroup, sides: Sequence[int]) -> EncodedGroup:
    """A prompt with the two completions of a pair."""
    return EncodedGroup(group.prompt_tokens, [group.completion_tokens[side] for side in sides], ["ok", "ok"], 0)


def influence(case: Case, reference: Reference, logps: Any, dlogps: Any) -> list[float]:
    r"""\(-\beta\,\sigma(-IRM)\,(D_v\log\pi(y_w) - D_v\log\pi(y_l))\) of every pair."""
    found = []
    for group, chosen, rejected in case.pairs:
        ratios = [logps[group][side] - reference[group, side] for side in (chosen, rejected)]
        margin = BETA * (ratios[0] - ratios[1])
        change = dlogps[group][chosen] - dlogps[group][rejected]
        found.append(-BETA / (1.0 + np.exp(margin)) * change)
    return found


def per_sample_gradients(model: nn.Module, case: Case, reference: Reference, direction: Direction) -> list[float]:
    """The peer: a backward pass per pair and its product with v, in the model's dtype; no gradient is kept."""
    device, pad = model_device(model), case.tokenizer.pad_token_id
    parameters = dict(model.named_parameters())
    dtype = next(model.parameters()).dtype
    found = []
    for group, *sides in case.pairs:
        prompt, responses = case.groups[group].prompt_tokens, case.groups[group].completion_tokens
        rows = [prompt + responses[side] for side in sides]
        ids_2T = torch.full((2, max(map(len, rows))), pad)
        mask_2T, response_2T = torch.zeros_like(ids_2T), torch.zeros_like(ids_2T)
        for number, row in enumerate(rows):
            ids_2T[number, : len(row)] = torch.tensor(row)
            mask_2T[number, : len(row)] = 1
            response_2T[number, len(prompt) : len(row)] = 1
        ids_2T, mask_2T, response_2T = (tensor.to(device) for tensor in (ids_2T, mask_2T, response_2T))
        logits_2TV = model(input_ids=ids_2T, attention_mask=mask_2T, use_cache=False).logits[:, :-1]
        logps_2T = logits_2TV.log_softmax(-1).gather(2, ids_2T[:, 1:, None])[..., 0]
        ratio_2 = (logps_2T * response_2T[:, 1:]).sum(1) - torch.tensor(
            [reference[group, side] for side in sides], dtype=dtype, device=device
        )
        loss = nn.functional.softplus(-BETA * (ratio_2[0] - ratio_2[1]))
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        dots = [torch.dot(g.flatten(), direction[name].flatten()) for name, g in zip(parameters, gradient, strict=True)]
        found.append(float(torch.stack(dots).sum()))
    return found


def apart(case: Case, num_groups: int) -> tuple[Case, list[tuple[int, int, int]]]:
    """The case without the pairs of its last groups, and those: v is their gradient, and none of them is scored."""
    rest = len(case.groups) - num_groups
    pairs = [pair for pair in case.pairs if pair[0] < rest]
    return replace(case, rows=case.rows[:rest], groups=case.groups[:rest], pairs=pairs), case.pairs[len(pairs) :]


def nested(case: Case, values: Values) -> list[list[list[float]]]:
    """Numbers by group and completion."""
    return [[values[number, i] for i in range(len(group.status))] for number, group in enumerate(case.groups)]


def measure(whole: Case, args: Any) -> Iterator[dict[str, Any]]:
    """Equality of the influences, then the alternation of a forward, exact, finite difference and per-sample loop."""
    model = whole.model
    forward = logps_route(model)
    budget = calibrate_budget(forward, model_device(model))
    rng = np.random.default_rng(0)
    base = packed_pass(model, forward, whole.groups, budget)
    # A reference some nats away, so that σ(−IRM) takes all values.
    reference = {key: numbers[0] + rng.normal(scale=10.0) for key, numbers in base.items()}
    case, validation = apart(whole, args.validation_groups)
    direction = validation_gradient(
        model,
        [pair_of(whole.groups[group], sides) for group, *sides in validation],
        np.array([[reference[group, side] for side in sides] for group, *sides in validation]),
        beta=BETA,
    ).directions["all"]
    exact = directional_route(model, {"v": direction})
    difference, epsilons = finite_difference_route(model, {"v": direction}, step=STEP, has_logps=True)
    loop = partial(per_sample_gradients, ordinary(model), case, reference, direction)
    in_double = partial(
        per_sample_gradients,
        ordinary(model).double(),
        case,
        reference,
        {name: tensor.double() for name, tensor in direction.items()},
    )
    sides = {
        name: partial(packed_pass, model, route, case.groups, budget)
        for name, route in (("forward", forward), ("exact", exact), ("difference", difference))
    }

    values = nested(case, sides["exact"]())
    logps, dlogps = ([[v[i] for v in row] for row in values] for i in (0, 1))
    at_hand = [[v[0] for v in row] for row in nested(case, base)]
    _, (approximate,) = differences(nested(case, sides["difference"]()), epsilons, at_hand)
    # Against the loop in fp64: in fp32 the loop's own sums over long responses err as much as the tolerance.
    exact_if, loop_if = np.array(in_double()), np.array(loop())
    error, loop_error = (
        float(np.abs(found - exact_if).max() / np.abs(exact_if).max())
        for found in (np.array(influence(case, reference, logps, dlogps)), loop_if)
    )
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: influences differ by {error:.2g} of the largest, more than {TOLERANCE:g}")

    timings = harness.alternate(sides | {"loop": loop}, args.repeats)
    one = timings["forward"].median
    yield harness.row(case.name, timings["exact"], timings["loop"], f"≤ 3.5, ≥ {GOALS.get(case.name, 1.0)}, ≥ 3.5") | {
        "pairs": len(case.pairs),
        "forward_s": one,
        "exact_forwards": timings["exact"].median / one,
        "fd_forwards": timings["difference"].median / one,
        "loop_forwards": timings["loop"].median / one,
        "fd_ratio": timings["loop"].median / timings["difference"].median,
        "fd_error": largest_error(approximate, dlogps),
        "limit_forwards": 3.0,
        "error": error,
        "loop_error": loop_error,
        "raw_forward_s": timings["forward"].wall,
        "raw_difference_s": timings["difference"].wall,
    }


def claims_of(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of one case: in forwards, and against the loop, exact and approximate."""
    name = f"influence of {line['pairs']} pairs of {line['case']}"
    yield harness.claim(f"{name}, exact", line["exact_forwards"], "forwards", "≤ 3.5")
    yield harness.claim(f"{name}, exact", line["ratio"], "× the per-sample loop", f"≥ {GOALS.get(line['case'], 1.0)}")
    how = f"finite difference, error {line['fd_error']:.1%} of the largest derivative"
    yield harness.claim(f"{name}, {how}", line["fd_ratio"], "× the per-sample loop", "≥ 3.5")


def main() -> None:
    args = harness.arguments(__doc__, threads=2, validation_groups=4, **SIZES)
    if args.quick:
        shrink(args)
        args.validation_groups, args.repeats = 1, 1
    rows = [line for case in cases(args) for line in measure(case, args)]
    columns = ("case", "pairs", "forward_s", "exact_forwards", "fd_forwards", "loop_forwards", "ratio", "fd_ratio")
    columns = (*columns, "goal", "fd_error", "error", "loop_error", "spread")
    if rows and not args.quick:
        claims = [one for line in rows for one in claims_of(line)]
        harness.finish("influence_cost", args, rows, columns, claims, threads=args.threads)


if __name__ == "__main__":
    main()
