"""The demonstration: a world whose gold reward is known, the whole job on it, and what that did to the reward."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from prefsel.config.file import parse_config, read_table
from prefsel.errors import UserError
from prefsel.pipeline import run
from prefsel.plan.evaluations import finals
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.workspace.lease import hold
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

SELECTIONS = ("random30", "pd30", "potential30")


def run_demo(
    workspace: str, *, seed: int, progress: Progress, config_file: Path | None = None, wait: bool = False
) -> None:
    """Make the inputs, run the pipeline, measure the gold reward of every model, print the table.

    Args:
        workspace: A local directory.
        seed: Of the world and the models.
        progress: Where it is told.
        config_file: Run this configuration on the inputs; None: the demonstration's own.
        wait: Wait for the end of another run that writes to the workspace.

    Raises:
        RefusedError: another run writes to the workspace.
        UserError: the workspace is not a local directory, or the configuration does not fit the inputs.
    """
    storage = Storage(workspace)
    if not storage.is_local:
        raise UserError(f"--workspace: got {workspace!r}; the demo writes models beside it, so: a local directory")
    with hold(storage, wait=wait, tell=progress.line) as held:
        _run_demo(held, seed, progress, config_file)


def _run_demo(storage: Storage, seed: int, progress: Progress, config_file: Path | None) -> None:
    inputs = prepare(storage.local(f"inputs-{seed}"), seed, progress)
    config = parse_config(demo_config(inputs, seed) if config_file is None else on_inputs(config_file, inputs))
    table_file = f"demo-table-{config.name}-{seed}.json"

    def measure(plan: Plan, reports: Sequence[StageReport]) -> list[dict[str, Any]]:
        table = gold_table(plan, reports, inputs, seed, progress)
        kept = {key: value for key, value in table.items() if key != "measures"}
        storage.write(table_file, json.dumps(kept, indent=1).encode())
        return [table]

    outcome = run(config, storage.uri, progress, tables=measure)
    if not outcome.is_new:
        progress.line("nothing to do: the demo is complete; what it measured then:")
    show(json.loads(storage.read(table_file)), progress)
    assert outcome.page is not None
    progress.line(f"report: {storage.full(outcome.page)}")


def prepare(folder: Path, seed: int, progress: Progress) -> Any:
    """The generated inputs, with one line of progress per piece."""
    from prefsel.world.inputs import Sizes, make_inputs

    sizes = Sizes()
    total = sizes.policy_steps + sizes.reward_steps + sizes.num_prompts
    done: dict[str, int] = {}
    with progress.track("make a world", total, "steps") as counter:

        def told(task: str, so_far: int, of: int) -> None:
            counter.advance(so_far - done.get(task, 0), task)
            done[task] = so_far

        inputs = make_inputs(folder, seed=seed, on_progress=told)
    made = ", ".join(f"{piece} {seconds:.0f} s" for piece, seconds in inputs.seconds.items())
    accuracy = ", ".join(f"{head} {share:.2f}" for head, share in inputs.reward_accuracy.items())
    progress.line(f"world     {sizes.num_prompts:,} prompts x {sizes.num_responses} responses of the policy ({made})")
    progress.line(f"world     reward model from {inputs.num_proxy_labels:,} fresh labels; held-out accuracy {accuracy}")
    return inputs


def demo_config(inputs: Any, seed: int) -> dict[str, Any]:
    """The configuration of the demo: what a user would write for such a corpus."""
    from prefsel.world.gold import ASPECTS

    model = {"kind": "pretrained", "dtype": "fp32"}
    dpo = {
        "model": "policy",
        "reference": "policy",
        "beta": 0.1,
        "learning_rate": 3e-4,
        "dtype": "fp32",
        "zero_stage": 2,
        "global_batch_pairs": 24,
        "micro_batch_pairs": 24,
        "token_budget": 8192,  # nosec B105 # a number of tokens
        "max_steps": 120,
        "max_eval_pairs": 128,
        "seed": seed,
    }
    return {
        "name": "demo",
        "sources": [{"name": "world", "paths": [str(inputs.corpus)], "format": "ultrafeedback"}],
        "ingest": {"rows_per_shard": 300},
        "split": {"holdout": 0.05},
        "models": [
            {**model, "name": "policy", "path": str(inputs.policy)},
            {**model, "name": "reward", "path": str(inputs.reward_model)},
        ],
        "scorers": [
            {"kind": "causal_logps", "model": "policy"},
            {"kind": "reward_model", "model": "reward"},
            {"kind": "imported", "name": "ratings", "field": list(ASPECTS), "as": "ratings"},
        ],
        "metrics": [
            {
                "name": "divergence",
                "metric": "preference_divergence",
                "params": {"aspects": list(ASPECTS), "source": "ratings"},
            },
            {"name": "potential", "metric": "alignment_potential", "params": {"rm": "overall", "policy": "policy"}},
            {"name": "random", "metric": "random", "params": {"seed": seed}},
        ],
        "selections": [
            {"name": "random30", "rule": {"kind": "top", "score": "score_random", "ratio": 0.3}},
            {"name": "pd30", "rule": {"kind": "top", "score": "score_divergence", "ratio": 0.3}},
            {"name": "potential30", "rule": {"kind": "top", "score": "score_potential", "ratio": 0.3}},
        ],
        "train": [{**dpo, "name": f"dpo-{name}", "selection": name} for name in SELECTIONS],
        "ray": {"num_cpus": 2, "object_store_gib": 0.5},
    }


def on_inputs(config_file: Path, inputs: Any) -> dict[str, Any]:
    """A configuration with the paths of the inputs: of the source `world`, and of the models `policy` and `reward`.

    Raises:
        UserError: it has no source of that name.
    """
    table = read_table(config_file)
    paths = {"policy": str(inputs.policy), "reward": str(inputs.reward_model)}
    sources = [source for source in table.get("sources", []) if source.get("name") == "world"]
    if not sources:
        raise UserError(f"--config: {config_file} has no source named 'world', whose paths the demo would set")
    for source in sources:
        source["paths"] = [str(inputs.corpus)]
    for model in table.get("models", []):
        if model.get("name") in paths:
            model["path"] = paths[model["name"]]
    return table


def gold_table(
    plan: Plan, reports: Sequence[StageReport], inputs: Any, seed: int, progress: Progress
) -> dict[str, Any]:
    """Gold reward of the responses of every model to the held-out prompts, sampled and greedy.

    Returns:
        A table for the page; its `measures` hold the gold reward of every prompt by training, for paired differences.
    """
    from prefsel.world.inputs import evaluate_gold, read_prompts

    prompts = read_prompts(inputs.heldout)
    trained = {report.name: report for report in reports if report.stage == "train"}
    folders = {"untrained": (inputs.policy, 0)}
    for spec in finals(plan.config):
        report = trained[spec.name]
        folders[spec.name] = (plan.storage.local(report.artifact), report.rows_out)
    rows: list[list[Any]] = []
    base: tuple[float, ...] = ()
    measures: dict[str, dict[str, Sequence[float]]] = {"gold reward, T = 1": {}, "gold reward, greedy": {}}
    with progress.track("measure gold", len(folders), "models") as counter:
        for name, (folder, pairs) in folders.items():
            sampled = evaluate_gold(folder, prompts, seed=seed + 1)
            greedy = evaluate_gold(folder, prompts, seed=seed + 1, temperature=0.0)
            base = base or sampled.per_prompt
            gain, error = paired(sampled.per_prompt, base)
            words = sampled.mean_length
            for by_training, found in zip(measures.values(), (sampled, greedy)):
                by_training[name] = found.per_prompt
            shown = name.removeprefix("dpo-")
            rows.append([shown, pairs, sampled.mean, sampled.sem, gain, error, greedy.mean, greedy.sem, words])
            counter.advance()
    return {
        "title": "Gold reward of each model's responses",
        "note": " ".join(
            [
                f"{len(prompts)} held-out prompts, one response each, sampled at T = 1 and greedy.",
                "Gold is standardised over the grammar; gain is against untrained.",
                "± is one standard error over prompts, of one training run: a difference of a few needs more seeds.",
                f"The reward model cost {inputs.num_proxy_labels:,} labels of its own.",
            ]
        ),
        "columns": ["model", "pairs", "gold T=1", "±", "gain", "±", "greedy", "±", "words"],
        "rows": rows,
        "measures": measures,
    }


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean difference over the same prompts, and its standard error."""
    differences = [value - other for value, other in zip(values, base)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def show(table: dict[str, Any], progress: Progress) -> None:
    """Print the table."""
    shown = Table(title=table["title"], caption=table["note"], title_justify="left", caption_justify="left")
    for name in table["columns"]:
        shown.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in table["rows"]:
        shown.add_row(*(f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in row))
    progress.show(shown)
