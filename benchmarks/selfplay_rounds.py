"""Self-play in the generated world: what alignment potential does to the gold reward, beside its controls.

    python benchmarks/selfplay_rounds.py [--seeds 5] [--workspace FOLDER] [--write] [--quick]

For every seed a world is made (policy, judge, prompts), and `jobs/configs/selfplay/alignment_potential.yaml` is played
in it by the pipeline that users run, with one arm more that selects nothing. All arms answer equally many prompts and
take equally many steps; those that select train on equally many pairs. No selector and no judge of the rounds knows the
gold reward. It is that of answers to held-out prompts; a gain is the mean over prompts of a model's gold minus that of
the policy that began, and a seed is one draw of everything, so intervals are Student's over the seeds.

Cost counts floating-point operations in forwards: one is that of the answering policy over the answers of a round.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from prefsel.config.file import parse_config
from prefsel.demo import on_inputs
from prefsel.pipeline import Outcome, run
from prefsel.progress import Progress
from prefsel.world.inputs import make_inputs

CONFIG = Path(__file__).resolve().parents[1] / "jobs/configs/selfplay/alignment_potential.yaml"
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of seeds → the quantile of Student's distribution for an interval of 95 %."""
JUDGES = ("gold", "overall")


def configured(inputs: Any, seed: int, *, quick: bool) -> dict[str, Any]:
    """The shipped configuration on a world's inputs, with an arm more that trains on all pairs; all by the seed."""
    table = on_inputs(CONFIG, inputs)
    first = table["selfplay"][0]
    everything = {key: value for key, value in first.items() if key not in ("count", "metric")}
    arms = [*table["selfplay"], everything | {"name": "all", "metric": {"metric": "random"}, "ratio": 1.0}]
    for arm in arms:
        arm["generation"] = arm["generation"] | {"seed": seed}
        arm["train"] = arm["train"] | {"seed": seed}
        if quick:
            arm["prompts"], arm["train"] = {"count": 4}, arm["train"] | {"max_steps": 1, "global_batch_pairs": 2}
            arm |= {"rounds": 1} | ({"count": 2} if "count" in arm else {})
    if quick:
        table["ingest"]["max_quarantine_fraction"] = 0.5
        table["split"]["holdout"] = 0.4
    return table | {"selfplay": arms}


def gains(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Model → what its evaluation says: gain and win rate by judge, divergence, length."""
    found = {}
    for report in outcome.reports:
        if report.stage != "evaluate" or report.details["baseline"] is None:
            continue
        judges = report.details["judges"]
        overall = report.details["overall"]
        found[report.details["model"]] = {
            **{judge: judges[judge]["reward_difference"]["mean"] for judge in JUDGES},
            **{f"win_{judge}": judges[judge]["win_rate"]["raw"]["mean"] for judge in JUDGES},
            "kl": overall["kl"]["per_response"]["mean"],
            "tokens": overall["tokens"]["mean"],
        }
    return found


def costs(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Round → operations of its parts in forwards of the answering policy over its answers; pairs and steps."""
    found = {}
    for made in outcome.made:
        reports = {(one.stage, one.name): one for one in made.reports}
        policy = made.plan.made.policy if made.plan.made else ""
        forward = reports["score", policy].details["counters"]["flops_model"]
        parts = {"generate": reports["generate", policy].details["counters"]["flops_model"] / forward}
        for (stage, name), one in reports.items():
            if stage == "score":
                parts[f"score {name}"] = one.details["counters"]["flops_model"] / forward
            if stage == "train":
                parts |= {"pairs": float(one.rows_out), "steps": float(made.plan.config.train[-1].max_steps or 0)}
        found[made.name] = parts
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds, with an interval of 95 % where there are several."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean}
    half = STUDENT_95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarised(by_seed: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Every model's numbers over seeds, and its gold beside that of `random` in the same round and seed."""
    names = sorted(set.intersection(*(set(one) for one in by_seed.values())))
    table: dict[str, Any] = {}
    for name in names:
        arm, _, number = name.rpartition("-")
        table[name] = {
            key: interval([one[name][key] for one in by_seed.values()]) for key in next(iter(by_seed.values()))[name]
        }
        control = f"random-{number}"
        if arm != "random" and control in names:
            table[name]["gold over random"] = interval([s[name]["gold"] - s[control]["gold"] for s in by_seed.values()])
    return table


def main() -> None:
    """Play every seed, and print and keep what came of it."""
    args = harness.arguments(__doc__, seeds=5, workspace="")
    home = Path(args.workspace or tempfile.mkdtemp())
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    spent: dict[str, dict[str, float]] = {}
    for seed in range(1 if args.quick else args.seeds):
        inputs = make_inputs(home / f"inputs-{seed}", seed=seed, scale=0.01 if args.quick else 1.0)
        config = parse_config(configured(inputs, seed, quick=args.quick))
        outcome = run(config, str(home / f"workspace-{seed}"), Progress())
        by_seed[seed], spent = gains(outcome), costs(outcome)
        check(outcome)
    table = summarised(by_seed)
    for name, numbers in table.items():
        told = "  ".join(f"{key} {_shown(one)}" for key, one in numbers.items())
        print(f"{name:<14} {told}")
    if args.write:
        harness.keep("selfplay_rounds", args.device, {"models": table, "seeds": by_seed, "cost": spent})


def check(outcome: Outcome) -> None:
    """What the comparison stands on: equal numbers of prompts, steps and, for the arms that select, of pairs."""
    by_round: dict[int, list[tuple[str, int, int]]] = {}
    for made in outcome.made:
        reports = {one.stage: one for one in made.reports}
        by_round.setdefault(made.number, []).append((made.arm, reports["prompts"].rows_out, reports["train"].rows_out))
    for rows in by_round.values():
        assert len({prompts for _, prompts, _ in rows}) == 1, rows
        assert len({pairs for arm, _, pairs in rows if arm != "all"}) == 1, rows


def _shown(one: Mapping[str, float]) -> str:
    around = f" ({one['low']:+.3f} to {one['high']:+.3f})" if "low" in one else ""
    return f"{one['mean']:+.3f}{around}"


if __name__ == "__main__":
    main()
