from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prefsel.errors import CheckpointError, IntegrityError, UserError
from prefsel.train.checkpoint import (
    altered_files,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_history,
    save_checkpoint,
)
from prefsel.train.engine import start_worker
from prefsel.workspace.documents import parse_document, to_document

IDENTITY = {"pairs": "5eed", "beta": 0.1}
STATE = {"step": 4, "consumed_pairs": 32, "identity": IDENTITY}
HISTORY = [{"event": "step", "step": 4, "loss": 0.5}]


class RecordingEngine:
    """Writes two files where DeepSpeed would, and remembers whether it was asked to load."""

    module = torch.nn.Linear(1, 1)

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save_checkpoint(self, directory: str, *, tag: str, **options: Any) -> None:
        (Path(directory) / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        (Path(directory) / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"moments")

    def zero_elastic_checkpoint(self) -> bool:
        return False

    def load_checkpoint(self, directory: str, *, tag: str, **options: Any) -> tuple[str, dict]:
        self.loaded.append(directory)
        return directory, {}


@pytest.fixture(autouse=True)
def one_worker() -> None:
    start_worker()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "step-00000004"
    save_checkpoint(RecordingEngine(), directory, state=STATE, history=HISTORY)
    return directory


def test_round_trip_restores_state_history_and_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save_checkpoint(RecordingEngine(), tmp_path / "step-1", state=STATE, history=HISTORY)
    expected = torch.rand(3)
    torch.manual_seed(8)
    engine = RecordingEngine()
    assert load_checkpoint(engine, tmp_path / "step-1", identity=IDENTITY) == STATE
    assert engine.loaded == [str(tmp_path / "step-1")]
    assert read_history(tmp_path / "step-1") == HISTORY
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "name",
    [
        "engine/mp_rank_00_model_states.pt",
        "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rng-rank-0.safetensors",
        "history.jsonl",
        "digest-rank-0.json",
    ],
)
def test_one_flipped_byte_or_a_missing_file_is_found_before_anything_is_unpickled(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    engine = RecordingEngine()
    with pytest.raises(IntegrityError, match=f"nothing was loaded.*{name}"):
        load_checkpoint(engine, saved, identity=IDENTITY)
    (saved / name).unlink()
    with pytest.raises(IntegrityError, match=f"nothing was loaded.*{name}"):
        load_checkpoint(engine, saved, identity=IDENTITY)
    assert engine.loaded == []


def test_what_a_checkpoint_says_of_itself_is_proven(saved: Path) -> None:
    text = (saved / "complete.json").read_text()
    assert '"step": 4' in text
    (saved / "complete.json").write_text(text.replace('"step": 4', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"complete\.json: its digest is not that of its bytes"):
        load_checkpoint(RecordingEngine(), saved, identity=IDENTITY)


def test_a_file_nobody_wrote_is_found(saved: Path) -> None:
    (saved / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"planted")
    assert altered_files(saved) == ["engine/zero_pp_rank_1_mp_rank_00_optim_states.pt"]


def test_a_worker_reads_what_it_loads(saved: Path) -> None:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (saved / "engine" / name).write_bytes(b"altered")
    common, own = "engine/mp_rank_00_model_states.pt", "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert altered_files(saved) == altered_files(saved, rank=0) == [common, own]
    assert altered_files(saved, rank=1) == [common]


def test_a_checkpoint_of_another_run_is_refused_naming_the_difference(saved: Path) -> None:
    with pytest.raises(UserError, match=r"another run \(beta: got 0.2, saved with 0.1\)"):
        load_checkpoint(RecordingEngine(), saved, identity={**IDENTITY, "beta": 0.2})


def test_another_number_of_workers_is_refused(saved: Path) -> None:
    complete = parse_document("complete.json", (saved / "complete.json").read_bytes())
    (saved / "complete.json").write_bytes(to_document("complete.json", {**complete, "world_size": 2}))
    with pytest.raises(UserError, match="got 1 workers; valid: 2"):
        load_checkpoint(RecordingEngine(), saved, identity=IDENTITY)


def test_an_interrupted_checkpoint_is_never_chosen_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(RecordingEngine(), tmp_path / f"step-{step:08d}", state=STATE, history=HISTORY)
    assert dist.get_world_size() == 1
    (tmp_path / "step-00000006" / "complete.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint(RecordingEngine(), tmp_path / "step-00000006", identity=IDENTITY)
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000006"]
    assert latest_checkpoint(tmp_path / "absent") is None
