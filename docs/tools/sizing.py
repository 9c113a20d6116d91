"""Write the worked costs of docs/sizing.md with the formulas of `prefsel plan`.

python docs/tools/sizing.py            # a test compares the committed page with what this writes
"""

from __future__ import annotations

from pathlib import Path

from prefsel.models.chat import EncodedGroup
from prefsel.models.packing import ModelShape, flops_min
from prefsel.plan.accelerators import ACCELERATORS
from prefsel.plan.estimate import gpu_seconds
from prefsel.plan.survey import Estimate
from prefsel.plan.work import Work

PAGE = Path(__file__).resolve().parents[1] / "sizing.md"
BEGIN, END = "<!-- costs: written by docs/tools/sizing.py -->", "<!-- end of costs -->"
PROMPT, RESPONSE = 200, 300
"""Tokens of the worked pair."""
SHAPES = {
    "1.5 B": ModelShape(1_310_195_712, 151_936 * 1536, 28, 1536),
    "8 B": ModelShape(6_979_321_856, 128_256 * 4096, 32, 4096),
}
"""Of Qwen2.5-1.5B and Llama-3.1-8B; the reward model is as large as the policy, without its head."""
KEPT, EPOCHS, TAU = 0.3, 1, {"1.5 B": 3.0, "8 B": 4.0}


def costs() -> list[str]:
    """The table, a row for each model and number of pairs."""
    names = ("A100-80G", "H100")
    head = ["policy and rm", "pairs", "score, FLOPs", "train 30 %, FLOPs", *(f"{name}, GPU-hours" for name in names)]
    rows = [[*head, "R", "columns", "scores"]]
    for model, shape in SHAPES.items():
        pair = EncodedGroup([0] * PROMPT, [[0] * RESPONSE] * 2, ["ok", "ok"], 0)
        reward = ModelShape(shape.trunk_parameters, 0, shape.num_layers, shape.attention_width)
        forward, judged = flops_min([pair], shape), flops_min([pair], reward)
        ratio = (forward + judged + KEPT * TAU[model] * EPOCHS * forward) / ((1 + TAU[model] * EPOCHS) * forward)
        for pairs in (10**6, 10**8, 10**9):
            score = Work("scoring", "scoring", flops=Estimate.exact(pairs * (forward + judged)))
            train = Work("training", "training", flops=Estimate.exact(KEPT * pairs * EPOCHS * TAU[model] * forward))
            hours = (
                sum(gpu_seconds(work, ACCELERATORS[name]).value for work in (score, train)) / 3600 for name in names
            )
            columns, scores = 2 * pairs * (9 * 3 + 32) + pairs * 32, pairs * 25
            cells = [model, f"10{'⁶⁸⁹'[(10**6, 10**8, 10**9).index(pairs)]}"]
            cells += [f"{work.flops.value:.2e}" for work in (score, train)]
            cells += [*(f"{one:,.0f}" for one in hours), f"{ratio:.2f}", _size(columns), _size(scores)]
            rows.append(cells)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e12 else f"{num_bytes / 1e12:,.2f} TB"


def page(text: str) -> str:
    """The page with its costs written anew."""
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, "", *costs(), "", END]) + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
