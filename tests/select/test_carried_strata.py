"""Strata, thresholds and groups by fields of the user's own rows, from files to datasets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from naive_rules import naive_select
from stage_runs import run

import prefsel
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.pipeline import run as run_pipeline
from prefsel.plan.check import check
from prefsel.progress import Progress
from prefsel.report.explain import explain_pair
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

RULES: dict[str, dict[str, Any]] = {
    "each-task": {"kind": "quota", "score": "score_m", "by": "task", "ratio": 0.4},
    "both": {"kind": "quota", "score": "score_m", "by": ["task", "source"], "ratio": 0.5, "reverse": True},
    "limits": {"kind": "threshold", "score": "score_m", "by": "task", "low": {"code": 2.0, "7": 4.0, "null": 0.0}},
    "topped": {"kind": "fuse", "scores": ["score_m", "score_m2"], "how": "rank", "by": "task", "ratio": 0.3},
    "once": {"kind": "dedupe", "by": "prompt", "rule": {"kind": "quota", "score": "score_m", "by": "task", "count": 9}},
}


def lines(source: str) -> list[dict[str, Any]]:
    """40 pairs of each source; every fifth has no task. The second source has no annotators."""
    made = []
    for number in range(40):
        task = None if number % 5 == 0 else "code" if number % 3 else 7
        line = {"prompt": f"{source} {number // 2}", "chosen": f"yes {number}", "rejected": f"no {number}"}
        line |= {"m_chosen": float(number * 7 % 11), "m_rejected": float(number % 4), "meta": {"task": task}}
        made.append(line | ({"annotator": ("ann", "bob", "eve")[number % 3]} if source == "a" else {}))
    return made


def corpus(folder: Path, names: tuple[str, ...] = ("a", "b")) -> list[dict[str, Any]]:
    sources = []
    for name in names:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines(name)))
        carry = ["meta.task", "annotator"] if name == "a" else ["meta.task"]
        sources.append({"name": name, "paths": [str(path)], "carry": carry})
    return sources


def renamed(rule: Any) -> Any:
    """Rules above say `task` as the naive ones do; the source carries it from inside an object."""
    return json.loads(json.dumps(rule).replace('"task"', '"meta.task"'))


def config(folder: Path, **more: Any) -> Any:
    table = {
        "name": "t",
        "sources": corpus(folder),
        "ingest": {"rows_per_shard": 9},
        "scorers": [{"kind": "imported", "name": "m", "field": "m"}],
        "metrics": [
            {"name": "m", "metric": "explicit_margin", "params": {"rm": "m"}},
            {"name": "m2", "metric": "explicit_margin", "params": {"rm": "m", "absolute": True}},
        ],
        "selections": [{"name": name, "rule": renamed(rule)} for name, rule in RULES.items()],
    }
    return parse_config(table | more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    home = tmp_path_factory.mktemp("carried")
    run_pipeline(config(home), str(home / "w"), Progress(quiet=True))
    return home / "w"


def naive_rows() -> list[dict[str, Any]]:
    rows = []
    for source in "ab":
        for line in lines(source):
            prompt = prompt_id([{"role": "user", "content": line["prompt"]}])
            ids = [
                completion_id(prompt, [{"role": "assistant", "content": line[side]}]) for side in ("chosen", "rejected")
            ]
            margin, task = line["m_chosen"] - line["m_rejected"], line["meta"]["task"]
            rows.append(
                {
                    "id": int.from_bytes(pair_id(prompt, *ids, None), "big"),
                    "source": source,
                    "task": None if task is None else str(task),
                    "lengths": None,
                    "score_m": margin,
                    "score_m2": abs(margin),
                    **{name: line[name] for name in ("prompt", "chosen", "rejected")},
                }
            )
    return rows


def dataset(home: Path, name: str) -> pa.Table:
    (folder,) = (home / "datasets").glob(f"{name}@*")
    return pa.concat_tables(pq.read_table(file) for file in sorted((folder / "data").glob("*.parquet")))


@pytest.mark.parametrize("name", RULES)
def test_selections_by_carried_fields_are_the_naive_ones(done: Path, name: str) -> None:
    rows = naive_rows()
    expected = sorted(f"{rows[n]['id']:032x}" for n in naive_select(RULES[name], rows))
    assert 0 < len(expected) < 80
    assert sorted(dataset(done, name)["pair_id"].to_pylist()) == expected


def test_datasets_and_readers_hold_the_fields(done: Path) -> None:
    known = {f"{row['id']:032x}": row for row in naive_rows()}
    table = dataset(done, "both").to_pylist()
    assert all(row["meta.task"] == known[row["pair_id"]]["task"] for row in table)
    assert {row["annotator"] for row in table if row["source"] == "b"} == {None}
    assert {row["annotator"] for row in table if row["source"] == "a"} <= {"ann", "bob", "eve"}
    assert {row["stratum"] for row in table} == {
        f"{task}/{source}" for task in ("7", "code", "null") for source in "ab"
    }
    opened = prefsel.open(done).pairs(["pair_id", "meta.task", "annotator"]).to_table().to_pylist()
    assert [row["meta.task"] for row in opened] == [known[row["pair_id"]]["task"] for row in opened]
    first = next(row for row in opened if row["annotator"] == "bob")
    lines_of = list(explain_pair(Storage(str(done)), first["pair_id"]))
    assert f"carried   meta.task: {first['meta.task'] or '–'}; annotator: bob" in lines_of
    assert verify(Storage(str(done))).is_clean


def test_the_report_shows_values_by_stratum(done: Path) -> None:
    (page,) = (done / "reports").glob("*/index.html")
    text = page.read_text()
    assert "code from" in text
    assert "with score_m from its value, of each meta.task" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"selections": [{"name": "x", "rule": {"kind": "quota", "score": "score_m", "by": "tusk", "count": 1}}]},
            r"selections.x: rule.by: got 'tusk'; valid: source, aspect, length_bin, meta.task, annotator; or a field",
        ),
        (
            {
                "selections": [
                    {"name": "x", "rule": {"kind": "threshold", "score": "score_m", "by": "tusk", "low": {"a": 1}}}
                ]
            },
            r"selections.x: rule.by: got 'tusk'",
        ),
        (
            {
                "metrics": [
                    {
                        "name": "m",
                        "metric": "preference_divergence",
                        "params": {"aspects": ["a", "b"], "own_aspect": "tusk"},
                    }
                ],
                "selections": [],
            },
            r"needs column 'tusk'.*a field of the rows is there if sources\[\].carry names it",
        ),
    ],
)
def test_fields_that_nobody_carries_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(tmp_path, **change), Storage(str(tmp_path / "w")))


@pytest.mark.usefixtures("local_ray")
def test_a_stratum_without_a_value_is_named(tmp_path: Path) -> None:
    rule = {"kind": "threshold", "score": "score_m", "by": "meta.task", "low": {"code": 2.0}}
    with pytest.raises(
        UserError, match=r"low has no value for 7, null \(by meta.task\); got code; valid: one for each"
    ):
        run(config(tmp_path, selections=[{"name": "x", "rule": rule}]), tmp_path / "w")


def test_the_library_takes_any_column_as_a_stratum() -> None:
    table = {
        "pair_id": list(range(6)),
        "s": [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        "language": ["de", "de", "en", "en", None, None],
        "annotator": [1, 1, 1, 2, 2, 2],
    }
    rule = {"kind": "quota", "score": "s", "ratio": 0.5}
    assert prefsel.select.select_table(table, rule | {"by": "language"}).tolist() == [0, 2, 4]
    assert prefsel.select.select_table(table, rule | {"by": "annotator"}).tolist() in ([0, 3, 4], [0, 1, 3])
    limits = {"kind": "threshold", "score": "s", "by": "annotator", "low": {"1": 4.0, "2": -math.pi}}
    assert prefsel.select.select_table(table, limits).tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(UserError, match="rule quota: needs tusk; the table has pair_id, s, language, annotator"):
        prefsel.select.select_table(table, rule | {"by": "tusk"})
    nested = table | {"annotator": [[1]] * 6}
    with pytest.raises(UserError, match=r"annotator: got a column of list<"):
        prefsel.select.select_table(nested, rule | {"by": "annotator"})
    assert np.isfinite(table["s"]).all()
