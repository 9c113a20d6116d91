"""Folders of a workspace on an object store: what is fetched of them, and what is not."""

from __future__ import annotations

import tempfile

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from prefsel.errors import IntegrityError
from prefsel.workspace.folders import commit_folder, fetch_folder
from prefsel.workspace.storage import Storage


def test_only_the_files_that_are_needed_are_fetched(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path_factory.mktemp("made")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("fetched")))
    files = {"config.json": "{}", "model.safetensors": "weights", "inner/more.json": "[]"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        pafs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
        storage = Storage(f"s3://key:secret@bucket/w?{options}")
        commit_folder(storage, {"": tmp_path}, "models/m", info={})
        folder = fetch_folder(storage, "models/m", ("*.json",))
        assert sorted(file.name for file in folder.rglob("*") if file.is_file()) == ["config.json", "more.json"]
        storage.write("models/m/model.safetensors", b"others")
        fetch_folder(storage, "models/m", ("*.json",))
        with pytest.raises(IntegrityError, match=r"model\.safetensors: altered"):
            fetch_folder(storage, "models/m")
        storage.write("models/m/model.safetensors", b"weights")
        assert fetch_folder(storage, "models/m") == folder  # into the same place
        assert {name: (folder / name).read_text() for name in files} == files
    finally:
        server.stop()
