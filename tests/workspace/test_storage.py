"""What writes leave behind when they fail."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefsel.workspace.storage import Storage
from prefsel.workspace.swap import swap


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow above 100 bytes, as on a disk that is full."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    answered = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, kept[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    signal.signal(signal.SIGXFSZ, answered)


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("deep/one", b"before")
    with pytest.raises(OSError, match="File too large") as caught:
        storage.write("deep/one", b"x" * 1000)
    assert caught.value.filename == str(tmp_path / "deep/one")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["one"]
    version = swap(storage, "pointer", b"before", None)
    with pytest.raises(OSError, match="File too large"):
        swap(storage, "pointer", b"x" * 1000, version)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock-pointer", "deep", "pointer"]
    assert (storage.read("deep/one"), storage.read("pointer")) == (b"before", b"before")
