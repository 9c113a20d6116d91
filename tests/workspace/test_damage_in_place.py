"""What lies in the place of something that was committed: another document, a folder, a file too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from prefsel.errors import DamagedError
from prefsel.mend import mend
from prefsel.progress import Progress
from prefsel.status import status
from prefsel.workspace.catalog import Catalog, SourceRecord, read_catalog, write_catalog
from prefsel.workspace.folders import fetch_folder, read_seal, seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.notes import left, notes
from prefsel.workspace.repair import set_aside, settle
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import Finding, as_finding, verify

MODEL, COLUMNS = "models/m@0123456789abcdef", "columns/c@0123456789abcdef/a"
OTHERS = {
    "null": b"null",
    "a table": b"{}",
    "a list": b"[]",
    "a configuration": b'{"architectures": ["LlamaForCausalLM"]}',
}
READS: dict[str, Callable[[Storage], object]] = {
    "catalog.json": read_catalog,
    f"{MODEL}/_ledger/files.json": lambda storage: read_seal(storage, MODEL),
    f"{MODEL}/summary.json": lambda storage: load_summary(storage, MODEL),
    f"{COLUMNS}/_ledger/s.json": lambda storage: Artifact(storage, COLUMNS).entries(),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A workspace with a catalog, one sealed model and one shard."""
    made = Storage(str(tmp_path / "w"))
    write_catalog(made, Catalog([SourceRecord("a", "train", [])]))
    seal_files(made, MODEL, {"config.json": b'{"hidden_size": 4}', "model.safetensors": b"weights"}, {})
    save_summary(made, StageReport("train", "m", "pairs", 1, 1, {}, 1, 1, 0.0, MODEL))
    Artifact(made, COLUMNS).commit("s", pa.table({"v": [1.0]}), made_from="in", attempt="1")
    return made


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_document_in_the_place_of_one_is_damage(storage: Storage, path: str, other: str) -> None:
    storage.write(path, OTHERS[other])
    with pytest.raises(DamagedError, match="another file lies in its place") as error:
        READS[path](storage)
    assert error.value.path == path
    assert path in [finding.path for finding in verify(storage).findings]


def test_a_document_of_an_earlier_version_is_read(storage: Storage) -> None:
    path = f"{MODEL}/summary.json"
    table = json.loads(storage.read(path))
    del table["digest"]
    storage.write(path, json.dumps(table).encode())
    assert load_summary(storage, MODEL) is not None


@pytest.mark.parametrize("kind", ["a folder", "a link to itself"])
def test_what_is_no_file_is_set_aside(storage: Storage, kind: str) -> None:
    path = f"{MODEL}/summary.json"
    place = storage.local(path)
    place.unlink()
    if kind == "a folder":
        place.mkdir()
        (place / "mine").write_text("kept")
    else:
        place.symlink_to(place.name)
    with pytest.raises(DamagedError, match="what lies there is no file") as error:
        load_summary(storage, MODEL)
    (note,) = set_aside(storage, [as_finding(error.value)])
    save_summary(storage, StageReport("train", "m", "pairs", 1, 1, {}, 1, 1, 0.0, MODEL))
    assert [one.state for one in settle(storage)] == ["restored"]
    if kind == "a folder":
        assert (storage.local(f"damaged/{note.number:06d}/summary.json") / "mine").read_text() == "kept"


def test_a_folder_is_not_written_over(storage: Storage) -> None:
    storage.local("columns/x.json").mkdir()
    with pytest.raises(DamagedError, match="what lies there is no file"):
        storage.write("columns/x.json", b"1")


def test_a_file_in_the_place_of_a_folder_is_set_aside(storage: Storage) -> None:
    storage.write("scores", b"not a folder")
    with pytest.raises(DamagedError, match="a file lies in the place of a folder") as error:
        storage.write("scores/s@0/summary.json", b"1")
    set_aside(storage, [as_finding(error.value)])
    storage.write("scores/s@0/summary.json", b"1")
    assert settle(storage)
    assert not left(storage)


def test_no_library_sees_a_file_that_was_added_to_a_model(storage: Storage) -> None:
    added = f"{MODEL}/chat_template.jinja"
    storage.write(added, b"{{ messages[0].content }}")
    with pytest.raises(DamagedError, match="its seal does not name it") as error:
        fetch_folder(storage, MODEL)
    (found,) = verify(storage).findings
    assert (found.problem, found.path, found.is_harmless) == ("added", added, False)
    set_aside(storage, [as_finding(error.value)])
    assert storage.exists(f"{MODEL}/summary.json"), "nothing of the model itself is made again"
    assert verify(storage).is_clean
    assert (fetch_folder(storage, MODEL) / "config.json").exists()
    assert [note.is_settled for note in notes(storage)] == [True]


def test_what_was_set_aside_before_is_not_written_over(storage: Storage) -> None:
    path = f"{MODEL}/model.safetensors"
    set_aside(storage, [Finding("altered", path)])
    storage.write("damaged/000001/note.json", b"{}")
    set_aside(storage, [Finding("altered", f"{MODEL}/config.json")])
    assert storage.read("damaged/000001/model.safetensors") == b"weights"
    assert [(note.number, note.path) for note in notes(storage)] == [(2, f"{MODEL}/config.json")]


def test_repair_does_not_call_clean_what_it_could_not_make(storage: Storage) -> None:
    set_aside(storage, [Finding("altered", Artifact(storage, COLUMNS).file("s"))])
    storage.delete(f"{COLUMNS}/_ledger/s.json")
    assert verify(storage).is_clean, "nothing names it any more"
    result = mend(storage, Progress(quiet=True))
    assert [finding.path for finding in result.findings] == [Artifact(storage, COLUMNS).file("s")]
    assert "damaged/000001 says so until you remove it" in str(result.findings[0])
    storage.delete_tree("damaged/000001")
    assert mend(storage, Progress(quiet=True)).is_clean


def test_a_shard_that_is_gone_is_compared_when_it_is_made_again(storage: Storage) -> None:
    artifact = Artifact(storage, COLUMNS)
    storage.delete(artifact.file("s"))
    with pytest.raises(DamagedError, match="missing") as error:
        artifact.done({"s": "in"})
    assert artifact.done({"s": "another"}) == {}
    set_aside(storage, [as_finding(error.value)])
    assert artifact.done({"s": "in"}) == {}, "it is to be made"
    artifact.commit("s", pa.table({"v": [2.0]}), made_from="in", attempt="2")
    assert [(note.path, note.state) for note in settle(storage)] == [(artifact.file("s"), "other")]


def test_a_piece_of_a_ledger_and_its_copy_are_there_again_with_their_shards(storage: Storage) -> None:
    artifact = Artifact(storage, COLUMNS)
    artifact.compact(at_least=1)
    for path in (f"{COLUMNS}/_ledger/all-s.json", f"{COLUMNS}/_ledger/copy/all-s.json"):
        storage.write(path, b"")
    set_aside(storage, [finding for finding in verify(storage).findings if not finding.is_harmless])
    assert len(left(storage)) == 2
    assert artifact.done({"s": "in"}) == {}
    artifact.commit("s", pa.table({"v": [1.0]}), made_from="in", attempt="2")
    assert [note.state for note in settle(storage)] == ["restored", "restored"]


def test_the_status_goes_on_where_the_lease_is_none(storage: Storage) -> None:
    storage.write("lease.json", b"{}")
    assert "lease.json: not a lease" in (status(storage).writer or "")
