"""The whole job on real machinery: Ray, Ray Train, DeepSpeed with two workers, models made on the spot."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from prefsel.config.file import parse_config
from prefsel.errors import IntegrityError
from prefsel.pipeline import Outcome, run
from prefsel.plan.models import find_model
from prefsel.plan.nodes import make_plan
from prefsel.progress import Progress
from prefsel.train.heldout import read_margins
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

WORDS = ["red", "green", "blue", "small", "large", "round", "old", "new", "fast", "slow"]
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 8, "batch_tokens": 512, "max_length": 64}


DPO: dict[str, Any] = {
    "model": "policy",
    "reference": "policy",
    "learning_rate": 1e-3,
    "dtype": "fp32",
    "zero_stage": 2,
    "global_batch_pairs": 6,
    "micro_batch_pairs": 2,
    "max_steps": 3,
}


def corpus(path: Path) -> str:
    """80 pairs whose chosen side is the longer one."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(80):
        long, short = (" ".join(rng.choice(WORDS, size)) for size in (8, 4))
        rows.append({"prompt": f"describe thing {number}", "chosen": long, "rejected": short})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(source: str) -> dict[str, Any]:
    return {
        "name": "whole",
        "sources": [{"name": "a", "paths": [source]}],
        "ingest": {"rows_per_shard": 20},
        "split": {"holdout": 0.2, "proxy": 0.3},
        "models": [
            {"kind": "scratch_policy", "name": "policy", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE},
            {"kind": "scratch_reward", "name": "rm", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE},
        ],
        "scorers": [{"kind": "causal_logps", "model": "policy"}, {"kind": "reward_model", "model": "rm"}],
        "metrics": [{"name": "potential", "metric": "alignment_potential", "params": {"rm": "rm", "policy": "policy"}}],
        "selections": [
            {
                "name": "half",
                "rule": {"kind": "top", "score": "score_potential", "ratio": 0.5},
                "controls": ["random", "reverse"],
            }
        ],
        "train": [
            DPO | {"name": "dpo", "selection": "half", "workers": 2, "checkpoint_every_steps": 2},
            DPO | {"name": "dpo-random", "selection": "half-random"},
        ],
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, Any, Outcome]:
    home = tmp_path_factory.mktemp("whole")
    config = parse_config(table(corpus(home / "a.jsonl")))
    return home / "w", config, run(config, str(home / "w"), Progress(quiet=True))


def test_every_stage_accounts_for_every_row(done: tuple[Path, Any, Outcome]) -> None:
    _, _, outcome = done
    for report in outcome.reports:
        assert report.rows_in == report.rows_out + sum(report.dropped.values())
    rows = {f"{report.stage} {report.name}": report.rows_out for report in outcome.reports}
    assert rows["select half"] == rows["eligible all"] // 2 == rows["select half-random"] == rows["train dpo"]


