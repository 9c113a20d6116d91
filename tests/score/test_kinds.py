"""A kind of scorer that lacks a part is told by every entry point: which kind, and where the part belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

from prefsel.config import Config, PooledScorer
from prefsel.config.file import parse_config
from prefsel.config.scorers import ScorerOptions
from prefsel.errors import PrefselError, UserError
from prefsel.plan.check import check_without_models
from prefsel.plan.nodes import make_plan
from prefsel.progress import Progress
from prefsel.report.cost import uncounted
from prefsel.score import kinds
from prefsel.score.contract import Ready, ScoredShard, check_scored
from prefsel.score.job import Job
from prefsel.selftest import lines
from prefsel.selftest.check import selftest
from prefsel.stages.score import require_columns, scoring_job
from prefsel.workspace.entries import Entry
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

GROUPS = pa.table({"completions": [[{"n": 1}, {"n": 2}], [{"n": 3}, {"n": 4}, {"n": 5}]]})


class Words(PooledScorer):
    kind: Literal["words"] = "words"

    @property
    def label(self) -> str:
        return "w"

    def columns(self, config: Any, heads: Any) -> list[str]:
        return ["rm_w"]


class Bare(ScorerOptions):
    kind: Literal["bare"] = "bare"


class Unpooled(Bare):
    @property
    def label(self) -> str:
        return "u"

    def columns(self, config: Any, heads: Any) -> list[str]:
        return ["rm_u"]


class Tried(Words):
    has_selftest = True


def config(tmp_path: Path, scorer: Any) -> Config:
    """One pair and one scorer, which is no kind of the union."""
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    made = parse_config({"name": "x", "sources": [{"name": "s", "paths": [str(file)]}]})
    return made.model_copy(update={"scorers": [scorer]})


# ------------------------------------------------------------------------------------------------------- entry points


def test_a_kind_without_a_loader_is_refused_before_anything_starts(tmp_path: Path) -> None:
    told = (
        r"scorers\.w: kind 'words' has no loader; add one to KINDS in prefsel/score/kinds\.py, which has causal_logps"
    )
    with pytest.raises(UserError, match=told):
        check_without_models(config(tmp_path, Words()), Storage(str(tmp_path)))
    with pytest.raises(UserError, match=told):
        kinds.load_one(Job(Words(), (), label="w"), Storage(str(tmp_path)))


def test_a_record_that_says_nothing_of_actors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scorers\.u: kind 'bare' runs on actors, .* Unpooled in .*PooledScorer"):
        check_without_models(config(tmp_path, Unpooled()), Storage(str(tmp_path)))


@pytest.mark.parametrize("part", ["label", "columns", "fields"])
def test_a_record_that_lacks_a_part(part: str) -> None:
    def ask() -> None:
        found = getattr(Bare(), part)
        found(None, None)  # a property has raised before

    with pytest.raises(UserError, match=rf"scorers: kind 'bare' has no {part}; add it to the record Bare in "):
        ask()


def test_the_self_test_says_that_a_kind_has_none(tmp_path: Path) -> None:
    told = lines(selftest(config(tmp_path, Words()), Progress(quiet=True)))
    assert told[0] == "w (words): kind 'words' has no self-test; `_check_scorer` in prefsel.selftest.check would try it"
    with pytest.raises(
        UserError, match=r"selftest w: kind 'words' has has_selftest, but the record Tried in .* model,"
    ):
        selftest(config(tmp_path, Tried()), Progress(quiet=True))


def test_the_cost_table_says_who_counted_nothing() -> None:
    def report(kind: str, counters: dict[str, float]) -> StageReport:
        details = {"kind": kind, "counters": counters}
        return StageReport("score", kind, "completions", 1, 1, {}, 1, 1, 0.0, "", details=details)

    reports = [[report("causal_logps", {"flops_model": 1.0}), report("imported", {})], [report("words", {})]]
    assert "kind words counted no FLOPs" in uncounted(reports)
    assert uncounted(reports[:0]) == ""


# ------------------------------------------------------------------------------------------------------------- loaders


def test_what_a_loader_gives_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, storage = Job(Words(), (), label="w"), Storage(str(tmp_path))
    monkeypatch.setattr(kinds, "KINDS", {"words": lambda job, storage: None})
    with pytest.raises(PrefselError, match=r"score w: kind 'words', loaded by test_kinds: the loader gave a NoneType"):
        kinds.load_one(job, storage)
    ready = Ready(lambda shard, groups: list)
    monkeypatch.setattr(kinds, "KINDS", {"words": lambda job, storage: ready})
    assert kinds.load_one(job, storage) is ready


@pytest.mark.parametrize(
    ("scored", "told"),
    [
        ({"rm_w": []}, "gave a dict without columns, dropped, counters, facts, poisoned"),
        (ScoredShard({"rm_w": [[1.0, 2.0]]}), "column 'rm_w' has 1 groups of 2"),
        (
            ScoredShard({"rm_w": [[1.0, None], [None, None, 5.0]], "rm_v": [[1.0, 2.0], [None, 4.0, 5.0]]}, {"odd": 2}),
            r"gave None for 3 completions, first number 1 of the shard, and counted 2 in dropped \(.'odd': 2.\)",
        ),
        (ScoredShard({"rm_w": [[1.0, 2.0], [3.0]]}), "column 'rm_w' has 1 in group 1; valid: one number or None per"),
    ],
)
def test_a_shard_that_does_not_fit(scored: Any, told: str) -> None:
    with pytest.raises(PrefselError, match=f"score w: kind 'words', loaded by acme.words: {told}"):
        check_scored(Job(Words(), (), label="w"), "acme.words", GROUPS, scored)


def test_a_shard_that_fits() -> None:
    fits = ScoredShard({"rm_w": [[1.0, None], [3.0, 4.0, 5.0]]}, {"too_long": 1})
    check_scored(Job(Words(), (), label="w"), "x", GROUPS, fits)


def test_columns_that_the_record_does_not_name(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path, Words()), Storage(str(tmp_path)))
    node = plan.node("columns", "w")
    entry = Entry("a", 1, 1, "", "", "", columns={"rm_v": {"min": 0.0, "max": 1.0, "nulls": 0}})
    with pytest.raises(
        PrefselError, match=r"kind 'words' made the columns rm_v, but `columns` of .* Words .* says rm_w"
    ):
        require_columns(plan, node, {"s/a": entry})


def test_a_kind_without_a_model(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path, Words()), Storage(str(tmp_path)))
    job = scoring_job(plan, plan.node("columns", "w"))
    assert (job.models, job.gpus_per_replica) == ((), 0)
    with pytest.raises(UserError, match=r"scorers\.w: kind 'words' loads a model, and names none; .* `models` of"):
        job.loading(Storage(str(tmp_path)))
