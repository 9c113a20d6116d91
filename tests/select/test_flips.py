"""Pairs with their label turned, from files to the dataset, the training's rows, the report and the exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_runs import run

import prefsel
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.pairs.export import exchanged_numbers
from prefsel.pipeline import run as run_pipeline
from prefsel.plan.check import check
from prefsel.plan.columns import pair_reader
from prefsel.progress import Progress
from prefsel.report.explain import explain_pair
from prefsel.report.trainer_folder import write_folder
from prefsel.select import flipped_rows, select_table
from prefsel.train.pair_source import TEXT, Dataset, SelectionPairs
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

AGREE = {"kind": "agree", "scores": ["score_a", "score_b"], "action": "flip"}
NUMBERS = ("a", "b")


def lines() -> list[dict[str, Any]]:
    """60 pairs; the margins of two judges run over −1, 0 and 1 independently. Completions tell which they are."""
    made = []
    for number in range(60):
        margins = dict(zip(NUMBERS, (number % 3 - 1, number // 3 % 3 - 1)))
        sides = {"chosen": f"labelled {number}", "rejected": f"other {number} " + "x" * (number % 4)}
        numbers = {
            f"{name}_{side}": float(10 + (m if side == "chosen" else 0))
            for name, m in margins.items()
            for side in sides
        }
        made.append({"prompt": f"p{number}", **sides, **numbers, "margin": None})
    return made


def told(line: dict[str, Any]) -> str:
    """What both judges say of a label."""
    margins = [line[f"{name}_chosen"] - line[f"{name}_rejected"] for name in NUMBERS]
    return "right" if min(margins) > 0 else "wrong" if max(margins) < 0 else "split"


def config(folder: Path, rule: dict[str, Any] = AGREE, **more: Any) -> Any:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return parse_config(
        {
            "name": "t",
            "sources": [{"name": "s", "paths": [str(path)]}],
            "ingest": {"rows_per_shard": 13},
            "scorers": [{"kind": "imported", "name": name, "field": name} for name in NUMBERS],
            "metrics": [{"name": n, "metric": "explicit_margin", "params": {"rm": n}} for n in NUMBERS],
            "selections": [{"name": "sure", "rule": rule, "controls": ["random", "reverse"]}],
            **more,
        }
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Any:
    home = tmp_path_factory.mktemp("flips")
    outcome = run_pipeline(config(home), str(home / "w"), Progress(quiet=True))
    return home / "w", outcome


def dataset(home: Path, name: str) -> list[dict[str, Any]]:
    (folder,) = (home / "datasets").glob(f"{name}@*")
    return pa.concat_tables(pq.read_table(file) for file in sorted((folder / "data").glob("*.parquet"))).to_pylist()


def as_labelled(row: dict[str, Any]) -> dict[str, Any]:
    """The input line that a row of the dataset comes from."""
    return lines()[int(row["prompt"][0]["content"][1:])]


def test_what_all_judges_contradict_is_turned_with_all_its_numbers(done: Any) -> None:
    home, _ = done
    rows = dataset(home, "sure")
    verdicts = [told(line) for line in lines()]
    assert (verdicts.count("right"), verdicts.count("wrong")) == (6, 7)
    assert sorted(int(row["prompt"][0]["content"][1:]) for row in rows) == [
        number for number, verdict in enumerate(verdicts) if verdict != "split"
    ]
    for row in rows:
        line, is_turned = as_labelled(row), row["flipped"]
        assert is_turned is (told(line) == "wrong")
        given = ("rejected", "chosen") if is_turned else ("chosen", "rejected")
        for side, name in zip(("chosen", "rejected"), given):
            assert row[side][0]["content"] == line[name]
            assert [row[f"rm_{one}_{side}"] for one in NUMBERS] == [line[f"{one}_{name}"] for one in NUMBERS]
        assert all(row[f"rm_{one}_chosen"] > row[f"rm_{one}_rejected"] for one in NUMBERS)
        assert row["score"] == (-1.0 if is_turned else 1.0)


def test_controls_turn_nothing(done: Any) -> None:
    home, _ = done
    for name, number in (("sure-random", 13), ("sure-reverse", 47)):
        rows = dataset(home, name)
        assert len(rows) == number
        assert "flipped" not in rows[0]
        assert all(row["chosen"][0]["content"] == as_labelled(row)["chosen"] for row in rows)


def test_the_label_keeps_its_name_and_says_that_it_is_turned(done: Any) -> None:
    """pair_id is that of the labelled pair: explain finds it, and the corpus holds it as it came."""
    home, outcome = done
    storage = Storage(str(home))
    whole = {row["pair_id"]: row for row in prefsel.open(home).pairs().to_table().to_pylist()}
    for row in dataset(home, "sure"):
        labelled = whole[row["pair_id"]]
        assert labelled["chosen"][0]["content"] == as_labelled(row)["chosen"]
        assert labelled["flipped_sure"] is row["flipped"]
        (line,) = [one for one in explain_pair(storage, row["pair_id"]) if one.startswith("selection sure:")]
        assert ("kept, flipped (chosen and rejected exchanged), stratum all" in line) is row["flipped"]
        assert "kept" in line
    assert sum(row["flipped_sure"] for row in whole.values()) == 7
    kept = prefsel.open(home).pairs(selection="sure").to_table().to_pylist()
    by_id = {row["pair_id"]: row for row in dataset(home, "sure")}
    assert {row["pair_id"] for row in kept} == by_id.keys()
    for row in kept:
        same = (
            "prompt",
            "chosen",
            "rejected",
            "flipped",
            "rm_a_chosen",
            "rm_a_rejected",
            "rm_b_chosen",
            "rm_b_rejected",
        )
        assert {name: row[name] for name in same} == {name: by_id[row["pair_id"]][name] for name in same}
        ratings = [dict(row[f"ratings_{side}"]) for side in ("chosen", "rejected")]
        assert [one["a"] for one in ratings] == [row["rm_a_chosen"], row["rm_a_rejected"]]
    assert verify(storage).is_clean
    card = next((home / "datasets").glob("sure@*/README.md")).read_text()
    assert "The label of 7 pairs is turned" in card
    assert '"flipped": 7' in card
    (report,) = (one for one in outcome.reports if one.stage == "select" and one.name == "sure")
    assert report.details["flipped"] == 7
    assert (report.rows_in, report.rows_out, report.dropped) == (60, 13, {"not_selected": 47})
    page = (home / outcome.page).read_text()
    assert "The label of <b>7</b> of them is turned" in page
    assert "label turned: chosen and rejected are exchanged" in page


@pytest.mark.parametrize("trainer", ["trl", "openrlhf", "axolotl", "llamafactory"])
def test_exports_hold_turned_pairs(done: Any, trainer: str, tmp_path: Path) -> None:
    home, _ = done
    write_folder(prefsel.open(home), "sure", trainer, str(tmp_path / "out"))
    (file,) = (tmp_path / "out").glob("*.parquet")
    rows, by_id = pq.read_table(file).to_pylist(), {row["pair_id"]: row for row in dataset(home, "sure")}
    assert len(rows) == 13

    def text(answer: Any) -> str:
        return (answer[-1] if isinstance(answer, list) else answer)["content"]

    for row in rows:
        kept = by_id[row["pair_id"]]
        assert row["flipped"] is kept["flipped"]
        assert [text(row[side]) for side in ("chosen", "rejected")] == [
            kept[side][0]["content"] for side in ("chosen", "rejected")
        ]
        assert row["rm_a_chosen"] == kept["rm_a_chosen"]


@pytest.mark.usefixtures("local_ray")
def test_the_rows_read_through_are_those_of_the_dataset(tmp_path: Path) -> None:
    plan, _ = run(config(tmp_path), tmp_path / "w")
    columns = [*TEXT, "score", "flipped"]
    written = pa.concat_tables(Dataset(plan.storage, plan.node("dataset", "sure").path).tables(columns))
    through = SelectionPairs(pair_reader(plan, []), tuple(plan.catalog.shards), plan.node("selection", "sure").path)
    assert pa.concat_tables(through.tables(columns)).select(columns).equals(written.select(columns))
    summary = load_summary(plan.storage, plan.node("selection", "sure").path)
    assert summary is not None
    details = summary.details
    sides = [sum(len(row[side][0]["content"]) for row in written.to_pylist()) / 13 for side in ("chosen", "rejected")]
    assert [details["length"]["kept"][side] for side in ("chosen", "rejected")] == pytest.approx(sides)


@pytest.mark.usefixtures("local_ray")
def test_a_flip_inside_other_rules(tmp_path: Path) -> None:
    """What the other part keeps decides which pairs stay, and has no say in their labels."""
    rule = {"kind": "intersect", "rules": [{"kind": "threshold", "score": "score_a", "low": -1.0, "high": -1.0}, AGREE]}
    _, reports = run(config(tmp_path, rule), tmp_path / "w")
    (report,) = (one for one in reports if one.stage == "select" and one.name == "sure")
    assert (report.rows_out, report.details["flipped"]) == (7, 7)
    (reverse,) = (one for one in reports if one.stage == "select" and one.name == "sure-reverse")
    assert reverse.rows_out == 53
    assert "flipped" not in reverse.details


def test_the_library_says_which_rows_to_turn() -> None:
    table = {"pair_id": [1, 2, 3, 4, 5], "a": [1.0, -2.0, 1.0, 0.0, -1.0], "b": [3.0, -1.0, -1.0, -1.0, None]}
    rule = {"kind": "agree", "scores": ["a", "b"]}
    assert select_table(table, rule).tolist() == [0]
    assert flipped_rows(table, rule).tolist() == []
    assert select_table(table, rule | {"action": "flip"}).tolist() == [0, 1]
    assert flipped_rows(table, rule | {"action": "flip"}).tolist() == [1]
    assert select_table(table, rule | {"reverse": True}).tolist() == [1, 2, 3]
    assert select_table(table, rule | {"action": "flip", "reverse": True}).tolist() == [2, 3]
    assert flipped_rows(table, rule | {"action": "flip", "reverse": True}).tolist() == []


def test_numbers_of_a_turned_pair() -> None:
    columns = {
        "rm_a_chosen": pa.array([1.0, 2.0]),
        "rm_a_rejected": pa.array([3.0, None]),
        "rm_a_max": pa.array([5.0, 6.0]),
        "gamma_dot_v": pa.array([7.0, 8.0]),
        "source": pa.array(["s", "s"]),
    }
    found = exchanged_numbers(columns, np.array([False, True]))
    assert {name: column.to_pylist() for name, column in found.items()} == {
        "rm_a_chosen": [1.0, None],
        "rm_a_rejected": [3.0, 2.0],
        "gamma_dot_v": [7.0, None],  # made of the labelled pair: nobody knows that of the turned one
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({**AGREE, "scores": ["score_a"]}, r"scores: got \['score_a'\]"),
        ({**AGREE, "scores": ["score_a", "score_a"]}, "one judge agrees with itself"),
        ({**AGREE, "scores": ["score_a", "score_c"]}, "score: got 'score_c'; did you mean|score: got 'score_c'"),
        ({"kind": "intersect", "rules": [AGREE, AGREE]}, "2 rules have the action flip"),
    ],
)
def test_what_cannot_turn_labels_is_refused(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(tmp_path, rule), Storage(str(tmp_path / "w")))


@pytest.mark.usefixtures("local_ray")
def test_a_rule_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    rule = {"kind": "threshold", "score": "score_a", "low": 5.0}
    with pytest.raises(UserError, match=r"selections\.sure: keeps none of 60 eligible pairs; widen its rule"):
        run(config(tmp_path, rule), tmp_path / "w")
