"""Commit, resume and verify on a workspace small enough to read by eye."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pyarrow as pa
import pytest

from prefsel.display import redact
from prefsel.errors import IntegrityError
from prefsel.workspace.folders import check_folder, commit_folder, folder_content
from prefsel.workspace.ledger import Artifact, require_flow
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify


def make(tmp_path: Path) -> Artifact:
    return Artifact(Storage(str(tmp_path)), "columns/rm@0123456789abcdef/uf")


def commit(artifact: Artifact, shard: str, values: list[float | None], made_from: str = "in") -> None:
    attempt = artifact.log_attempt(shard)
    artifact.commit(shard, pa.table({"v": pa.array(values, pa.float64())}), made_from=made_from, attempt=attempt)


def test_a_shard_is_done_for_exactly_its_input(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    commit(artifact, "a", [1.0, None, -2.0])
    assert set(artifact.done({"a": "in", "b": "in"})) == {"a"}
    assert artifact.done({"a": "other input"}) == {}
    entry = artifact.entries()["a"]
    assert (entry.rows, entry.columns["v"]) == (3, {"min": -2.0, "max": 1.0, "nulls": 1})
    assert artifact.read("a")["v"].to_pylist() == [1.0, None, -2.0]


def test_attempts_are_counted_before_work(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    artifact.log_attempt("a")  # an attempt that died
    commit(artifact, "a", [1.0])
    assert artifact.attempts() == {"a": 2}
    assert len(artifact.entries()) == 1


def test_compaction_keeps_every_entry_and_later_commits_win(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    for shard in "abcd":
        commit(artifact, shard, [1.0])
    artifact.compact(at_least=2)
    assert sorted(artifact.entries()) == list("abcd")
    commit(artifact, "b", [5.0, 6.0], made_from="new")
    entries = artifact.entries()
    assert (entries["b"].rows, entries["b"].input, entries["a"].rows) == (2, "new", 1)
    artifact.compact(at_least=1)
    assert artifact.entries() == entries


class Store(Storage):
    """A directory that is talked to as a store is, several requests at a time; it is slow to take pieces away."""

    is_local = False

    def delete(self, path: str) -> None:
        if "/all-" in path:
            time.sleep(0.1)
        elif any("/all-b" in name for name in self.files(path.rsplit("/", 1)[0], recursive=True)):
            raise AssertionError("an object went before the old piece that it overrides")
        super().delete(path)


def test_old_pieces_go_before_what_overrides_them(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    commit(artifact, "b", [1.0])
    artifact.compact(at_least=1)
    for shard in "ab":
        commit(artifact, shard, [5.0, 6.0], made_from="new")
    Artifact(Store(str(tmp_path)), artifact.path).compact(at_least=1)
    assert {shard: entry.rows for shard, entry in artifact.entries().items()} == {"a": 2, "b": 2}


def test_folding_that_was_killed_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make(tmp_path)
    for shard in "ab":
        commit(artifact, shard, [1.0])

    write = Storage.write

    def killed(self: Storage, path: str, data: bytes) -> None:
        if "/copy/" in path:
            raise KeyboardInterrupt
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            artifact.compact(at_least=1)
    assert artifact.storage.exists(f"{artifact.path}/_ledger/all-a.json")
    assert verify(artifact.storage).is_clean
    artifact.compact(at_least=1)
    artifact.storage.delete(f"{artifact.path}/_ledger/copy/all-a.json")
    assert [finding.problem for finding in verify(artifact.storage).findings] == ["missing"]


@pytest.mark.parametrize(("damage", "problem"), [("flip", "altered"), ("remove", "missing"), ("grow", "altered")])
def test_verify_names_what_is_wrong(tmp_path: Path, damage: str, problem: str) -> None:
    artifact = make(tmp_path)
    commit(artifact, "a", [1.0, 2.0])
    commit(artifact, "b", [3.0])
    assert verify(artifact.storage).is_clean
    file = artifact.storage.local(artifact.file("a"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    {"flip": lambda: file.write_bytes(data), "remove": file.unlink, "grow": lambda: file.write_bytes(data + b"x")}[
        damage
    ]()
    findings = verify(artifact.storage).findings
    assert [(finding.problem, finding.path) for finding in findings] == [(problem, artifact.file("a"))]


def test_quick_verify_reads_sizes_only(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    commit(artifact, "a", [1.0, 2.0])
    file = artifact.storage.local(artifact.file("a"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert verify(artifact.storage, quick=True).is_clean
    assert not verify(artifact.storage).is_clean


def test_data_without_a_ledger_is_invisible_and_harmless(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    commit(artifact, "a", [1.0])
    artifact.storage.write(artifact.file("died"), b"half")
    assert set(artifact.entries()) == {"a"}
    result = verify(artifact.storage)
    assert result.is_clean
    assert [finding.problem for finding in result.findings] == ["uncommitted"]


def test_a_pair_selected_twice_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    ids = [bytes([n]) * 16 for n in (1, 2, 3)]
    for source, kept in (("a", ids[:2]), ("b", ids[1:])):
        artifact = Artifact(storage, f"selections/s@0123456789abcdef/{source}")
        table = pa.table({"pair_id": pa.array(kept, pa.binary(16))})
        artifact.commit("x", table, made_from="in", attempt="1")
    result = verify(storage)
    assert [finding.problem for finding in result.findings] == ["duplicated"]
    assert "02" * 16 in result.findings[0].detail


def test_folders_are_sealed_by_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "workspace"))
    local = tmp_path / "model"
    (local / "sub").mkdir(parents=True)
    (local / "a.txt").write_text("a")
    (local / "sub" / "b.txt").write_text("b")
    assert folder_content(storage, "models/m@0") is None
    seal = commit_folder(storage, {"": local}, "models/m@0", {"steps": 3})
    assert folder_content(storage, "models/m@0") == seal["content"]
    assert check_folder(storage, "models/m@0", quick=False) == {}
    storage.write("models/m@0/sub/b.txt", b"c")
    assert check_folder(storage, "models/m@0", quick=True) == {}
    assert check_folder(storage, "models/m@0", quick=False)["sub/b.txt"][0] == "altered"


def test_lost_rows_are_an_error_that_shows_the_sum() -> None:
    require_flow("select", 10, 7, {"duplicate": 3})
    with pytest.raises(IntegrityError, match="10 rows in, but 7 out"):
        require_flow("select", 10, 7, {"duplicate": 2})


def test_a_summary_comes_back_as_nothing_computed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    report = StageReport("score", "rm", "pairs", 5, 4, {"holdout": 1}, 2, 2, 1.5, "scores/rm@0", "0", {"x": 1})
    assert load_summary(storage, "scores/rm@0") is None
    save_summary(storage, report)
    again = load_summary(storage, "scores/rm@0")
    assert again is not None
    assert (again.computed_shards, again.rows_out, again.details) == (0, 4, {"x": 1})


def test_storage_travels_as_its_uri(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/b.txt", b"x")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read("a/b.txt") == b"x"
    assert copy.files("a") == ["a/b.txt"]
    assert copy.files("nowhere") == []


def test_credentials_are_redacted() -> None:
    assert redact("s3://KEY:SECRET@bucket/x?secret_key=abc&region=eu") == "s3://***@bucket/x?secret_key=***&region=eu"
