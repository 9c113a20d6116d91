"""FLOPs of scoring real pairs, counted by torch: our packed rows and TRL's reference pass, over F_min.

    python benchmarks/score_flops.py [--data FOLDER] [--write]

No clock is read. The counter sees matrix products and attention kernels; an attention kernel counts as its full square
whatever it skips, so TRL's count lies above its formula, which has the causal half.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from score_throughput import DEFAULT_BATCH, SIZES, Case, cases, check, flops_trl, our_side, shrink, trl_side
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from prefsel.models.architecture import model_shape
from prefsel.models.packing import flops_min


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The counter knows the fused kernels of GPUs but not the CPU's.
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def counted(work: Any) -> tuple[Any, float]:
    """What the work returns, and its floating-point operations."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        result = work()
    return result, float(counter.get_total_flops())


def measure(case: Case) -> list[dict[str, Any]]:
    """One line for ours, one for TRL at its default batch, one at a batch of 1; equality first."""
    shape = model_shape(case.model)
    least = flops_min(case.groups, shape)
    ours, theirs = our_side(case), trl_side(case)
    values, flops = counted(ours)
    lines = [{"case": case.name, "side": "ours", "gflops": flops / 1e9, "over_min": flops / least, "goal": "≤ 1.05"}]
    for batch in (DEFAULT_BATCH, 1):
        logps, flops = counted(lambda batch=batch: theirs(batch))
        error = check(case, values, logps)
        line = {"case": case.name, "side": f"TRL, batch {batch}", "gflops": flops / 1e9, "over_min": flops / least}
        lines.append(line | {"formula": flops_trl(case, batch, shape) / least, "error": error})
    return lines


def main() -> None:
    args = harness.arguments(__doc__, threads=2, **SIZES)
    if args.quick:
        shrink(args)
    rows = [{"formula": "-", "error": "-", "goal": "-"} | line for case in cases(args) for line in measure(case)]
    ours = [line for line in rows if line["side"] == "ours"]
    claims = [
        harness.claim(f"FLOPs of log-probs of {line['case']}, counted", line["over_min"], "× F_min", "≤ 1.05")
        for line in ours
    ]
    if rows:
        columns = ("case", "side", "gflops", "over_min", "formula", "goal", "error")
        harness.finish("score_flops", args, rows, columns, claims, ("trl",))
    if missed := [line["what"] for line in claims if not line["is_met"]]:
        raise SystemExit(f"above the goal: {missed}")


if __name__ == "__main__":
    main()
