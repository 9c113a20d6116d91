"""Measure the table of docs/methods.md: every method and its controls on one corpus, one split, one seed.

    python docs/tools/methods.py WORKSPACE [--seed 0] [--scale 1.0]

Runs the ready configurations one after the other in one workspace, so that they share ingest, the split and every model
that two of them train alike, and writes WORKSPACE/methods.json after each: a killed run goes on where it stood. Prints
the rows. Minutes for each configuration: about half an hour for ten of them on two busy cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefsel.config.file import parse_config
from prefsel.demo import finals, on_inputs, paired
from prefsel.pipeline import run
from prefsel.plan.nodes import make_plan
from prefsel.progress import Progress
from prefsel.report.cost import cost_table
from prefsel.workspace.storage import Storage
from prefsel.world.gold import gold
from prefsel.world.inputs import GoldScore, evaluate_gold, make_inputs, read_prompts

CONFIGS = Path(__file__).resolve().parents[2] / "jobs/configs"
BASELINES, METHODS = CONFIGS / "baselines", CONFIGS / "methods"
ARMS = (
    *(BASELINES / f"{name}.yaml" for name in ("rand", "all", "avg")),
    *(METHODS / f"{name}.yaml" for name in ("pd", "alignment_potential", "dual_margin", "tif", "lossdiff_irm")),
    *(METHODS / "selective_dpo.yaml", BASELINES / "raf.yaml", METHODS / "less.yaml"),
    *(BASELINES / f"{name}.yaml" for name in ("dfpo_weighted", "pd_ratings", "ova")),
)
"""Controls first: what others are compared with must be there."""
UNTRAINED, RANDOM = "untrained", "dpo-rand30"
FLAVOURS = (1.0, 0.0)
"""Temperatures that responses are sampled at; 0 is greedy."""


def with_gold(corpus: Path) -> Path:
    """A copy of the corpus that tells gold, as a score which labels nothing and which one control alone reads."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in rows:
        for completion in row["completions"]:
            completion["fine-grained_score"] = gold(row["instruction"], completion["response"])
    copy = corpus.with_name("corpus-with-gold.jsonl")
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def among_correct(rand: dict[str, Any]) -> dict[str, Any]:
    """RAND, drawn among the pairs whose label agrees with gold: what a selection by correctness alone would reach."""
    (training,) = rand["train"]
    correct = {"kind": "above", "score": "score_truth", "threshold": 0.0}
    drawn = {"kind": "top", "score": "score_random", "ratio": 0.5}
    return rand | {
        "name": "rand-correct",
        "scorers": [*rand["scorers"], {"kind": "imported", "name": "truth", "field": "fine_grained"}],
        "metrics": [*rand["metrics"], {"name": "truth", "metric": "explicit_margin", "params": {"rm": "truth"}}],
        "selections": [{"name": "rand-correct", "rule": {"kind": "intersect", "rules": [correct, drawn]}}],
        "train": [training | {"name": "dpo-rand-correct", "selection": "rand-correct"}],
    }


def on_labels(everything: dict[str, Any], inputs: Any) -> dict[str, Any]:
    """ALL, on the labels that the given reward model was made from: what they are worth without it and the corpus."""
    (training,) = everything["train"]
    source = {"name": "labels", "paths": [str(inputs.proxies)], "format": "prompt_chosen_rejected"}
    return everything | {"name": "labels", "sources": [source], "train": [training | {"name": "dpo-labels"}]}


def configurations(inputs: Any) -> list[dict[str, Any]]:
    """What is run, in order, on the corpus with gold; RAND is trained once, and not again as the control of each."""
    tables = [on_inputs(file, inputs) for file in ARMS]
    rand, everything, *others = tables
    labels, corpus = on_labels(everything, inputs), str(with_gold(inputs.corpus))
    tables = [rand, among_correct(rand), everything, *others]
    for table in tables:
        for source in table["sources"]:
            source["paths"] = [corpus]
        # All with the settings of RAND, but for the control of a selection whose training starts elsewhere.
        again = [one for one in table["train"] if one["name"].endswith("-random") and one["model"] == "policy"]
        table["train"] = [one for one in table["train"] if one not in again]
    return [*tables[:4], labels, *tables[4:]]


def measured(folder: str | Path, prompts: list[str], seed: int) -> list[dict[str, Any]]:
    """Gold of a model's responses, by temperature."""
    scores: list[GoldScore] = [evaluate_gold(folder, prompts, seed=seed + 1, temperature=one) for one in FLAVOURS]
    return [{"mean": one.mean, "words": one.mean_length, "per_prompt": one.per_prompt} for one in scores]


def run_arm(table: dict[str, Any], workspace: str, prompts: list[str], seed: int) -> dict[str, Any]:
    """Run one configuration: gold, pairs and cost of each of its trainings that nothing else uses."""
    config = parse_config(table)
    outcome = run(config, workspace, Progress())
    plan = make_plan(config, Storage(workspace))
    costs = cost_table(plan, outcome.reports) or {"rows": []}
    by_selection = {row[0]: row[1:3] for row in costs["rows"]}
    eligible = next(report.rows_out for report in outcome.reports if report.stage == "eligible")
    found = {}
    for spec in finals(config):
        (report,) = (one for one in outcome.reports if one.stage == "train" and one.name == spec.name)
        found[spec.name] = {
            "file": config.name,
            "eligible": eligible,
            "pairs": report.rows_out,
            "cost": by_selection.get(spec.selection),
            "gold": measured(plan.storage.local(report.artifact), prompts, seed),
        }
    return found


def rows(found: dict[str, Any]) -> list[str]:
    """The table's lines: gold at T = 1 and greedy, each also as a paired difference to RAND over the same prompts."""
    lines = []
    for name, one in found.items():
        cells = []
        for number in range(len(FLAVOURS)):
            mine = one["gold"][number]
            difference, error = paired(mine["per_prompt"], found[RANDOM]["gold"][number]["per_prompt"])
            cells += [f"{mine['mean']:.2f}", "–" if name == RANDOM else f"{difference:+.2f} ± {error:.2f}"]
        cells = [cell.replace("-", "−") for cell in cells]
        cost = [f"{value:.1f}" for value in one.get("cost") or ()] or ["–", "–"]
        lines.append(" | ".join(["", f"`{name.removeprefix('dpo-')}`", f"{one['pairs']:,}", *cells, *cost, ""]).strip())
    return lines


def main() -> None:
    """Run what is missing, print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes of the world; less is a rehearsal")
    args = parser.parse_args()
    home = Path(args.workspace)
    inputs = make_inputs(home / f"inputs-{args.seed}", seed=args.seed, scale=args.scale)
    prompts, kept = read_prompts(inputs.heldout), home / "methods.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if UNTRAINED not in found:
        found[UNTRAINED] = {"pairs": 0, "gold": measured(inputs.policy, prompts, args.seed)}
    for table in configurations(inputs):
        if not any(one.get("file") == table["name"] for one in found.values()):
            found |= run_arm(table, str(home), prompts, args.seed)
            kept.write_text(json.dumps(found))
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
