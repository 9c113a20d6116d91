"""Killed and continued is a clean run, byte for byte, whatever is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Case, assert_same_weights, steps

from prefsel.errors import UserError
from prefsel.train.checkpoint import latest_checkpoint


class Killed(Exception):
    """Stands for a worker that dies."""


@pytest.mark.parametrize("stage", [0, 3])
def test_kill_and_resume_is_a_clean_run(case: Case, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage, "checkpoint_every_steps": 2, "eval_every_steps": 3}
    clean = case.run(tmp_path / "clean", **options)

    def dies_in_step_5(record: dict[str, Any], checkpoint_dir: Path | None) -> None:
        if record["event"] == "step" and record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        case.run(tmp_path / "killed", report=dies_in_step_5, **options)
    checkpoint = latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000004"
    reported: list[dict[str, Any]] = []
    resumed = case.run(
        tmp_path / "killed",
        resume_dir=checkpoint,
        report=lambda record, checkpoint_dir: reported.append(record),
        **options,
    )
    evaluated = {6, clean["num_steps"]}
    expected = [(event, step) for step in range(5, clean["num_steps"] + 1) for event in ("step", "eval")]
    assert [(record["event"], record["step"]) for record in reported] == [
        (event, step) for event, step in expected if event == "step" or step in evaluated
    ]
    assert len(steps(resumed)) == clean["num_steps"]
    assert {key: value for key, value in resumed.items() if key != "model_dir"} == {
        key: value for key, value in clean.items() if key != "model_dir"
    }
    assert (tmp_path / "killed" / "history.jsonl").read_text() == (tmp_path / "clean" / "history.jsonl").read_text()
    assert_same_weights(resumed, clean)


def test_resuming_with_other_options_or_data_is_refused(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path, checkpoint_every_steps=2, max_steps=2)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"learning_rate: got 0\.1, saved with 0\.003"):
        case.run(tmp_path, resume_dir=checkpoint, max_steps=2, learning_rate=0.1)
    with pytest.raises(UserError, match="pairs: got"):
        case.run(tmp_path, resume_dir=checkpoint, max_steps=2, table=case.table.slice(1))
