"""The same stages on an object store: a real S3 protocol server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer
from test_stages import config, kept, row, run, write

from prefsel.report.contents import Contents
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A workspace URI on an S3 server of this process; the credentials travel in it, as the workers need them too."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    filesystem, _ = pafs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}&allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    yield f"s3://key:secret@bucket/workspace?{options}"
    server.stop()


def test_an_object_store_gives_what_a_directory_gives(tmp_path: Path, bucket: str) -> None:
    made = config({"a": write(tmp_path / "a.jsonl", [row(n) for n in range(20)])}, ingest={"rows_per_shard": 5})
    local, _ = run(made, tmp_path / "w")
    remote, reports = run(made, bucket)
    assert remote.node("dataset", "top").path == local.node("dataset", "top").path
    folder = fetch_folder(remote.storage, remote.node("dataset", "top").path)
    expected = local.storage.local(local.node("dataset", "top").path)
    for file in ("README.md", "data/train-00000-of-00001.parquet"):
        assert (folder / file).read_bytes() == (expected / file).read_bytes()
    opened = [Contents(one.storage, one.catalog, tuple(reports)) for one in (local, remote)]
    tables = [pa.concat_tables(contents.rows(shard) for shard in contents.shards) for contents in opened]
    assert tables[0].num_rows == 20
    assert tables[0].equals(tables[1])
    result = verify(remote.storage)
    assert result.is_clean
    assert result.shards > 20
    assert [report.computed_shards for report in run(made, bucket)[1]] == [0] * len(reports)
    assert len(kept(local)) == 6


def test_altered_objects_are_found(bucket: str) -> None:
    storage = Storage(bucket)
    path = next(name for name in storage.files("groups", recursive=True) if name.endswith(".parquet"))
    data = storage.read(path)
    storage.write(path, data[:-1] + b"\0")
    assert [str(finding.path) for finding in verify(storage).findings] == [path]
    storage.write(path, data)
    assert verify(storage).is_clean
