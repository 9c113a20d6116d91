"""An object store in trouble, one operation at a time: what passes is waited for, the rest is one message."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from s3_proxy import TRANSIENT, FaultyStore, Request, faulty_store, seeded

from prefsel.errors import DamagedError, StoreError, UserError, known_error
from prefsel.workspace import patience, stores
from prefsel.workspace.catalog import required_entries
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.folders import fetch_folder, seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

SECRET = "topsecret"


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyStore]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with faulty_store() as store:
        yield store


@pytest.fixture
def storage(proxy: FaultyStore, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """A workspace of its own; the store is sound before and after."""
    proxy.heal()
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    options = f"scheme=http&endpoint_override={proxy.endpoint}&region=us-east-1"
    yield Storage(f"s3://key:{SECRET}@bucket/{name}?{options}")
    proxy.heal()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits a hundredth of those of a run."""
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.05)


def each_operation(storage: Storage) -> None:
    """Every operation once, each with what it must give."""
    storage.write("a/one", b"1" * 70_000)
    storage.write("a/two", b"2")
    assert storage.read("a/one") == b"1" * 70_000
    assert storage.size("a/two") == 1
    assert storage.exists("a/one")
    assert not storage.exists("a/none")
    assert storage.files("a") == ["a/one", "a/two"]
    assert storage.folders("") == ["a"]
    assert storage.sizes("a") == {"a/one": 70_000, "a/two": 1}
    storage.move("a/one", "b/one")
    assert storage.read("b/one") == b"1" * 70_000
    storage.delete("a/two")
    storage.delete("a/two")
    storage.delete_tree("b")
    assert storage.files("", recursive=True) == []


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [one for one in TRANSIENT if one != "wrong_length"])
def test_every_operation_outlasts_what_passes(proxy: FaultyStore, storage: Storage, fault: str) -> None:
    """Each request fails once; `request_timeout` is what a store says of uploads."""
    met = set()

    def rule(request: Request) -> str | None:
        if fault == "request_timeout" and request.method not in ("PUT", "POST"):
            return None
        key = (request.method, request.key, str(request.query))
        is_first = key not in met
        met.add(key)
        return fault if is_first else None

    proxy.rule = rule
    each_operation(storage)
    assert proxy.faults[fault] >= 3


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(5))
def test_every_operation_outlasts_a_mix(proxy: FaultyStore, storage: Storage, seed: int) -> None:
    proxy.rule = seeded(seed, 0.2, [one for one in TRANSIENT if one != "wrong_length"])
    each_operation(storage)
    assert sum(proxy.faults.values()) > 0


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("slow_down", "passing", "failed 10 times in"),
        ("throttled", "passing", "HTTP status 429"),
        ("forbidden", "denied", "the credentials do not allow it"),
        ("no_bucket", "absent", "there is no such bucket"),
    ],
)
def test_what_does_not_pass_is_one_message(
    proxy: FaultyStore, storage: Storage, fault: str, kind: str, told: str
) -> None:
    proxy.rule = lambda request: fault
    with pytest.raises(StoreError, match=told) as caught:
        storage.write("a/one", b"1")
    message = str(caught.value)
    assert message.startswith(f"writing s3://{storage.full('a/one')}: ")
    assert message.endswith("what is committed is kept, so run again once that is mended")
    assert SECRET not in message
    assert "\n" not in message
    assert caught.value.kind == kind
    assert proxy.requests["PUT"] == (10 if kind == "passing" else 1)
    found = pickle.loads(pickle.dumps(caught.value))  # as Ray carries it
    assert (str(found), found.kind, found.exit_code) == (message, kind, 1)
    assert known_error(found) is found


@pytest.mark.usefixtures("hasty")
def test_a_workspace_that_is_denied_is_a_mistake_and_one_that_fails_is_not(
    proxy: FaultyStore, storage: Storage
) -> None:
    proxy.rule = lambda request: "forbidden"
    with pytest.raises(UserError, match=r"^workspace: looking for s3://bucket/.*the credentials do not allow it"):
        storage.require_folder()
    proxy.rule = lambda request: "unavailable"
    with pytest.raises(StoreError, match="failed 10 times"):
        storage.require_folder()


@pytest.mark.usefixtures("hasty")
def test_a_request_that_hangs_is_given_up(
    proxy: FaultyStore, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SILENCE_S", 1.0)
    monkeypatch.setattr(patience, "GIVE_UP_S", 2.0)
    storage.write("a/one", b"1")
    stores.open_store.cache_clear()
    hasty = Storage(storage.uri)
    proxy.rule = lambda request: "hang" if request.nth == 0 else None
    assert hasty.read("a/one") == b"1"
    proxy.rule = lambda request: "hang"
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"reading .* failed . times in"):
        hasty.read("a/one")
    assert time.monotonic() - begun < 10
    stores.open_store.cache_clear()


