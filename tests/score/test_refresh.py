"""A corpus that changes: only what is new is scored, and the result is that of a new run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_models import bpe_tokenizer, randomize, tiny_causal

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.refresh import Publishing, Refreshed, refresh
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, scale in (("policy", 0.3), ("reference", 0.2)):
        made[name] = str(tmp_path_factory.mktemp(name))
        randomize(tiny_causal(), scale).save_pretrained(made[name])
        bpe_tokenizer().save_pretrained(made[name])
    return made


def line(number: int, *, prompt: str = "question") -> dict[str, Any]:
    return {
        "prompt": f"{prompt} {number}",
        "chosen": f"yes {number}",
        "rejected": f"no {number}",
        "a_chosen": number % 7,
    }


def write(folder: Path, **files: Any) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def configuration(paths: dict[str, str], models: dict[str, str]) -> Any:
    table: dict[str, Any] = {
        "name": "nightly",
        "sources": [{"name": name, "paths": [path]} for name, path in paths.items()],
        "ingest": {"rows_per_shard": 20},
        "models": [{"name": name, "path": path, "dtype": "fp32"} for name, path in models.items()],
        "scorers": [{"kind": "causal_logps", "model": name} for name in models],
        "metrics": [
            {
                "name": "gap",
                "metric": "implicit_margin",
                "params": {"policy": "policy", "reference": "reference"},
            }
        ],
        "selections": [{"name": "best", "rule": {"kind": "top", "score": "score_gap", "ratio": 0.4}}],
    }
    return parse_config(table)


def columns_of(workspace: Path, name: str) -> dict[bytes, tuple[float, ...]]:
    """Every number of the live shards of a column set, by completion."""
    storage, found = Storage(str(workspace)), {}
    catalog = json.loads((workspace / "catalog.json").read_text())
    (folder,) = [one for one in storage.folders("columns") if one.startswith(name)]
    for source in catalog["sources"]:
        for file in source["files"]:
            for shard in file["shards"]:
                table = Artifact(storage, f"columns/{folder}/{source['name']}").read(shard)
                names = [one for one in table.column_names if one.startswith("logps")]
                for row in table.to_pylist():
                    for place, completion in enumerate(row["completion_ids"]):
                        found[completion] = tuple(row[one][place] for one in names)
    return found


def kept(workspace: Path, refreshed: Any) -> set[str]:
    (report,) = [one for one in refreshed if one.stage == "select" and one.name == "best"]
    files = sorted((workspace / report.details["dataset"] / "data").glob("*.parquet"))
    return {one for file in files for one in pq.read_table(file)["pair_id"].to_pylist()}


class Counted:
    """How many completions the models were asked for, told by the counters of the ledgers."""

    def __init__(self, workspace: Path, name: str) -> None:
        self.storage = Storage(str(workspace))
        (self.folder,) = [one for one in self.storage.folders("columns") if one.startswith(name)]

    def total(self) -> int:
        count = 0
        for source in self.storage.folders(f"columns/{self.folder}"):
            for entry in Artifact(self.storage, f"columns/{self.folder}/{source}").entries().values():
                count += entry.info["completions"] - entry.info.get("carried", 0)
        return count


BASE = [line(number) for number in range(70)]
OTHER = [line(number, prompt="other") for number in range(30)]
CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "rows appended": ({"first": [*BASE, *(line(n) for n in range(70, 75))], "second": OTHER}, 10),
    "rows removed at the begin": ({"first": BASE[3:], "second": OTHER}, 0),
    "a row inserted": ({"first": [*BASE[:30], line(500), *BASE[30:]], "second": OTHER}, 2),
    "a file gone": ({"first": BASE}, 0),
    "a file more": ({"first": BASE, "second": OTHER, "third": [line(n, prompt="new") for n in range(5)]}, 10),
    "a file replaced": ({"first": BASE, "second": [line(n, prompt="fresh") for n in range(4)]}, 8),
    "rows moved to another file": ({"first": BASE[:40], "second": [*OTHER, *BASE[40:]]}, 0),
    "all at once": (
        {"first": [*BASE[5:], line(900)], "third": [line(n, prompt="third") for n in range(3)]},
        8,
    ),
    "an answer more to an old question": (
        {"first": [*BASE, line(3) | {"rejected": "a third answer"}], "second": OTHER},
        1,
    ),
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], local_ray: None) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("before")
    paths = write(home / "data", first=BASE, second=OTHER)
    run(configuration(paths, models), str(home / "w"), QUIET)
    return home


QUICK = ("rows appended", "all at once", "an answer more to an old question")


@pytest.mark.parametrize(
    "change", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in CHANGES]
)
def test_only_what_is_new_is_scored_and_the_result_is_that_of_a_new_run(
    before: Path, models: dict[str, str], tmp_path: Path, change: str
) -> None:
    files, new = CHANGES[change]
    shutil.copytree(before / "w", tmp_path / "w")
    was = Counted(tmp_path / "w", "policy").total()
    paths = write(tmp_path / "data", **files)
    config = configuration(paths, models)
    done = refresh(config, str(tmp_path / "w"), QUIET)
    assert Counted(tmp_path / "w", "policy").total() - was == new
    assert Counted(tmp_path / "w", "reference").total() - was == new
    fresh = run(config, str(tmp_path / "fresh"), QUIET)
    for name in models:
        ours, theirs = columns_of(tmp_path / "w", name), columns_of(tmp_path / "fresh", name)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([ours[one] for one in theirs], list(theirs.values()), rtol=1e-5)
    assert kept(tmp_path / "w", done.outcome.reports) == kept(tmp_path / "fresh", fresh.reports)
    assert verify(Storage(str(tmp_path / "w"))).is_clean
    check_diff(before, tmp_path, done)
    again = refresh(config, str(tmp_path / "w"), QUIET)
    assert not again.outcome.is_new
    assert again.diffs == []


def check_diff(before: Path, now: Path, done: Refreshed) -> None:
    """Against the two data sets as sets."""
    (diff,) = done.diffs
    assert done.former is not None
    (was,) = [one for one in done.former["stages"] if one["stage"] == "select"]
    files = sorted((before / "w" / was["details"]["dataset"] / "data").glob("*.parquet"))
    then = {one for file in files for one in pq.read_table(file)["pair_id"].to_pylist()}
    today = kept(now / "w", done.outcome.reports)
    entered = diff.dropped["entered_by_corpus"] + diff.dropped["entered_by_itself"]
    left = diff.dropped["left_by_corpus"] + diff.dropped["left_by_itself"]
    assert (diff.rows_out, entered, left) == (len(then & today), len(today - then), len(then - today))
    found: dict[str, set[str]] = {}
    for file in (now / "w" / diff.artifact).rglob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            found.setdefault(row["change"], set()).add(row["pair_id"].hex())
    assert {name: len(ids) for name, ids in found.items()} == {name: n for name, n in diff.dropped.items() if n}
    could = {name: pairs_of(folder) for name, folder in (("then", before / "w"), ("now", now / "w"))}
    assert found.get("entered_by_corpus", set()) == (today - then) - could["then"]
    assert found.get("left_by_corpus", set()) == (then - today) - could["now"]


def pairs_of(workspace: Path) -> set[str]:
    """The pairs of the live shards."""
    catalog = json.loads((workspace / "catalog.json").read_text())
    return {
        one.hex()
        for source in catalog["sources"]
        for file in source["files"]
        for shard in file["shards"]
        for one in pq.read_table(workspace / "pairs" / source["name"] / f"{shard}.parquet")["pair_id"].to_pylist()
    }


def test_what_a_refresh_goes_by_is_no_waste_and_what_is_taken_back_is_in_no_diff(
    before: Path, models: dict[str, str], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from prefsel.cli import app

    shutil.copytree(before / "w", tmp_path / "w")
    files, _ = CHANGES["all at once"]
    config = configuration(write(tmp_path / "data", **files), models)
    (diff,) = refresh(config, str(tmp_path / "w"), QUIET).diffs
    table = pq.read_table(next((tmp_path / "w" / diff.artifact).rglob("*.parquet")))
    pair = table["pair_id"][0].as_py().hex()
    command = CliRunner()
    told = command.invoke(app, ["gc", "-w", str(tmp_path / "w"), "--yes"])
    assert told.exit_code == 0, told.output
    live = [stage["artifact"] for stage in refresh(config, str(tmp_path / "w"), QUIET).former["stages"]]
    assert all((tmp_path / "w" / path).exists() for path in live)
    assert not refresh(config, str(tmp_path / "w"), QUIET).outcome.is_new
    told = command.invoke(app, ["withdraw", "-w", str(tmp_path / "w"), "--pair-id", pair])
    assert told.exit_code == 0, told.output
    found = [file for file in (tmp_path / "w").rglob("*.parquet") if bytes.fromhex(pair) in file.read_bytes()]
    assert not found
    was = {name: Counted(tmp_path / "w", name).total() for name in models}
    refresh(config, str(tmp_path / "w"), QUIET)
    assert {name: Counted(tmp_path / "w", name).total() for name in models} == was
    assert verify(Storage(str(tmp_path / "w"))).is_clean


def test_what_nothing_makes_is_refused_before_anything_is_done(models: dict[str, str], tmp_path: Path) -> None:
    config = configuration(write(tmp_path / "data", first=BASE), models)
    wrong = {"--publish: got 'other'; valid: best": ("other", "x"), "name: got '../x'": ("best", "../x")}
    for told, asked in wrong.items():
        with pytest.raises(UserError, match=told):
            refresh(config, str(tmp_path / "w"), QUIET, publishing=Publishing(*asked))
    assert not (tmp_path / "w").exists()


def test_a_manifest_that_is_damaged_is_set_aside(before: Path, models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(before / "w", tmp_path / "w")
    (manifest,) = (tmp_path / "w" / "runs").glob("*.json")
    manifest.write_text("{")
    config = configuration({name: str(before / "data" / f"{name}.jsonl") for name in ("first", "second")}, models)
    was = Counted(tmp_path / "w", "policy").total()
    refresh(config, str(tmp_path / "w"), QUIET)
    assert Counted(tmp_path / "w", "policy").total() == was
    assert verify(Storage(str(tmp_path / "w"))).is_clean
