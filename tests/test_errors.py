"""Any error reaches the terminal as one message with its exit code, wherever it was raised and whatever wrapped it."""

from __future__ import annotations

import errno
import gc
import json
import pickle
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from prefsel.cli import app, guarded
from prefsel.errors import (
    DamagedError,
    IntegrityError,
    NonFiniteError,
    PrefselError,
    TemplateError,
    UserError,
    invalid,
    known_error,
)
from prefsel.plugins import registry
from prefsel.progress import Progress
from prefsel.stages.shuffle import hash_shuffle
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.storage import Storage

sys.path.insert(0, str(Path(__file__).parent / "models"))

ROWS = [{"q": f"q{n}", "a": f"good {n}", "b": f"bad {n}"} for n in range(4)]
BASE: dict[str, Any] = {
    "name": "t",
    "sources": [{"name": "s", "paths": ["rows.jsonl"], "map": {"prompt": "q", "chosen": "a", "rejected": "b"}}],
    "ray": {"num_cpus": 2, "object_store_gib": 0.25},
}


@pytest.mark.parametrize("kind", [PrefselError, UserError, NonFiniteError, IntegrityError, TemplateError])
def test_what_is_added_to_the_arguments_on_the_way_is_no_part_of_the_message(kind: type[PrefselError]) -> None:
    """As `ray.data` does with what an actor raised: it appends a text about retries to the first argument."""
    error = kind("the sentence")
    error.args = (f"{error.args[0]}\nTo change retry attempts, configure DataContext",)
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), arrived.exit_code) == (kind, "the sentence", kind.exit_code)


