from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefsel.train.heldout import margins_folder, read_margins, save_margins, split_margins
from prefsel.workspace.folders import seal_files
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

PROMPTS = {"a" * 32: "1" * 32, "b" * 32: "1" * 32, "c" * 32: "2" * 32}


def history() -> list[dict[str, Any]]:
    return [
        {"event": "self_check", "step": 0},
        {"event": "eval", "step": 0, "accuracy": 0.5, "margins": [0.0, -0.0, 1e-9]},
        {"event": "step", "step": 1, "loss": 0.7},
        {"event": "eval", "step": 1, "accuracy": 0.6},
        {"event": "step", "step": 2, "loss": 0.6},
        {"event": "eval", "step": 2, "accuracy": 1.0, "margins": [0.25, 1.5, 2.0]},
    ]


def test_margins_become_a_table_and_leave_the_history() -> None:
    before = history()
    kept, table = split_margins(before, list(PROMPTS), PROMPTS)
    assert before == history()
    assert kept == [{key: value for key, value in one.items() if key != "margins"} for one in history()]
    assert table is not None
    assert table.to_pylist() == [
        {"pair_id": "a" * 32, "prompt_id": "1" * 32, "before": 0.0, "after": 0.25},
        {"pair_id": "b" * 32, "prompt_id": "1" * 32, "before": 0.0, "after": 1.5},
        {"pair_id": "c" * 32, "prompt_id": "2" * 32, "before": 1e-9, "after": 2.0},
    ]


@pytest.mark.parametrize("lost", [[1], [5], [1, 5], [1, 3, 5]])
def test_a_half_known_evaluation_is_none(lost: list[int]) -> None:
    """A run that continues an older version's checkpoint knows the margins after it, not those before."""
    records = [{key: value for key, value in one.items() if key != "margins" or place not in lost}
               for place, one in enumerate(history())]  # fmt: skip
    kept, table = split_margins(records, list(PROMPTS), PROMPTS)
    assert table is None
    assert not any("margins" in one for one in kept)


def test_without_held_out_pairs_there_is_no_table() -> None:
    assert split_margins([{"event": "step", "step": 1}], [], {}) == ([{"event": "step", "step": 1}], None)


def test_they_lie_beside_the_model_and_verify_reads_them(tmp_path: Path) -> None:
    storage, model = Storage(str(tmp_path)), "models/dpo@0123"
    seal_files(storage, model, {"weights": b"1"}, {})
    assert read_margins(storage, model) is None
    _, table = split_margins(history(), list(PROMPTS), PROMPTS)
    assert table is not None
    save_margins(storage, model, table)
    assert margins_folder(model) == "evaluations/dpo@0123"
    assert read_margins(storage, model) == table
    assert verify(storage).is_clean
    file = tmp_path / margins_folder(model) / "margins.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    assert [str(one).split()[:2] for one in verify(storage).findings] == [
        ["altered", "evaluations/dpo@0123/margins.parquet"]
    ]
