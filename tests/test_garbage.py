"""What nothing needs goes, what may be needed stays, and a run after it has nothing to do."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from prefsel.config.file import parse_config
from prefsel.garbage import find_waste, merged, remove
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)
DAY_S = 86400.0


def configuration(path: str, *, ratio: float) -> Any:
    fuse = {"kind": "fuse", "scores": ["score_a", "score_b"], "how": "zscore", "ratio": ratio}
    return parse_config(
        {
            "name": "garbage",
            "sources": [{"name": "only", "paths": [path]}],
            "ingest": {"rows_per_shard": 20},
            "split": {"holdout": 0.1},
            "scorers": [{"kind": "imported", "name": name, "field": name} for name in "ab"],
            "metrics": [{"name": name, "metric": "explicit_margin", "params": {"rm": name}} for name in "ab"],
            "selections": [
                {"name": "best", "rule": {"kind": "top", "score": "score_a", "ratio": ratio}, "dataset": "always"},
                {"name": "fused", "rule": fuse, "controls": ["random"]},
            ],
        }
    )


class Whole:
    """A workspace in which one configuration ran, and then another one."""

    def __init__(self, home: Path) -> None:
        rng = np.random.default_rng(3)
        lines = [
            {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
            | {f"{rating}_{side}": float(rng.normal()) for rating in "ab" for side in ("chosen", "rejected")}
            for number in range(50)
        ]
        (home / "only.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        self.first, self.second = (configuration(str(home / "only.jsonl"), ratio=ratio) for ratio in (0.3, 0.5))
        self.folder = home / "w"
        run(self.first, str(self.folder), QUIET)
        self.first_run = next(self.folder.glob("runs/*.json")).name
        self.of_first = {str(one.relative_to(self.folder)) for one in self.folder.glob("*/*@*")}
        run(self.second, str(self.folder), QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Whole:
    return Whole(tmp_path_factory.mktemp("garbage"))


@pytest.fixture
def storage(whole: Whole, tmp_path: Path) -> Storage:
    """A copy in which nothing was written for a day."""
    shutil.copytree(whole.folder, tmp_path / "w")
    age(tmp_path / "w", days=1)
    return Storage(str(tmp_path / "w"))


def age(path: Path, *, days: float) -> None:
    when = time.time() - days * DAY_S
    for file in [path, *path.rglob("*")]:
        os.utime(file, (when, when))


def unnamed(storage: Storage, **options: Any) -> list[str]:
    return [one.path for one in find_waste(storage, **options).waste if one.why == "unnamed"]


def forget(whole: Whole, storage: Storage) -> set[str]:
    """Forget the first run; returns what only its configuration needs."""
    storage.delete(f"runs/{whole.first_run}")
    names = ("best", "fused", "fused-random")
    return {
        *(one for one in whole.of_first if one.split("/")[0] in ("selections", "datasets") and "holdout" not in one),
        f"reports/{whole.first_run.removesuffix('.json')}",
    } & {one for one in unnamed(storage) if one.startswith("reports") or one.split("/")[1].split("@")[0] in names}


def test_nothing_that_a_finished_run_needs_goes(whole: Whole, storage: Storage) -> None:
    assert {one.why for one in find_waste(storage).waste} == {"attempts"}
    remove(storage, find_waste(storage).waste)
    assert verify(storage).findings == []
    for config in (whole.first, whole.second):
        assert not run(config, storage.uri, QUIET).is_new


def test_what_no_configuration_names_goes(whole: Whole, storage: Storage) -> None:
    expected = forget(whole, storage)
    # Two selections, the dataset of one, the control, and the page; scores are those of the second run too.
    assert len(expected) >= 4
    assert set(unnamed(storage)) >= expected
    assert not any(one.startswith(("columns", "eligible", "scores/a@", "scores/b@")) for one in unnamed(storage))
    remove(storage, find_waste(storage).waste)
    assert unnamed(storage) == []
    assert verify(storage).findings == []
    assert not run(whole.second, storage.uri, QUIET).is_new
    assert run(whole.first, storage.uri, QUIET).is_new


def test_by_age(whole: Whole, storage: Storage) -> None:
    forget(whole, storage)
    assert unnamed(storage, older_than_days=0.5)
    assert unnamed(storage, older_than_days=2) == []


def test_by_size_the_oldest_go_first(whole: Whole, storage: Storage) -> None:
    expected = sorted(forget(whole, storage))
    age(Path(storage.full(expected[-1])), days=9)
    total = sum(storage.sizes("", recursive=True).values())
    waste = find_waste(storage, keep_bytes=total)
    assert [one for one in waste.waste if one.why == "unnamed"] == []
    logs = sum(one.bytes for one in waste.waste)
    assert unnamed(storage, keep_bytes=total - logs - 1) == [expected[-1]]


def test_what_is_being_written_stays(storage: Storage) -> None:
    """Data without a ledger object, and temporary files: those of a run that died, not those of one at work."""
    shard = next(name for name in storage.files("scores", recursive=True) if name.endswith(".parquet"))
    folder, _, _ = shard.rpartition("/")
    for name in ("old.parquet", ".tmp-old", "new.parquet", ".tmp-new"):
        shutil.copy(storage.full(shard), storage.full(f"{folder}/{name}"))
    for name in ("old.parquet", ".tmp-old"):
        age(Path(storage.full(f"{folder}/{name}")), days=1)
    found = {one.path: one.why for one in find_waste(storage).waste if one.why != "attempts"}
    assert found == {f"{folder}/old.parquet": "uncommitted", f"{folder}/.tmp-old": "temporary"}


def test_a_model_that_is_gone_keeps_what_was_made_of_it(whole: Whole, storage: Storage) -> None:
    table = whole.second.model_dump(mode="json", by_alias=True)
    table["models"] = [{"name": "m", "kind": "pretrained", "path": str(Path(storage.uri) / "no-such-model")}]
    table["scorers"].append({"kind": "causal_logps", "model": "m"})
    storage.write("config.yaml", yaml.safe_dump(table).encode())
    shutil.copytree(next(Path(storage.uri).glob("columns/a@*")), Path(storage.uri) / "columns/m@0123456789abcdef")
    age(Path(storage.uri), days=1)
    found = find_waste(storage)
    assert not any(one.why == "unnamed" for one in found.waste)
    assert "columns/m@0123456789abcdef" in found.kept


def test_a_configuration_that_cannot_be_read_keeps_everything(whole: Whole, storage: Storage) -> None:
    forget(whole, storage)
    storage.write("config.yaml", b"sources: 3")
    found = find_waste(storage)
    assert {one.path.split("/")[0] for one in found.waste if one.why == "unnamed"} == {"reports"}
    assert found.kept


def test_killed_in_the_middle_nothing_half_looks_whole(
    whole: Whole, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(whole, storage)
    waste = [one for one in find_waste(storage).waste if one.why == "unnamed"]
    deleted: list[str] = []
    delete = Storage.delete

    def killed(self: Storage, path: str) -> None:
        if len(deleted) == 5:
            raise KeyboardInterrupt
        deleted.append(path)
        delete(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(storage, waste)
    run(whole.first, storage.uri, QUIET)
    assert verify(storage).is_clean


def test_lines_put_logs_of_attempts_together(storage: Storage) -> None:
    waste = find_waste(storage).waste
    assert len(waste) > 1
    assert [one.why for one in merged(waste)] == ["attempts"]
