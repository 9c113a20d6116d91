"""Pairs that a template makes identical, through the stages: counted once, never selected, and nothing else moves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stage_runs import run

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.check import check
from prefsel.plan.plan import Plan
from prefsel.schema import SAME_AS
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_models import CHATML, bpe_tokenizer, tiny_causal, tiny_reward

TRIMS = CHATML.replace("m.content", "m.content | trim")


def row(number: int, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": f"who sat on mat {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": float(number),
        "score_rejected": 0.0,
    }


DIFFERENT = [row(n, f"the cat {n}", f"a dog {n}") for n in range(8)]
SAME = [row(20, "the cat", "the cat \n"), row(21, "  a dog", "a dog"), row(22, "\nbread", " bread\t")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reward")
    for folder, model in zip(found, (tiny_causal(), tiny_reward())):
        model.save_pretrained(folder)
        bpe_tokenizer(chat_template=TRIMS).save_pretrained(folder)
    return found


def config(folder: Path, rows: list[dict[str, Any]], models: tuple[Path, Path], **more: Any) -> Any:
    for name, part in (("a", rows[:-1]), ("b", rows[-1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part))
    sources = [{"name": name, "paths": [str(folder / f"{name}.jsonl")]} for name in "ab"]
    table: dict[str, Any] = {
        "name": "t",
        "sources": sources,
        "models": [
            {"kind": "pretrained", "name": name, "path": str(path), "dtype": "fp32"}
            for name, path in zip(("policy", "judge"), models)
        ],
        "scorers": [
            {"kind": "causal_logps", "model": "policy", "token_budget": 512},
            {"kind": "reward_model", "model": "judge", "token_budget": 512},
            {"kind": "imported", "name": "gold", "field": "score"},
        ],
        "metrics": [
            {"name": "near", "metric": "implicit_margin", "params": _SMALLEST},
            {"name": "judged", "metric": "explicit_margin", "params": {"rm": "judge", "absolute": True}},
            {"name": "labelled", "metric": "explicit_margin", "params": {"rm": "gold"}},
        ],
        "selections": [
            {"name": "near3", "rule": {"kind": "top", "score": "score_near", "count": 3}, "controls": ["random"]},
            {"name": "gold3", "rule": {"kind": "top", "score": "score_labelled", "count": 3}},
        ],
    }
    return parse_config(table | more)


_SMALLEST = {"policy": "policy", "absolute": True, "order": "smallest"}


def logps(plan: Plan) -> dict[bytes, Any]:
    """Log-probs of every prompt's completions."""
    folder = plan.node("columns", "policy").path
    tables = [Artifact(plan.storage, f"{folder}/{shard.source}").read(shard.shard) for shard in plan.catalog.shards]
    return {r["prompt_id"]: r["logps_policy"] for table in tables for r in table.to_pylist()}


def report_of(reports: list[StageReport], stage: str, name: str) -> StageReport:
    return next(one for one in reports if (one.stage, one.name) == (stage, name))


@pytest.mark.usefixtures("local_ray")
def test_they_are_dropped_by_every_metric_and_selected_by_none(tmp_path: Path, models: tuple[Path, Path]) -> None:
    plan, reports = run(config(tmp_path, [*SAME, *DIFFERENT], models), tmp_path / "w")
    for name in ("near", "judged", "labelled"):
        found = report_of(reports, "metric", name)
        assert (found.rows_in, found.rows_out, found.dropped) == (11, 8, {"same_tokens": 3})
    prompts = {one["prompt"] for one in SAME}
    for name in ("near3", "near3-random", "gold3"):
        folder = plan.storage.local(plan.node("dataset", name).path)
        rows = [r for file in (folder / "data").glob("*.parquet") for r in pq.read_table(file)["prompt"].to_pylist()]
        assert len(rows) == 3
        assert not prompts & {messages[0]["content"] for messages in rows}
    for name in ("policy", "judge"):
        found = report_of(reports, "score", name)
        assert (found.rows_in, found.rows_out, found.dropped) == (22, 22, {})
        assert found.details["template"]["notes"]["same_tokens"][0] == 3
    # The numbers are those of a corpus without such pairs, and so are the bytes of a shard that has none.
    (tmp_path / "other").mkdir()
    made = config(tmp_path / "other", DIFFERENT, models).model_dump(by_alias=True)
    made |= {"models": made["models"][:1], "scorers": made["scorers"][:1], "metrics": made["metrics"][:1]}
    alone, _ = run(parse_config(made | {"selections": made["selections"][:1]}), tmp_path / "alone")
    every, without = logps(plan), logps(alone)
    assert len(without) == 8
    assert every.keys() > without.keys()
    for prompt, values in without.items():
        assert every[prompt] == pytest.approx(values, rel=1e-6)
    columns = [
        Artifact(one.storage, f"{one.node('columns', 'policy').path}/{s}") for one in (plan, alone) for s in "ab"
    ]
    entries = [entry for artifact in columns for entry in artifact.entries().values()]
    tables = [artifact.read(shard) for artifact in columns for shard in artifact.entries()]
    assert [SAME_AS in table.column_names for table in tables] == [True, False, False, False]
    assert entries[1].content == entries[3].content


def test_a_model_without_a_template_is_refused_before_ray_starts(tmp_path: Path, models: tuple[Path, Path]) -> None:
    bare = tmp_path / "bare"
    tiny_causal().save_pretrained(bare)
    bpe_tokenizer(chat_template=None).save_pretrained(bare)
    storage = Storage(str(tmp_path / "w"))
    with pytest.raises(UserError, match=r"models.policy: template: got 'auto', but tokenizer .* has no chat template"):
        check(config(tmp_path, DIFFERENT, (bare, models[1])), storage)
    broken = tmp_path / "broken"
    tiny_causal().save_pretrained(broken)
    bpe_tokenizer(chat_template="{% if %}").save_pretrained(broken)
    with pytest.raises(UserError, match=r"models.policy: template 'auto': line 1: "):
        check(config(tmp_path, DIFFERENT, (broken, models[1])), storage)
