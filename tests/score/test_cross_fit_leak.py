"""No leak of labels: the model that scores a prompt was not trained on it, from the plan to the stored numbers.

What every model is trained on is read as its training reads it; which model scored a prompt shows in the numbers, as
every model gives others. Nothing is trained: models of random weights stand where trainings would leave theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import bpe_tokenizer, tiny_causal

from prefsel.config.file import parse_config
from prefsel.making import make
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan, in_order
from prefsel.progress import Progress
from prefsel.score.scorers import CausalLogpsScorer
from prefsel.stages.eligible import resolve_eligible
from prefsel.stages.ingest import ingest
from prefsel.stages.training_pairs import pair_source
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

pytestmark = pytest.mark.usefixtures("local_ray")

FOLDS = 3
QUIET = Progress(quiet=True)
DPO = {"model": "policy", "learning_rate": 1e-3, "loss": "simpo", "simpo_gamma": 0.5}  # which needs no reference
CROSS_FIT = {"folds": FOLDS, "seed": 5}
READ = {
    "on-all": {**DPO, "selection": "all"},
    "on-dataset": {**DPO, "selection": "written"},
    "on-corpus": {**DPO, "selection": "through"},
    "rewards": {"kind": "reward", "model": "policy", "learning_rate": 1e-3},
}
"""Every way in which a training reads its pairs."""


def config(folder: Path, policy: Path) -> Any:
    rows = [
        {"prompt": f"who sat where {n}?", "chosen": "the cat", "rejected": "a dog " * k, "x_chosen": n, "x_rejected": 0}
        for n in range(24)
        for k in (1, 2)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = {"kind": "top", "score": "score_margin", "ratio": 0.75}
    return parse_config(
        {
            "name": "leak",
            "sources": [{"name": "a", "paths": [str(folder / "pairs.jsonl")]}],
            "ingest": {"rows_per_shard": 20},
            "models": [{"kind": "pretrained", "name": "policy", "path": str(policy), "dtype": "fp32"}],
            "scorers": [
                {"kind": "imported", "name": "given", "field": "x"},
                {"kind": "causal_logps", "model": "on-all", "token_budget": 512},
            ],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "given"}}],
            "selections": [
                {"name": "written", "rule": rule},
                {"name": "through", "rule": rule, "dataset": "never"},
            ],
            "train": [{**training, "name": name, "cross_fit": CROSS_FIT} for name, training in READ.items()],
        }
    )


def save(folder: Path, scale: float) -> Path:
    tiny_causal(scale=scale).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Ingested and selected, with a model of its own weights for each fold of `on-all`, and their scores."""
    home = tmp_path_factory.mktemp("leak")
    made, storage = config(home, save(home / "policy", 0.3)), Storage(str(home / "w"))
    ingest(made, storage, QUIET)
    plan = make_plan(made, storage)
    resolve_eligible(plan, QUIET)
    for node in in_order([plan.node("selection", "written"), plan.node("selection", "through")]):
        if node.kind != "eligible":
            make(plan, [node], QUIET)
    for fold in range(FOLDS):
        folder = save(home / f"model-{fold}", 0.2 + 0.05 * fold)
        commit_folder(storage, {"": folder}, plan.node("model", f"on-all.{fold}").path, {})
    make(plan, [plan.node("columns", "on-all")], QUIET)
    return plan


def trained_prompts(plan: Plan, training: str, fold: int) -> set[str]:
    table, dropped = pair_source(plan, plan.node("model", f"{training}.{fold}")).table()
    assert table is not None
    assert not dropped
    return set(table["prompt_id"].to_pylist())


def scored_prompts(plan: Plan) -> list[set[str]]:
    """By fold, the prompts whose stored log-probs are those of the model that lies where its training leaves it."""
    path, found = plan.node("columns", "on-all").path, [set[str]() for _ in range(FOLDS)]
    folders = [plan.storage.local(plan.node("model", f"on-all.{fold}").path) for fold in range(FOLDS)]
    scorers = [CausalLogpsScorer(name="m", path=folder, dtype="fp32", device="cpu") for folder in folders]
    for shard in plan.catalog.shards:
        groups = Artifact(plan.storage, f"groups/{shard.source}").read(shard.shard)
        stored = Artifact(plan.storage, f"{path}/{shard.source}").read(shard.shard)["logps_on-all"].to_pylist()
        by_fold = [scorer.score(groups).columns["logps_m"] for scorer in scorers]
        for row, prompt in enumerate(groups["prompt_id"].to_pylist()):
            agree = [values[row] == pytest.approx(stored[row], rel=1e-5) for values in by_fold]
            assert sum(agree) == 1, "one model scored the prompt, and only one could have"
            found[agree.index(True)].add(prompt.hex())
    return found


def test_every_prompt_is_scored_by_the_one_model_that_was_not_trained_on_it(plan: Plan) -> None:
    scored, every = scored_prompts(plan), {prompt for fold in scored_prompts(plan) for prompt in fold}
    assert len(every) == 24
    assert all(scored)
    for fold in range(FOLDS):
        trained = trained_prompts(plan, "on-all", fold)
        assert trained.isdisjoint(scored[fold]), "a model scores prompts whose labels it was trained on"
        assert trained == every - scored[fold], "and is trained on all others"


@pytest.mark.parametrize("training", READ)
def test_a_fold_is_left_out_however_its_pairs_are_read(plan: Plan, training: str) -> None:
    left_out = scored_prompts(plan)
    trained = [trained_prompts(plan, training, fold) for fold in range(FOLDS)]
    for fold in range(FOLDS):
        assert trained[fold].isdisjoint(left_out[fold])
    read = set.union(*trained)
    assert len(read) == (24 if READ[training].get("selection", "all") == "all" else 18)
    assert all(sum(prompt in one for one in trained) == FOLDS - 1 for prompt in read)