def test_the_scores_are_those_of_the_models(done: tuple[Path, Any, Outcome]) -> None:
    """Stored columns against the models themselves, opened with transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    workspace, config, _ = done
    plan = make_plan(config, Storage(str(workspace)))
    row = pq.read_table(next((workspace / plan.node("dataset", "half").path / "data").glob("*.parquet"))).to_pylist()[0]
    policy_dir, reward_dir = (workspace / find_model(plan, name).path for name in ("policy", "rm"))
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
    policy = AutoModelForCausalLM.from_pretrained(policy_dir).eval()
    with torch.no_grad():
        logps = torch.log_softmax(policy(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[start - 1 :]
        reward = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()(ids).logits
    assert row["logps_policy_chosen"] == pytest.approx(logps.sum().item(), rel=1e-5)
    assert row["num_tokens_policy_chosen"] == len(logps)
    assert row["rm_rm_chosen"] == pytest.approx(reward.item(), rel=1e-5, abs=1e-6)


def test_the_training_checked_itself_and_the_model_opens(done: tuple[Path, Any, Outcome]) -> None:
    from transformers import AutoModelForCausalLM

    workspace, _, outcome = done
    trained = next(report for report in outcome.reports if report.stage == "train")
    history = trained.details["history"]
    check = next(record for record in history if record["event"] == "self_check")
    assert check["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert check["reference_relative_error"] < 1e-4
    assert [record["step"] for record in history if record["event"] == "step"] == [1, 2, 3]
    assert trained.details["max_output_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(workspace / trained.artifact)
    assert model.config.hidden_size == 16
    assert not (workspace / trained.artifact / "training").exists()


def test_the_report_and_the_manifest_are_there(done: tuple[Path, Any, Outcome]) -> None:
    workspace, _, outcome = done
    assert outcome.page is not None
    page = (workspace / outcome.page).read_text()
    for text in ("potential", "half-random", "dpo", "Length bias"):
        assert text in page
    report = json.loads((workspace / outcome.page).with_name("report.json").read_text())
    assert all(check["ok"] for training in report["training"] for check in training["self_checks"])
    assert len(report["training"][0]["self_checks"]) == 3
    assert all(artifact["content"] for artifact in report["artifacts"])
    assert verify(Storage(str(workspace))).is_clean


def test_two_trainings_are_compared_pair_by_pair(done: tuple[Path, Any, Outcome]) -> None:
    workspace, _, outcome = done
    storage = Storage(str(workspace))
    margins = {}
    for trained in (report for report in outcome.reports if report.stage == "train"):
        found = read_margins(storage, trained.artifact)
        assert found is not None
        before, after = (record for record in trained.details["history"] if record["event"] == "eval")
        assert "margins" not in before
        for record, name in ((before, "before"), (after, "after")):
            margin_N = found[name].to_numpy()
            assert len(margin_N) == record["num_pairs"]
            assert margin_N.mean() == pytest.approx(record["margin"], abs=1e-12)
            assert ((margin_N > 0) + 0.5 * (margin_N == 0)).mean() == record["accuracy"]
        margins[trained.name] = found
    ours, theirs = margins["dpo"], margins["dpo-random"]
    assert ours["pair_id"] == theirs["pair_id"]
    agrees = [(one["after"].to_numpy() > 0) + 0.5 * (one["after"].to_numpy() == 0) for one in (ours, theirs)]
    report = json.loads((workspace / str(outcome.page)).with_name("report.json").read_text())
    (compared,) = report["comparisons"]
    assert (compared["training"], compared["control"], compared["against"]) == ("dpo", "random", "dpo-random")
    assert compared["unlike"] == []  # the number of workers makes no difference
    # Every prompt has one pair here, so the interval is the textbook one.
    difference_N = 100 * (agrees[0] - agrees[1])
    error = difference_N.std(ddof=1) / math.sqrt(len(difference_N))
    assert compared["difference"]["mean"] == pytest.approx(difference_N.mean())
    assert compared["difference"]["high"] - compared["difference"]["mean"] == pytest.approx(1.959964 * error)
    page = (workspace / str(outcome.page)).read_text()
    assert "dpo against random" in page
    assert "No model was trained on all eligible pairs" in page


def test_again_is_nothing_to_do(done: tuple[Path, Any, Outcome]) -> None:
    workspace, config, outcome = done
    again = run(config, str(workspace), Progress(quiet=True))
    assert not again.is_new
    assert again.page == outcome.page


def test_a_new_selection_scores_nothing_again(done: tuple[Path, Any, Outcome]) -> None:
    workspace, config, _ = done
    made = config.model_dump(by_alias=True)
    made["selections"] += [{"name": "tenth", "rule": {"kind": "top", "score": "score_potential", "ratio": 0.1}}]
    outcome = run(parse_config(made), str(workspace), Progress(quiet=True))
    computed = {f"{report.stage} {report.name}" for report in outcome.reports if report.computed_shards}
    assert computed == {"select tenth"}


def test_reading_through_a_selection_trains_the_same_model(done: tuple[Path, Any, Outcome], tmp_path: Path) -> None:
    workspace, config, outcome = done
    shutil.copytree(workspace, tmp_path / "w")
    trained = next(report for report in outcome.reports if report.stage == "train")
    for folder in ("datasets", "selections", trained.artifact):
        shutil.rmtree(tmp_path / "w" / folder)
    made = config.model_dump(by_alias=True)
    made["selections"][0]["dataset"] = "never"
    again = run(parse_config(made), str(tmp_path / "w"), Progress(quiet=True))
    computed = {f"{report.stage} {report.name}" for report in again.reports if report.computed_shards}
    assert computed == {"select half", "select half-random", "select half-reverse", "train dpo", "holdout holdout"}
    assert [folder.name.split("@")[0] for folder in (tmp_path / "w" / "datasets").iterdir()] == ["holdout"]
    retrained = next(report for report in again.reports if report.stage == "train")
    assert retrained.artifact == trained.artifact
    assert numbers(retrained) == numbers(trained)
    weights = f"{trained.artifact}/model.safetensors"
    assert (tmp_path / "w" / weights).read_bytes() == (workspace / weights).read_bytes()
    assert "reads through" in (tmp_path / "w" / str(again.page)).read_text()
    assert not run(parse_config(made), str(tmp_path / "w"), Progress(quiet=True)).is_new


def numbers(trained: StageReport) -> list[dict[str, Any]]:
    """The history of a training without its times."""
    return [{key: value for key, value in one.items() if "second" not in key} for one in trained.details["history"]]


def test_a_wrong_reference_fails_the_run(done: tuple[Path, Any, Outcome], tmp_path: Path) -> None:
    """Stored log-probs that are not the policy's must not be trained on."""
    workspace, config, _ = done
    plan = make_plan(config, Storage(str(workspace)))
    file = next((workspace / plan.node("dataset", "half").path / "data").glob("*.parquet"))
    original = file.read_bytes()
    stored = pq.read_table(file)
    place = stored.column_names.index("logps_policy_chosen")
    shifted = stored.set_column(place, "logps_policy_chosen", [[v - 3.0 for v in stored[place].to_pylist()]])
    made = config.model_dump(by_alias=True)
    made["train"][0] |= {"name": "wrong", "workers": 1, "checkpoint_every_steps": None}
    try:
        pq.write_table(shifted, file)
        with pytest.raises(IntegrityError, match="step-0 loss"):
            run(parse_config(made), str(workspace), Progress(quiet=True))
    finally:
        file.write_bytes(original)
    assert not list((workspace / "models").glob("wrong@*/_ledger/files.json"))  # begun, and never sealed
