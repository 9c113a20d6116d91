"""Compare-and-swap, in a directory and on a real S3 protocol server."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from prefsel.errors import PrefselError, UserError
from prefsel.workspace import swap as swapping
from prefsel.workspace.storage import Storage
from prefsel.workspace.swap import Conflict, read, swap


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    made = pafs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}&allow_bucket_creation=true")[0]
    made.create_dir("bucket")
    yield f"s3://key:secret@bucket/some/where?{options}"
    server.stop()


@pytest.fixture(params=["directory", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = str(tmp_path / "w") if request.param == "directory" else request.getfixturevalue("bucket")
    made = Storage(place)
    made.delete("deep/one.json")
    return made


def test_only_what_was_read_is_replaced(storage: Storage) -> None:
    assert read(storage, "deep/one.json") is None
    first = swap(storage, "deep/one.json", b"1", None)
    assert read(storage, "deep/one.json") == (b"1", first)
    assert storage.read("deep/one.json") == b"1"  # where everything else of the workspace lies
    second = swap(storage, "deep/one.json", b"2", first)
    for stale in (None, first):
        with pytest.raises(Conflict, match=r"one\.json"):
            swap(storage, "deep/one.json", b"3", stale)
    assert read(storage, "deep/one.json") == (b"2", second)
    storage.delete("deep/one.json")
    with pytest.raises(Conflict):
        swap(storage, "deep/one.json", b"3", second)
    assert not storage.exists("deep/one.json")
    if storage.is_local:
        assert [file.name for file in storage.local("deep").iterdir()] == [".lock-one.json"]


def count(uri: str, times: int) -> None:
    """Add one, again and again, beside others who do."""
    storage = Storage(uri)
    for _ in range(times):
        while True:
            data, version = read(storage, "deep/one.json") or (b"0", None)
            with contextlib.suppress(Conflict):
                swap(storage, "deep/one.json", b"%d" % (int(data) + 1), version)
                break


def test_processes_that_count_together_lose_nothing(tmp_path: Path) -> None:
    """Not against the S3 server, whose own check and write are two steps."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(count, [(str(tmp_path), 50)] * 4)
    assert Storage(str(tmp_path)).read("deep/one.json") == b"200"


def test_a_write_whose_answer_was_lost_is_no_conflict(bucket: str) -> None:
    """The request is repeated by the client, and its condition no longer holds, for what it wrote itself."""
    storage = Storage(bucket)
    version = swap(storage, "lost.json", b"1", None)
    after = swap(storage, "lost.json", b"2", version)
    assert swap(storage, "lost.json", b"2", version) == after


def test_a_store_that_does_not_answer_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "RETRY_S", 1)
    storage = Storage("s3://key:secret@bucket/w?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1")
    with pytest.raises(OSError, match=r"^one\.json: .*127\.0\.0\.1:9") as caught:
        read(storage, "one.json")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_lock_that_nobody_gives_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "LOCKED_FOR_S", 0.1)
    with open(tmp_path / ".lock-one.json", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PrefselError, match=r"\.lock-one\.json: another process holds this lock"):
            swap(Storage(str(tmp_path)), "one.json", b"1", None)
    assert swap(Storage(str(tmp_path)), "one.json", b"1", None)


def test_keys_of_a_profile_are_found_as_arrow_finds_them(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "keys").write_text("[work]\naws_access_key_id = a\naws_secret_access_key = b%c\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    storage = Storage(bucket.replace("key:secret@", ""))
    assert swap(storage, "profile.json", b"1", None)
    assert storage.read("profile.json") == b"1"


def test_a_place_without_conditional_writes_is_refused() -> None:
    with pytest.raises(UserError, match=r"gs://.* endpoint_override"):
        read(Storage("gs://anonymous@bucket/w?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1"), "one")
