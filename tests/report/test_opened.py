"""A finished workspace as one table: against its artifacts read file by file, its summaries, and `explain`."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from recommit import recommit

import prefsel
from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.errors import IntegrityError, UserError
from prefsel.numbers.histogram import Histogram
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.report.export_file import export_file
from prefsel.report.opened import Workspace, open_workspace
from prefsel.select import select_table
from prefsel.select.percentiles import Percentiles
from prefsel.workspace.documents import write_document
from prefsel.workspace.storage import Storage

pytestmark = pytest.mark.usefixtures("local_ray")

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 40
ASPECTS = ("help", "truth")


def corpus(folder: Path) -> dict[str, str]:
    """Two files: the second repeats pairs of the first, contradicts one, and some completions lack a number."""
    rng = np.random.default_rng(3)
    lines = []
    for number in range(NUM_PROMPTS):
        for aspect in ASPECTS:
            sides = [f'{side} {number} ü "quoted",\n{"x" * int(rng.integers(1, 9))}' for side in ("good", "bad")]
            numbers = {f"{name}_{side}": float(rng.integers(0, 6)) for name in "ab" for side in ("chosen", "rejected")}
            if number % 7 == 0 and aspect == "truth":
                del numbers["b_chosen"]
            lines.append(
                {"prompt": f"p{number}", "chosen": sides[0], "rejected": sides[1], "aspect": aspect, **numbers}
            )
    again = [dict(line) for line in lines[10:14]]
    turned = lines[20] | {side: lines[20][other] for side, other in (("chosen", "rejected"), ("rejected", "chosen"))}
    files = {"first": lines, "second": [*again, turned, lines[0] | {"prompt": "new"}]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


FUSE = {"kind": "fuse", "scores": ["score_a", "score_b"], "how": "zscore", "ratio": 0.4}
BANDS = [{"kind": "band", "score": f"score_{name}", "low": 10, "high": 80} for name in "ab"]
RULES = {
    "best": {"kind": "top", "score": "score_a", "ratio": 0.3},
    "fused": FUSE,
    "both": {"kind": "intersect", "rules": BANDS},
    "single": {"kind": "dedupe", "by": "prompt", "rule": {"kind": "top", "score": "score_b", "ratio": 0.5}},
    "strata": {"kind": "quota", "score": "score_b", "by": "aspect", "ratio": 0.5},
}


def configuration(paths: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "opened",
        "sources": [{"name": name, "paths": [path]} for name, path in paths.items()],
        "ingest": {"rows_per_shard": 25},
        "split": {"holdout": 0.1},
        "scorers": [{"kind": "imported", "name": name, "field": name} for name in "ab"],
        "metrics": [{"name": name, "metric": "explicit_margin", "params": {"rm": name}} for name in "ab"],
        "selections": [
            {"name": name, "rule": rule, "controls": ["random", "reverse"] if name in ("best", "fused") else []}
            for name, rule in RULES.items()
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    home = tmp_path_factory.mktemp("opened")
    paths = corpus(home)
    run(parse_config(configuration(paths)), str(home / "w"), Progress(quiet=True))
    for path in paths.values():  # the workspace is read alone
        Path(path).unlink()
    return home / "w"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The workspace elsewhere, to be spoiled."""
    shutil.copytree(folder, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Workspace:
    return open_workspace(folder)


@pytest.fixture(scope="module")
def rows(opened: Workspace) -> list[dict[str, Any]]:
    return opened.pairs().to_table().to_pylist(maps_as_pydicts="strict")


def committed(folder: Path, artifact: str, source: str, shard: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / artifact / source / f"{shard}.parquet").to_pylist(maps_as_pydicts="strict")


def naive_rows(folder: Path, opened: Workspace) -> list[dict[str, Any]]:
    """Every pair of every shard, looked up one by one in the Parquet files."""
    catalog = json.loads((folder / "catalog.json").read_text())["sources"]
    (eligible,) = folder.glob("eligible/all@*")
    found = []
    for source in catalog:
        for file in source["files"]:
            for shard in file["shards"]:
                place = source["name"], shard
                groups = {group["prompt_id"]: group for group in committed(folder, "groups", *place)}
                dropped = {
                    row["pair_id"]: row["dropped"]
                    for row in committed(folder, str(eligible.relative_to(folder)), *place)
                }
                scores = {
                    name: {row["pair_id"]: row for row in committed(folder, report.artifact, *place)}
                    for name, report in opened.scores.items()
                }
                kept = {
                    name: {row["pair_id"]: row for row in committed(folder, report.artifact, *place)}
                    for name, report in opened.selections.items()
                }
                for pair in committed(folder, "pairs", *place):
                    group = groups[pair["prompt_id"]]
                    sides = {side: group["completions"][pair[side]] for side in ("chosen", "rejected")}
                    found.append(
                        {
                            "pair_id": pair["pair_id"].hex(),
                            "prompt_id": pair["prompt_id"].hex(),
                            "source": source["name"],
                            "aspect": pair["aspect"],
                            "file": file["uri"],
                            "row": pair["provenance"]["row"],
                            "label_margin": pair["label_margin"],
                            "dropped": dropped[pair["pair_id"]],
                            "prompt": group["prompt"],
                            **{side: one["messages"] for side, one in sides.items()},
                            **{f"ratings_{side}": one["ratings"] for side, one in sides.items()},
                            **{
                                f"rm_{name}_{side}": one["ratings"].get(name)
                                for name in "ab"
                                for side, one in sides.items()
                            },
                            **{f"score_{name}": by_id[pair["pair_id"]]["score"] for name, by_id in scores.items()},
                            **{f"kept_{name}": pair["pair_id"] in by_id for name, by_id in kept.items()},
                        }
                    )
    return found


def test_every_pair_with_everything(folder: Path, opened: Workspace, rows: list[dict[str, Any]]) -> None:
    expected = naive_rows(folder, opened)
    assert len(expected) == 2 * NUM_PROMPTS + 6 == len(rows)
    assert len(list(opened.pairs())) == len({(row["source"], row["file"]) for row in rows}) + 3  # 80 rows in 25s
    for row, wanted in zip(rows, expected):
        assert {name: row[name] for name in wanted} == wanted
        assert row["chosen"][0]["content"].startswith(("good", "bad"))
    assert {"rm_a_max", "rm_b_var", "reason_fused-random", "percentile_fused.fuse"} <= set(rows[0])


def test_percentiles_and_scores_are_those_of_the_selections(folder: Path, opened: Workspace, rows: Any) -> None:
    histograms = {name: Histogram.from_json(one.details["histogram"]) for name, one in opened.scores.items()}
    for name, report in opened.selections.items():
        score = report.details["metric"]
        tables = [pq.read_table(file) for file in folder.glob(f"{report.artifact}/*/*.parquet")]
        kept = {row["pair_id"].hex(): row for table in tables for row in table.to_pylist()}
        shown = {row["pair_id"]: row for row in rows if row[f"kept_{name}"]}
        assert kept.keys() == shown.keys()
        assert len(kept) == report.rows_out
        for pair_id, row in shown.items():
            assert row[f"score_{score}"] == kept[pair_id]["score"]
            # The score's is the middle of its bin; the selection's lies in the same bin, on its side of the cut.
            (low,), (high,) = Percentiles(histograms[score]).ranges(np.array([row[f"score_{score}"]]))
            assert row[f"percentile_{score}"] == pytest.approx((low + high) / 2)
            assert low - 1e-9 <= kept[pair_id]["percentile"] <= high + 1e-9
    assert all((row["score_b"] is None) == (row["percentile_b"] is None) for row in rows)
    assert any(row["score_b"] is None for row in rows)


def test_reasons_add_up_to_what_the_stages_counted(opened: Workspace, rows: Any) -> None:
    for name, report in opened.selections.items():
        counted = Counter(row[f"reason_{name}"] for row in rows)
        assert counted.pop(None) == report.rows_out
        assert all((row[f"reason_{name}"] is None) == row[f"kept_{name}"] for row in rows)
        scored = opened.scores[report.details["metric"]]
        expected = Counter(scored.dropped) + Counter(report.dropped)
        assert counted == expected
    reasons = {row["reason_single"] for row in rows}
    assert {"holdout", "duplicate", "contradiction", "missing_rm_b_chosen", "same_prompt", "not_selected"} <= reasons


def test_explain_says_the_same(opened: Workspace, rows: Any) -> None:
    for row in rows[:: len(rows) // 9]:
        places = opened.explain(row["pair_id"]).split("pair      ")[1:]
        told = next(one for one in places if f"from      {row['source']}/" in one and f" row {row['row']}\n" in one)
        for name in opened.scores:
            score, percentile = row[f"score_{name}"], row[f"percentile_{name}"]
            line = next(line for line in told.splitlines() if line.startswith(f"score     {name}:"))
            if score is None:
                assert ": none (" in line
                continue
            found = re.search(rf": {re.escape(f'{score:.9g}')}, percentile ([0-9.]+) to ([0-9.]+) ", line)
            assert found, line
            # The table has the middle of the bin whose ends are told here.
            assert percentile == pytest.approx((float(found[1]) + float(found[2])) / 2, abs=0.01)
        for name in opened.selections:
            verdict = "kept, stratum" if row[f"kept_{name}"] else f"not kept ({row[f'reason_{name}']} – "
            assert f"selection {name}: {verdict}" in told


def test_pairs_are_joined_by_their_ids(copy: Path, rows: Any) -> None:
    """Scores, columns and selections in another order, and in other files: the same table."""
    for pattern in ("scores/*/*/*.parquet", "selections/*/*/*.parquet", "columns/*/*/*.parquet"):
        for file in copy.glob(pattern):
            table = pq.read_table(file)
            order = np.random.default_rng(0).permutation(table.num_rows)
            kept = table.take(pa.array(order))
            if pattern.startswith("columns"):  # groups stay in place; completions are found by their id
                kept = pa.Table.from_pylist([_reversed(row) for row in table.to_pylist()], schema=table.schema)
            recommit(copy, file, kept)
    again = open_workspace(str(copy)).pairs().to_table().to_pylist(maps_as_pydicts="strict")
    assert again == rows


def _reversed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value[::-1] if isinstance(value, list) else value for name, value in row.items()}


def test_a_shard_is_read_when_its_turn_comes(copy: Path) -> None:
    opened = open_workspace(str(copy))
    pairs = opened.pairs(["pair_id", "score_a"])
    victim = opened.contents.shards[1]
    lost = next(copy.glob(f"scores/a@*/{victim.source}/{victim.shard}.parquet"))
    batches = iter(pairs)
    assert next(batches).num_rows > 0
    lost.unlink()
    with pytest.raises(IntegrityError, match=rf"scores/a@.*{victim.shard}.parquet: missing"):
        next(batches)
    text_only = opened.pairs(["prompt"])
    assert text_only.to_table().num_rows == 2 * NUM_PROMPTS + 6  # what is not asked for is not read


def test_columns_and_selections(opened: Workspace, rows: Any) -> None:
    columns = ["score_a", "pair_id", "kept_best"]
    few = opened.pairs(columns).to_table()
    assert few.column_names == columns
    assert few.to_pylist() == [{name: row[name] for name in columns} for row in rows]
    best = opened.pairs(selection="best")
    assert best.to_table().to_pylist(maps_as_pydicts="strict") == [row for row in rows if row["kept_best"]]
    assert all(batch.num_rows for batch in best)
    for wrong, told in (
        ({"columns": ["scor_a"]}, r"columns: got 'scor_a'; did you mean 'score_a'\? valid: pair_id"),
        ({"selection": "bets"}, "selection: got 'bets'; valid: best, best-random, best-reverse, fused"),
    ):
        with pytest.raises(UserError, match=told):
            opened.pairs(**wrong)


def test_it_goes_where_tables_go(opened: Workspace) -> None:
    """Into Polars, and into `select_table`, which keeps of the eligible pairs what the run kept."""
    frame = pl.DataFrame(
        opened.pairs(["pair_id", "aspect", "score_a", "score_b", "dropped", "kept_best", "kept_strata"])
    )
    eligible = frame.filter(pl.col("dropped").is_null())
    for name in ("best", "strata"):
        kept = select_table(eligible, RULES[name])
        assert sorted(eligible[kept]["pair_id"]) == sorted(frame.filter(pl.col(f"kept_{name}"))["pair_id"])


def test_summaries(opened: Workspace, folder: Path) -> None:
    assert opened.uri == str(folder)
    assert opened.config.name == "opened"
    assert set(opened.selections) == {*RULES, *(f"{n}-{c}" for n in ("best", "fused") for c in ("random", "reverse"))}
    assert {"a", "b", "random-a", "fused.fuse", "single.dedupe"} <= set(opened.scores)
    assert f"select    best: {opened.scores['a'].rows_out} pairs in" in opened.report()


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = (
        "import sys, prefsel\n"
        f"w = prefsel.open({str(folder)!r})\n"
        "w.pairs().to_table(), w.explain(w.pairs(['pair_id']).to_table()['pair_id'][0].as_py()), w.report(), w.config\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# ---------------------------------------------------------------------------------------------------------- export


def test_exported_files(opened: Workspace, rows: Any, folder: Path, tmp_path: Path, capfdbinary: Any) -> None:
    for kind in ("parquet", "jsonl", "csv"):
        assert guarded(app, ["export", str(folder), "--output", str(tmp_path / f"all.{kind}")]) == 0
    assert b"export: 86 pairs, " in capfdbinary.readouterr().out
    table = pq.read_table(tmp_path / "all.parquet")
    assert table.equals(opened.pairs().to_table())
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert lines == rows
    with (tmp_path / "all.csv").open(newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert len(cells) == len(rows)
    for cell, row in zip(cells, rows):
        assert json.loads(cell["chosen"]) == row["chosen"]
        assert json.loads(cell["ratings_rejected"]) == row["ratings_rejected"]
        assert (float(cell["score_b"]) if cell["score_b"] else None) == row["score_b"]
        assert cell["reason_best"] == (row["reason_best"] or "")
    assert not list(tmp_path.glob(".tmp-*"))


def test_export_prints_lines(folder: Path, rows: Any, capfdbinary: Any) -> None:
    chosen = ["--columns", "pair_id,score_a", "--columns", "prompt", "--selection", "best"]
    assert guarded(app, ["export", str(folder), *chosen]) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    wanted = [{name: row[name] for name in ("pair_id", "score_a", "prompt")} for row in rows if row["kept_best"]]
    assert lines == wanted


def test_what_cannot_be_exported(folder: Path, copy: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "folder.csv").mkdir()
    for arguments, told in (
        (
            [str(folder), "--output", str(tmp_path / "a.xlsx")],
            "valid: a local file that ends with .parquet, .csv",
        ),
        ([str(folder), "--output", "s3://b/a.csv"], "--output: got 's3://b/a.csv'"),
        ([str(folder), "--output", str(tmp_path / "no" / "a.csv")], "/no' is no folder"),
        ([str(folder), "--output", str(tmp_path / "folder.csv")], "folder.csv' is a folder"),
        ([str(folder), "--columns", ","], "--columns: got ',', which names none"),
        ([str(folder), "--columns", "promt"], "did you mean 'prompt'"),
        ([str(tmp_path)], "holds no finished run"),
    ):
        assert guarded(app, ["export", *arguments]) == 2
        assert told in capfd.readouterr().err
    # A file that cannot be finished is not left behind.
    opened = open_workspace(str(copy))
    victim = opened.contents.shards[-1]
    next(copy.glob(f"scores/a@*/{victim.source}/{victim.shard}.parquet")).unlink()
    pairs = opened.pairs(["score_a"])
    (tmp_path / "out.parquet").write_text("of an earlier time")
    with pytest.raises(IntegrityError):
        export_file(pairs.schema, pairs, str(tmp_path / "out.parquet"))
    assert (tmp_path / "out.parquet").read_text() == "of an earlier time"
    assert not list(tmp_path.glob(".tmp-*"))


def test_only_a_finished_run_is_opened(copy: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"name": "other"}))
    with pytest.raises(UserError, match=r"holds no finished run; it needs the config\.yaml and the manifest"):
        prefsel.open(str(copy))
    with pytest.raises(UserError, match="is a file"):
        prefsel.open(str(copy / "config.yaml"))


def test_another_corpus_needs_another_run(copy: Path) -> None:
    catalog = json.loads((copy / "catalog.json").read_text())["sources"]
    catalog[0]["files"][0]["shards"].pop()
    write_document(Storage(str(copy)), "catalog.json", {"sources": catalog})
    with pytest.raises(UserError, match="the corpus changed since the last run"):
        prefsel.open(str(copy))
