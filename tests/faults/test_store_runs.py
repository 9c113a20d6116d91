"""Whole runs, ingest to selection, on an object store in trouble: the same bytes as without, and nothing twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from s3_proxy import TRANSIENT, FaultyStore, Request, faulty_store, seeded
from test_stages import config, row, write

from prefsel.errors import PrefselError, StoreError
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]
in_ci = pytest.mark.fault

QUIET = Progress(quiet=True)
NUM_SHARDS = 20


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyStore]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with faulty_store() as store:
        yield store


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run over 20 shards."""
    path = write(tmp_path_factory.mktemp("rows") / "a.jsonl", [row(number) for number in range(3 * NUM_SHARDS)])
    return config({"a": path}, ingest={"rows_per_shard": 3})


def data_of(storage: Storage) -> dict[str, str]:
    """The hash of every data file, by path."""
    files = [name for name in storage.files("", recursive=True) if name.endswith(".parquet")]
    return {name: digest(storage.read(name)) for name in files}


@pytest.fixture(scope="module")
def sound(job: Any, proxy: FaultyStore) -> dict[str, str]:
    """What a run without faults leaves."""
    proxy.heal()
    storage = workspace(proxy, "sound")
    run(job, storage.uri, QUIET, until="select")
    found = data_of(storage)
    assert sum(name.startswith("scores/") for name in found) == NUM_SHARDS
    return found


def workspace(proxy: FaultyStore, name: str) -> Storage:
    options = f"scheme=http&endpoint_override={proxy.endpoint}&region=us-east-1"
    return Storage(f"s3://key:topsecret@bucket/{name}?{options}")


def attempts(storage: Storage) -> dict[str, int]:
    """How often each shard was begun, by path."""
    paths = {name.split("/_ledger/")[0] for name in storage.files("", recursive=True) if "/_ledger/attempts/" in name}
    return {
        f"{path}/{shard}": count
        for path in sorted(paths)
        for shard, count in Artifact(storage, path).attempts().items()
    }


@pytest.mark.parametrize(("seed", "probability"), [pytest.param(1, 0.2, marks=in_ci), (2, 0.1)])
def test_faults_that_pass_change_no_byte(
    job: Any, proxy: FaultyStore, sound: dict[str, str], seed: int, probability: float
) -> None:
    storage = workspace(proxy, f"mix-{seed}")
    proxy.heal()
    proxy.rule = seeded(seed, probability, (*TRANSIENT, "late"))
    proxy.list_lag = 3.0
    run(job, storage.uri, QUIET, until="select")
    assert len(proxy.faults) >= len(TRANSIENT)
    assert sum(proxy.faults.values()) > 100
    assert verify(storage).is_clean
    proxy.heal()
    assert data_of(storage) == sound
    assert set(attempts(storage).values()) == {1}


def refuses(fault: str, begins: str, after: int) -> Callable[[Request], str | None]:
    """A rule by which writing below a folder fails for good once so many objects were written there."""
    written: list[str] = []

    def rule(request: Request) -> str | None:
        if request.method != "PUT" or f"/{begins}" not in request.key:
            return None
        written.append(request.key)
        return fault if len(written) > after else None

    return rule


@pytest.mark.parametrize(
    ("fault", "folder", "told"),
    [
        ("forbidden", "groups/", "the credentials do not allow it"),
        ("no_bucket", "scores/", "there is no such bucket"),
        pytest.param("slow_down", "columns/", "failed 10 times in", marks=in_ci),
    ],
)
def test_a_fault_that_stays_ends_the_run_and_the_next_one_continues(
    job: Any, proxy: FaultyStore, sound: dict[str, str], fault: str, folder: str, told: str
) -> None:
    storage = workspace(proxy, f"stays-{fault}")
    proxy.heal()
    proxy.rule = refuses(fault, folder, after=30)
    with pytest.raises(PrefselError, match=told) as caught:
        run(job, storage.uri, QUIET, until="select")
    assert isinstance(caught.value, StoreError)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("writing s3://bucket/")
    assert "topsecret" not in str(caught.value)
    proxy.heal()
    committed = {
        f"{path}/{shard}"
        for path in ("groups/a", "pairs/a", "quarantine/a", *(f"{one}/a" for one in _artifacts(storage)))
        for shard in Artifact(storage, path).entries()
    }
    assert committed
    before = attempts(storage)
    run(job, storage.uri, QUIET, until="select")
    after = attempts(storage)
    assert {name: after[name] for name in committed & before.keys()} == {
        name: before[name] for name in committed & before.keys()
    }
    assert data_of(storage) == sound
    assert verify(storage).is_clean


def _artifacts(storage: Storage) -> list[str]:
    return [f"{kind}/{name}" for kind in ("columns", "scores", "eligible") for name in storage.folders(kind)]
