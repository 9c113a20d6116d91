"""Every kind of object of a workspace, damaged in every way: nothing damaged is used, and all of it is made again.

A cell of the matrix is one object and one damage. The damaged workspace is run with one more selection, which reads
scores, columns and pairs; then `verify --repair` has the last word. What the run made must be the bytes that an
undamaged workspace gives, nothing may end in a traceback, and at the end every data file is the committed one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefsel.config.file import parse_config
from prefsel.errors import DamagedError, UserError
from prefsel.mend import mend
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.report.opened import open_workspace
from prefsel.status import status
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)
NUM_PROMPTS = 60


def corpus(folder: Path) -> dict[str, str]:
    """Two files of pairs with two ratings each; some rows of one cannot be used."""
    rng = np.random.default_rng(1)
    paths = {}
    for name in ("first", "second"):
        lines = [
            {"prompt": f"{name} {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
            | {f"{rating}_{side}": float(rng.normal()) for rating in "ab" for side in ("chosen", "rejected")}
            for number in range(NUM_PROMPTS)
        ]
        rows = [json.dumps(line) for line in lines] + (['{"prompt": "no answers"}'] if name == "first" else [])
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        paths[name] = str(folder / f"{name}.jsonl")
    return paths


def configuration(paths: dict[str, str], *, more: bool = False) -> Any:
    fuse = {"kind": "fuse", "scores": ["score_a", "score_b"], "how": "zscore", "ratio": 0.4}
    table = {
        "name": "damage",
        "sources": [{"name": name, "paths": [path]} for name, path in paths.items()],
        "ingest": {"rows_per_shard": 20},
        "split": {"holdout": 0.1},
        "scorers": [{"kind": "imported", "name": name, "field": name} for name in "ab"],
        "metrics": [{"name": name, "metric": "explicit_margin", "params": {"rm": name}} for name in "ab"],
        "selections": [
            {"name": "best", "rule": {"kind": "top", "score": "score_a", "ratio": 0.3}, "controls": ["random"]},
            {"name": "fused", "rule": fuse},
        ],
    }
    if more:
        rule = {"kind": "band", "score": "score_b", "low": 20, "high": 70}
        table["selections"].append({"name": "more", "rule": rule})
    return parse_config(table)


class Whole:
    """A finished workspace, what its files hold, and what one more selection gives."""

    def __init__(self, home: Path) -> None:
        self.paths = corpus(home)
        self.config, self.more = (configuration(self.paths, more=more) for more in (False, True))
        self.folder = home / "w"
        run(self.config, str(self.folder), QUIET)
        storage = Storage(str(self.folder))
        for path in sorted(
            {str(one.parent.parent.relative_to(self.folder)) for one in self.folder.glob("**/_ledger/*")}
        ):
            if path.startswith(("scores", "groups")):
                Artifact(storage, path).compact(at_least=1)
        self.data = data_of(self.folder)
        shutil.copytree(self.folder, home / "more")
        run(self.more, str(home / "more"), QUIET)
        self.data_more = data_of(home / "more")


def data_of(folder: Path) -> dict[str, str]:
    """The hash of every data file, by path."""
    files = [file for file in folder.rglob("*.parquet") if "damaged" not in file.parts]
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Whole:
    return Whole(tmp_path_factory.mktemp("damage"))


KINDS = {
    "groups": "groups/first/*.parquet",
    "pairs": "pairs/second/*.parquet",
    "quarantine": "quarantine/first/*.parquet",
    "eligible": "eligible/*/first/*.parquet",
    "columns": "columns/a@*/first/*.parquet",
    "scores": "scores/b@*/second/*.parquet",
    "derived scores": "scores/*fused*/first/*.parquet",
    "selections": "selections/best@*/first/*.parquet",
    "datasets": "datasets/best@*/data/*.parquet",
    "dataset card": "datasets/best@*/README.md",
    "report": "reports/*/index.html",
    "catalog": "catalog.json",
    "file record": "groups/first/_files/*.json",
    "ledger": "columns/b@*/first/_ledger/*.json",
    "ledger of pairs": "pairs/first/_ledger/*.json",
    "ledger of a dataset": "datasets/best@*/data/_ledger/*.json",
    "folded ledger": "scores/a@*/first/_ledger/all-*.json",
    "copy of a ledger": "scores/a@*/first/_ledger/copy/all-*.json",
    "seal": "datasets/fused@*/_ledger/files.json",
    "summary": "scores/a@*/summary.json",
    "eligible summary": "eligible/*/summary.json",
    "manifest": "runs/*.json",
}


def flip(file: Path, _: list[Path]) -> None:
    """One bit in the middle of the file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_late(file: Path, _: list[Path]) -> None:
    """One bit near the end: of a Parquet file's footer, of a document's digest."""
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def truncate(file: Path, _: list[Path]) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path, _: list[Path]) -> None:
    file.write_bytes(b"")


