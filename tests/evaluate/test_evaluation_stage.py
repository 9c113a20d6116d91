"""Evaluations on a real Ray: the stage's numbers are those of a naive loop over texts, models and files."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_policies
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.evaluate.answers import read_answers
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.report.answers_file import find_evaluation, write_answers_file
from prefsel.report.evaluated import read_prompts
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]
QUIET = Progress(quiet=True)
SAMPLES = 2


class Evaluated(NamedTuple):
    table: dict[str, Any]
    workspace: str
    storage: Storage
    reports: dict[str, StageReport]
    folders: dict[str, Path]


JUDGES = {"goods": "counting_judges:goods", "more": "counting_judges:more_goods"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Evaluated:
    """A policy, a copy of it and one that says `good` more often, compared with the first one."""
    home = tmp_path_factory.mktemp("evaluated")
    folders = {
        name: tiny_policies.save_policy(home / name, goodness=goodness)
        for name, goodness in (("base", 0.0), ("copy", 0.0), ("better", 2.0))
    }
    corpus = tiny_policies.save_prompts(home / "pairs.jsonl", 40)
    table = {
        "name": "evaluated",
        "sources": [{"name": "s", "paths": [str(corpus)]}],
        "split": {"holdout": 0.5},
        "models": [{"name": name, "path": str(folder), "dtype": "fp32"} for name, folder in folders.items()],
        "evaluate": {
            "prompts": {"part": "holdout", "count": 16},
            "generation": {
                **{"samples": SAMPLES, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8},
                **{"max_repetition": None, "prompts_per_shard": 4, "pool": {"size": 1}},
            },
            "judges": [{"kind": "function", "name": "goods", "function": JUDGES["goods"], "pool": {"size": 1}}],
            "pairwise": [{"name": "more", "function": JUDGES["more"]}],
            "baseline": "base",
            "models": ["copy", "better"],
            "resamples": 500,
        },
    }
    outcome = run(parse_config(table), str(home / "w"), QUIET)
    assert outcome.page is not None
    reports = {one.name: one for one in outcome.reports if one.stage == "evaluate"}
    return Evaluated(table, str(home / "w"), Storage(str(home / "w")), reports, folders)


def texts_of(made: Evaluated, model: str) -> dict[str, list[str]]:
    """prompt_id → answers, read from the shards of a model's answers."""
    report = made.reports[model]
    artifact, found = Artifact(made.storage, report.details["groups"][model]), {}
    for shard in artifact.entries():
        for row in artifact.read(shard).to_pylist():
            found[row["prompt_id"].hex()] = [one["messages"][0]["content"] for one in row["completions"]]
    return found


def prompts_of(made: Evaluated, model: str) -> dict[str, str]:
    artifact = Artifact(made.storage, made.reports[model].details["groups"][model])
    rows = [row for shard in artifact.entries() for row in artifact.read(shard).to_pylist()]
    return {row["prompt_id"].hex(): row["prompt"][0]["content"] for row in rows}


def test_everything_asked_for_is_evaluated_and_the_baseline_once(made: Evaluated) -> None:
    assert list(made.reports) == ["base", "copy", "better"]
    assert made.reports["better"].details["baseline"] == "base"
    assert made.reports["base"].details["baseline"] is None
    for report in made.reports.values():
        assert report.rows_in == 16
        assert report.rows_out + sum(report.dropped.values()) == 16


def test_numbers_are_those_of_a_naive_loop(made: Evaluated) -> None:
    ours, theirs = texts_of(made, "better"), texts_of(made, "base")
    both = sorted(ours.keys() & theirs.keys())
    assert len(both) == made.reports["better"].rows_out > 10
    record = json.loads(made.storage.read(f"{made.reports['better'].artifact}/evaluation.json"))["judges"]["goods"]
    rewards = [float(text.split().count("good")) for prompt in both for text in ours[prompt]]
    assert record["reward"]["mean"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-12)
    gains, wins = [], []
    for prompt in both:
        own, other = ([text.split().count("good") for text in texts[prompt]] for texts in (ours, theirs))
        gains.append(sum(own) / len(own) - sum(other) / len(other))
        outcomes = [(a > b) + 0.5 * (a == b) for a in own for b in other]
        wins.append(sum(outcomes) / len(outcomes))
    assert record["reward_difference"]["mean"] == pytest.approx(sum(gains) / len(gains), rel=1e-12)
    assert record["win_rate"]["raw"]["mean"] == pytest.approx(sum(wins) / len(wins), rel=1e-12)
    rows = read_prompts(made.storage, made.reports["better"].artifact).to_pylist()
    assert [row["prompt_id"] for row in rows] == both
    assert [row["win_goods"] for row in rows] == pytest.approx(wins)
    # A judge that compares says the same here as rewards do: it wins where there are more, a tie is a tie.
    pairwise = made.reports["better"].details["judges"]["more"]["win_rate"]
    assert pairwise["raw"]["mean"] == record["win_rate"]["raw"]["mean"]
    assert pairwise["num_inconsistent"] == 0