def test_an_invalid_value_travels() -> None:
    error = invalid("dtype", "int3", ["fp32", "bf16"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "dtype: got 'int3'; valid: fp32, bf16"


# ------------------------------------------------------------------------------------------------------- known errors


def of_a_task(cause: Exception) -> Exception:
    """As `ray.get` raises it: an instance of Ray's class and of the cause's."""
    wrapped: Exception = RayTaskError("f", "Traceback (most recent call last): …", cause).as_instanceof_cause()
    return wrapped


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_known_error_is_found_in_whatever_carries_it() -> None:
    known = UserError("the sentence")
    lost = ConnectionError("a worker's neighbour is gone")
    for wrapped in (
        known,
        of_a_task(known),
        of_a_task(raised_from(KeyError("x"), known)),
        raised_from(RuntimeError("a stage"), of_a_task(known)),
        WorkerGroupError("two workers", {0: lost, 1: known}),
        ControllerError(of_a_task(known)),
    ):
        assert known_error(wrapped) is known
    # What a known error was made from is its own business.
    assert known_error(raised_from(known, OSError(errno.ENOSPC, "full", "/disk"))) is known


def test_what_the_system_refused_is_one_message_unless_it_is_somebody_elses_reason() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/w/pairs/s/0.parquet")
    for wrapped in (full, of_a_task(full), WorkerGroupError("one worker", {0: full})):
        found = known_error(wrapped)
        assert type(found) is PrefselError
        assert found.exit_code == 1
        assert str(found).startswith("/w/pairs/s/0.parquet: No space left on device; ")
    assert known_error(raised_from(RuntimeError("a fault"), full)) is None
    assert known_error(of_a_task(KeyError("a fault"))) is None


# ------------------------------------------------------------------------------------------------------ on a real Ray


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with four rows; what a test registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_LOADED", {})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    kept = {kind: dict(known) for kind, known in registry._REGISTERED.items()}
    yield tmp_path
    sys.modules.pop("failing_plugins", None)
    for kind, known in kept.items():
        registry._REGISTERED[kind].clear()
        registry._REGISTERED[kind].update(known)


_LATE = re.compile(r"(\x1b\[\d+m)?(\(raylet|\(autoscaler|\[\d{4}-\d\d-\d\d)")
"""Lines of a Ray that other tests used too, and killed actors of: they come when they come."""


def told(here: Path, capfd: pytest.CaptureFixture[str], command: str, config: dict[str, Any], code: int) -> str:
    """The message of a command that must end with `code`: all it wrote to stderr, and nothing of Ray anywhere."""
    (here / "c.yaml").write_text(yaml.safe_dump(BASE | config))
    found = guarded(app, [command, "c.yaml", "--workspace", "w"])
    shown = capfd.readouterr()
    assert found == code, shown.err
    lines = [line for line in shown.err.splitlines() if not _LATE.match(line)]
    for trace in ("Traceback", "ray.exceptions", "To change retry", "ray::"):
        assert trace not in "\n".join([shown.out, *lines])
    place = next(number for number, line in enumerate(lines) if line.startswith("prefsel: "))
    message = "\n".join(lines[place:])
    assert message.count("prefsel: ") == 1
    return message


@pytest.mark.usefixtures("local_ray")
def test_a_head_that_the_weights_lack(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found where the model is loaded, in an actor of Ray Data."""
    from tiny_models import bpe_tokenizer, tiny_causal

    for made in (tiny_causal(), bpe_tokenizer()):
        made.save_pretrained(here / "model")
    config = {
        "models": [{"name": "m", "path": "./model", "dtype": "fp32"}],
        "scorers": [{"kind": "reward_model", "model": "m"}],
    }
    message = told(here, capfd, "score", config, code=2)
    assert message.count("its weights lack 1 tensors of LlamaForSequenceClassification: ['score.weight']") == 1


@pytest.mark.usefixtures("local_ray")
def test_a_format_of_somebody_else(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (here / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"question": "spelled otherwise"}) + "\n")
    source = {"name": "s", "paths": ["rows.jsonl"], "format": "careless"}
    message = told(here, capfd, "ingest", {"plugins": ["failing_plugins"], "sources": [source]}, code=1)
    first, *frames = message.splitlines()
    assert first.startswith("prefsel: format 'careless' (registered by failing_plugins): KeyError: 'a'; ")
    assert first.endswith("rows.jsonl, row 4")  # counted from 0, as in every message
    assert len(frames) <= 2
    assert all("failing_plugins.py, line" in frame for frame in frames)
    assert "row[side]" in frames[-1]


@pytest.mark.parametrize(("name", "typo"), [("careless", "typo"), ("careless_rounds", "typo of a round")])
@pytest.mark.usefixtures("local_ray")
def test_a_metric_of_somebody_else(here: Path, capfd: pytest.CaptureFixture[str], name: str, typo: str) -> None:
    """Its score, and a function that it gives only when it is asked for its rounds."""
    rows = [row | {"score_chosen": 1.0 + n, "score_rejected": 0.0} for n, row in enumerate(ROWS)]
    rows = [{{"q": "prompt", "a": "chosen", "b": "rejected"}.get(k, k): v for k, v in row.items()} for row in rows]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "plugins": ["failing_plugins"],
        "sources": [{"name": "s", "paths": ["rows.jsonl"]}],
        "scorers": [{"kind": "imported", "name": "gold", "field": "score"}],
        "metrics": [{"name": "m", "metric": name, "params": {"rm": "gold"}}],
        "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_m", "ratio": 0.5}}],
    }
    first, *frames = told(here, capfd, "select", config, code=1).splitlines()
    whose = {"careless": "metric 'careless' (registered by failing_plugins)"}.get(name, "plugin 'failing_plugins'")
    assert first == f"prefsel: {whose}: KeyError: '{typo}'"
    assert [frame.split(": ", 1)[1] for frame in frames] == [
        'return columns["typo"]' if name == "careless" else 'return {"mean": columns["typo of a round"]}'
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_scorer_of_somebody_else(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = {"plugins": ["failing_plugins"], "scorers": [{"kind": "careless"}]}
    first, frame = told(here, capfd, "score", config, code=1).splitlines()
    assert first == "prefsel: scorer 'careless' (registered by failing_plugins): IndexError: list index out of range"
    assert frame.endswith("in load: return [job][1]")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("place", ["groups", "groups/s"])
def test_a_file_in_the_place_of_a_folder_is_set_aside(here: Path, place: str) -> None:
    (here / "w" / place).parent.mkdir(parents=True)
    (here / "w" / place).write_text("")
    (here / "c.yaml").write_text(yaml.safe_dump(BASE))
    assert guarded(app, ["ingest", "c.yaml", "-w", "w"]) == 0
    assert list((here / "w" / "groups" / "s").glob("*.parquet"))
    assert list((here / "w" / "damaged").rglob("note.json"))


class Refusing:
    """A pass whose every part of one kind fails."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _at(self, where: str) -> None:
        if where == self.where:
            raise UserError(f"refused to {where}")

    def send(self, shard: ShardRef, num_partitions: int) -> list[Any]:
        self._at("send")
        return [[] for _ in range(num_partitions)]

    def merge(self, sent: Any) -> Any:
        return list(sent)

    def settle(self, rows: Any) -> Any:
        raise UserError("refused to settle")

    def commit(self, shard: ShardRef, drops: Sequence[Any]) -> dict[str, int]:
        return {}


@pytest.mark.parametrize("where", ["send", "settle"])
@pytest.mark.usefixtures("local_ray")
def test_a_shuffle_reads_every_error_of_its_parts(capfd: pytest.CaptureFixture[str], where: str) -> None:
    """Ray prints what nobody has read, a while later, with its traceback."""
    shards = [ShardRef("s", f"{number}", "", number) for number in range(3)]
    with pytest.raises(UserError, match=f"^refused to {where}$"):
        hash_shuffle(Refusing(where), shards, Progress(quiet=True), "pass", done={})
    gc.collect()
    time.sleep(1.5)
    shown = capfd.readouterr()
    assert "refused" not in shown.out + shown.err


def _begin(number: int, folder: str) -> None:
    if number == 0:
        raise UserError("the first")
    (Path(folder) / f"{number}").touch()
    time.sleep(0.3)


class Beginning(Refusing):
    """A pass whose first shard cannot be sent; every other one leaves a file where it begins."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[Any]:
        _begin(shard.number, self.where)
        return [[] for _ in range(num_partitions)]


@pytest.mark.parametrize("pass_", ["map", "shuffle"])
@pytest.mark.usefixtures("local_ray")
def test_after_a_failure_nothing_begins_and_nothing_runs_on(tmp_path: Path, pass_: str) -> None:
    """Nothing is cancelled for that: Ray aborts the process when it cancels a task on its way to a worker."""
    shards = [ShardRef("s", f"{number}", "", number) for number in range(8)]
    run = {
        "map": lambda: map_shards(_begin, list(range(8)), shared=str(tmp_path)),
        "shuffle": lambda: hash_shuffle(Beginning(str(tmp_path)), shards, Progress(quiet=True), "pass", done={}),
    }
    with pytest.raises(UserError, match=r"^the first$"):
        run[pass_]()
    begun = len(list(tmp_path.iterdir()))
    assert begun <= 3  # of seven: what the second CPU had, and what was on its way
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == begun


def _write(name: str, storage: Storage) -> None:
    storage.write(f"in/{name}", b"bytes")


@pytest.mark.usefixtures("local_ray")
def test_what_a_task_could_not_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a file")
    with pytest.raises(DamagedError, match=r"^in: altered .a file lies in the place of a folder.;"):
        map_shards(_write, ["x", "y"], shared=Storage(str(tmp_path)))