def delete(file: Path, _: list[Path]) -> None:
    file.unlink()


def swap(file: Path, alike: list[Path]) -> None:
    """Another file of the same kind under its name; where there is none, the first file of another kind."""
    other = next((one for one in alike if one.read_bytes() != file.read_bytes()), None)
    file.write_bytes(other.read_bytes() if other else next(Path(file.parents[0]).rglob("*.*")).read_bytes() + b" ")


def stale(file: Path, _: list[Path]) -> None:
    """Other content of the same length, as an older version would be: only digits are exchanged."""
    data = file.read_bytes()
    if file.suffix == ".parquet":  # sound in itself, with other numbers
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        pq.write_table(table.take(np.arange(table.num_rows)[::-1].copy()), file)
        return
    file.write_bytes(data.replace(b"1", b"2"))


def ledger_gone(file: Path, _: list[Path]) -> None:
    """The whole ledger of the artifact that the file is of."""
    shutil.rmtree(_ledger(file))


def ledger_empty(file: Path, _: list[Path]) -> None:
    """Every object of that ledger, without a byte."""
    for one in _ledger(file).rglob("*.json"):
        one.write_bytes(b"")


def extra(file: Path, _: list[Path]) -> None:
    """A file more, which nobody committed, beside it."""
    shutil.copy(file, file.with_name(f"0{file.name}"))


def _ledger(file: Path) -> Path:
    return next(one for one in (*(parent / "_ledger" for parent in file.parents), file.parent) if one.is_dir())


DAMAGES: dict[str, Callable[[Path, list[Path]], None]] = {
    "flip": flip,
    "flip late": flip_late,
    "truncate": truncate,
    "empty": empty,
    "delete": delete,
    "swap": swap,
    "stale": stale,
    "ledger gone": ledger_gone,
    "ledger empty": ledger_empty,
    "extra": extra,
}
SHARDED = ("groups", "pairs", "quarantine", "eligible", "columns", "scores", "derived scores", "selections")
HAS_LEDGER = (*SHARDED, "datasets")
CELLS = [
    (kind, damage) for kind in KINDS for damage in DAMAGES if not damage.startswith("ledger") or kind in HAS_LEDGER
]


NOBODY_NAMES = {("manifest", "delete"), ("file record", "delete")}
"""Nothing says that there was one; the next run makes it."""


def is_quick(kind: str, damage: str) -> bool:
    """Whether a cell is tested with every commit: two damages of every kind, every damage of two kinds."""
    return damage in ("flip", "delete") or kind in ("scores", "summary")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [pytest.param(*cell, marks=() if is_quick(*cell) else pytest.mark.slow) for cell in CELLS],
)
def test_nothing_damaged_is_used_and_all_is_made_again(whole: Whole, kind: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    shutil.copytree(whole.folder, folder, copy_function=os.link)
    alike = sorted(folder.glob(KINDS[kind]))
    for file in [*alike, *(_ledger(alike[0]).rglob("*.json") if damage.startswith("ledger") else ())]:
        shutil.copy(file, file.with_name("own"))  # no link any more: the undamaged workspace stays as it is
        os.replace(file.with_name("own"), file)
    DAMAGES[damage](alike[0], alike)
    storage = Storage(str(folder))

    found = verify(storage)
    is_unknown = damage == "extra" or (kind, damage) in NOBODY_NAMES
    assert not found.is_clean or is_unknown, "verify misses it"
    for look in (lambda: status(storage), lambda: open_workspace(folder).pairs().to_table()):
        with suppress(DamagedError, UserError):
            look()
    run(whole.more, str(folder), QUIET)
    made = data_of(folder)
    assert {path: made.get(path) for path in whole.data_more if "/more@" in path} == {
        path: content for path, content in whole.data_more.items() if "/more@" in path
    }
    after = mend(storage, QUIET)
    assert after.is_clean, list(map(str, after.findings))
    made = data_of(folder)
    assert {path: made.get(path) for path in whole.data_more} == whole.data_more


def test_a_workspace_that_is_whole_is_left_alone(whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "w")
    before = {str(file): file.stat().st_mtime_ns for file in (tmp_path / "w").rglob("*.parquet")}
    assert mend(Storage(str(tmp_path / "w")), QUIET).is_clean
    outcome = run(whole.config, str(tmp_path / "w"), QUIET)
    assert not outcome.is_new
    assert before == {str(file): file.stat().st_mtime_ns for file in (tmp_path / "w").rglob("*.parquet")}
    assert not (tmp_path / "w/damaged").exists()