def shards(storage: Storage, count: int = 3) -> Artifact:
    artifact = Artifact(storage, "scores/a/first")
    for number in range(count):
        table = pa.table({"score": pa.array([float(n) for n in range(9_000)])})
        artifact.commit(f"s{number}", table, made_from="i", attempt=artifact.log_attempt(f"s{number}"))
    return artifact


@pytest.mark.usefixtures("hasty")
def test_a_cut_answer_of_the_stated_length_is_not_damage(proxy: FaultyStore, storage: Storage) -> None:
    """Arrow fills the end of such a file with whatever lies in memory."""
    artifact, files = shards(storage), {"a.bin": bytes(range(256)) * 400}
    write_document(storage, "catalog.json", {"sources": []})
    seal_files(storage, "models/m", files, {})
    proxy.rule = lambda request: "wrong_length" if request.nth % 3 == 0 else None
    assert artifact.read("s1").num_rows == 9_000
    assert find_document(storage, "catalog.json") == {"sources": []}
    assert (fetch_folder(storage, "models/m") / "a.bin").read_bytes() == files["a.bin"]
    assert proxy.faults["wrong_length"] >= 3


@pytest.mark.usefixtures("hasty")
def test_real_damage_is_still_found(proxy: FaultyStore, storage: Storage) -> None:
    artifact = shards(storage)
    data = storage.read(artifact.file("s1"))
    storage.write(artifact.file("s1"), data[:100] + bytes([data[100] ^ 1]) + data[101:])
    storage.delete(artifact.file("s2"))
    for shard, problem in (("s1", "altered"), ("s2", "missing")):
        with pytest.raises(DamagedError) as caught:
            artifact.read(shard)
        assert caught.value.problem == problem
    problems = {one.path: one.problem for one in verify(storage).findings if one.path.endswith(".parquet")}
    assert problems == {artifact.file("s1"): "altered", artifact.file("s2"): "missing"}


@pytest.mark.usefixtures("hasty")
def test_a_listing_that_is_behind_hides_nothing(proxy: FaultyStore, storage: Storage) -> None:
    inputs = {f"s{number}": "i" for number in range(3)}
    proxy.list_lag = 600.0
    artifact = shards(storage)
    seal_files(storage, "models/m", {"a.bin": b"1"}, {})
    assert storage.files("", recursive=True) == []
    assert set(artifact.done(inputs | {"s9": "i"})) == set(inputs)
    assert set(required_entries(storage, artifact.path, list(inputs))) == set(inputs)
    assert artifact.read("s2").num_rows == 9_000
    assert artifact.is_done("s0", "i")
    assert (fetch_folder(storage, "models/m") / "a.bin").read_bytes() == b"1"
    assert verify(storage).is_clean


@pytest.mark.usefixtures("hasty")
def test_folding_waits_for_a_listing_that_is_behind(proxy: FaultyStore, storage: Storage) -> None:
    artifact = shards(storage, 4)
    artifact.compact(at_least=1)
    proxy.list_lag = 600.0
    artifact.compact(at_least=1)
    proxy.list_lag = 0.0
    assert set(artifact.entries()) == {f"s{number}" for number in range(4)}


@pytest.mark.usefixtures("hasty")
def test_arrow_copies_folders_to_and_from_it(proxy: FaultyStore, storage: Storage, tmp_path: Path) -> None:
    """As Ray Train does with checkpoints; the large file is sent in parts."""
    import pyarrow.fs as pafs

    source, back = tmp_path / "source", tmp_path / "back"
    source.mkdir()
    files = {"large.bin": bytes(range(256)) * 50_000, "small.json": b"{}", "empty": b""}
    for name, data in files.items():
        (source / name).write_bytes(data)
    filesystem = pickle.loads(pickle.dumps(storage.filesystem))
    proxy.rule = seeded(1, 0.2, ["slow_down", "reset", "internal"])
    pafs.copy_files(str(source), storage.full("c"), destination_filesystem=filesystem)
    back.mkdir()
    pafs.copy_files(storage.full("c"), str(back), source_filesystem=filesystem)
    assert {file.name: file.read_bytes() for file in back.iterdir()} == files
    assert sum(proxy.faults.values()) > 0