def test_divergence_is_that_of_the_models_themselves(made: Evaluated) -> None:
    models = {name: AutoModelForCausalLM.from_pretrained(made.folders[name]).eval() for name in ("better", "base")}
    tokenizer = AutoTokenizer.from_pretrained(made.folders["base"])
    prompts, sums, tokens = prompts_of(made, "better"), [], 0
    common = texts_of(made, "base").keys()
    for prompt, texts in texts_of(made, "better").items():
        if prompt not in common:
            continue
        head = tokenizer(f"<bos> user {prompts[prompt]} <eos> assistant", return_tensors="pt")["input_ids"][0]
        for text in texts:
            said = tokenizer(f"{text} <eos>", return_tensors="pt")["input_ids"][0]
            row = torch.cat([head, said])[None]
            with torch.no_grad():
                p, q = (models[name](row).logits[0, len(head) - 1 : -1].double().log_softmax(-1) for name in models)
            sums.append(float((p.exp() * (p - q)).sum()))
            tokens += len(said)
    record = made.reports["better"].details["overall"]["kl"]
    assert record["num_tokens"] == tokens
    assert record["per_response"]["mean"] == pytest.approx(np.mean(sums), rel=1e-4)
    assert made.reports["better"].details["overall"]["reference"] == "base"


def test_a_copy_is_not_found_better_and_a_planted_one_is(made: Evaluated) -> None:
    copy, better = (made.reports[name].details["judges"] for name in ("copy", "better"))
    assert texts_of(made, "copy") == texts_of(made, "base")
    assert copy["goods"]["reward_difference"]["mean"] == 0.0
    # Every answer beside every one of its own: as many wins as losses.
    assert copy["goods"]["win_rate"]["raw"]["mean"] == copy["more"]["win_rate"]["raw"]["mean"] == 0.5
    assert made.reports["copy"].details["overall"]["kl"]["per_response"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert better["goods"]["reward_difference"]["low"] > 0
    for judge in ("goods", "more"):
        assert better[judge]["win_rate"]["raw"]["low"] > 0.5
    assert made.reports["better"].details["overall"]["kl"]["per_response"]["low"] > 0


def attempts(storage: Storage) -> dict[str, int]:
    """How often each shard of everything was begun."""
    kinds = ("prompts", "groups", "columns", "verdicts")
    names = [name for kind in kinds for name in storage.files(kind, recursive=True) if "/_ledger/attempts/" in name]
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name.rsplit(".", 1)[0]] += 1
    return dict(counts)


def test_what_is_there_is_not_made_again(made: Evaluated) -> None:
    before = attempts(made.storage)
    assert before
    assert set(before.values()) == {1}
    again = run(parse_config(made.table), made.workspace, QUIET)
    assert not again.is_new
    assert attempts(made.storage) == before
    # As if it had been killed after all but one shard were compared.
    verdict = next(name for name in before if name.startswith("verdicts/"))
    root, shard = verdict.split("/_ledger/attempts/")
    made.storage.delete(f"{root}/_ledger/{shard}.json")
    contents = {one.name: made.storage.read(f"{one.artifact}/evaluation.json") for one in made.reports.values()}
    for report in made.reports.values():
        made.storage.delete_tree(report.artifact)
    assert run(parse_config(made.table), made.workspace, QUIET, until="evaluate").is_new
    after = attempts(made.storage)
    assert {name: count for name, count in after.items() if count != 1} == {verdict: 2}
    for report in made.reports.values():
        assert made.storage.read(f"{report.artifact}/evaluation.json") == contents[report.name]
    assert verify(made.storage).is_clean


def test_the_page_shows_both_models_beside_each_other(made: Evaluated) -> None:
    folder = sorted(made.storage.folders("reports"))[-1]
    page = json.loads(made.storage.read(f"reports/{folder}/report.json"))
    assert [one["model"] for one in page["evaluated"]] == ["base", "copy", "better"]
    examples = page["evaluated"][2]["examples"]
    assert len(examples) == 6
    ours, theirs = texts_of(made, "better"), texts_of(made, "base")
    for one in examples:
        assert one["answer"] == ours[one["prompt_id"]][0]
        assert one["baseline"] == theirs[one["prompt_id"]][0]
    html = made.storage.read(f"reports/{folder}/index.html").decode()
    assert "What judges say of each model" in html
    assert "Answers of better beside those of base" in html


def test_answers_are_written_for_public_judges(made: Evaluated, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a second answer to a question"):
        write_answers_file(made.storage, "better", "alpaca_eval", str(tmp_path / "a.json"))
    file = tmp_path / "answers.jsonl"
    written = write_answers_file(made.storage, "better", "arena_hard_choices", str(file))
    ours = texts_of(made, "better")
    found = read_answers(file.read_text(), "arena_hard_choices")
    assert written == len(found) == sum(map(len, ours.values()))
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for answer in found:
        by_prompt[str(answer.question_id)].append(answer.text)
    assert by_prompt == ours
    questions, prompts = tmp_path / "question.jsonl", prompts_of(made, "better")
    rows = [
        {"question_id": f"q{number}", "category": "c", "turns": [{"content": prompts[prompt]}]}
        for number, prompt in enumerate(sorted(ours)[:3])
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_answers_file(made.storage, "better", "arena_hard_choices", str(file), questions=str(questions))
    found = read_answers(file.read_text(), "arena_hard_choices")
    assert list(dict.fromkeys(answer.question_id for answer in found)) == ["q0", "q1", "q2"]
    rows[0]["turns"] = [{"content": "never asked"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"1 of them have no answer in the evaluation, first: .'q0'"):
        write_answers_file(made.storage, "better", "arena_hard_choices", str(file), questions=str(questions))
    with pytest.raises(UserError, match="model: got 'nobody'; valid: base, better, copy"):
        find_evaluation(made.storage, "nobody")
