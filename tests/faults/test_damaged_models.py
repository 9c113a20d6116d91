"""Models, tangents, margins and reports, damaged: nobody uses them, and they are made again with the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefsel.config.file import parse_config
from prefsel.mend import mend
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

QUIET = Progress(quiet=True)
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 8, "batch_tokens": 512, "max_length": 64}


def table(file: Path) -> dict[str, Any]:
    tokenizer = {"kind": "bpe", "vocab_size": 300}
    return {
        "name": "models",
        "sources": [{"name": "a", "paths": [str(file)]}],
        "ingest": {"rows_per_shard": 40},
        "split": {"holdout": 0.15, "proxy": 0.2, "validation": 0.15},
        "models": [{"kind": "scratch_policy", "name": "policy", "tokenizer": tokenizer, **SHAPE}],
        "tangents": [{"name": "aim", "model": "policy", "reference": "policy"}],
        "scorers": [
            {"kind": "causal_logps", "model": "policy"},
            {"kind": "directional_logps", "tangent": "aim"},
        ],
        "metrics": [{"name": "margin", "metric": "implicit_margin", "params": {"policy": "policy"}}],
        "selections": [{"name": "half", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
        "train": [
            {
                **{"name": "dpo", "selection": "half", "model": "policy", "reference": "policy"},
                **{"learning_rate": 1e-3, "dtype": "fp32", "zero_stage": 0, "max_steps": 2, "global_batch_pairs": 6},
            }
        ],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, Any]:
    home = tmp_path_factory.mktemp("models")
    rows = [{"prompt": f"name {n}", "chosen": f"a red word {n}", "rejected": "blue"} for n in range(120)]
    (home / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(table(home / "a.jsonl"))
    run(config, str(home / "w"), QUIET)
    return home / "w", config


def data_of(folder: Path) -> dict[str, str]:
    found = [*folder.rglob("*.parquet"), *folder.glob("models/*/*"), *folder.glob("tangents/*/*")]
    kept = [file for file in found if file.is_file() and "damaged" not in file.parts and file.name != "summary.json"]
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in kept}


KINDS = {
    "weights": "models/policy@*/model.safetensors",
    "configuration": "models/policy@*/config.json",
    "trained weights": "models/dpo@*/model.safetensors",
    "tangent": "tangents/aim@*/*.safetensors",
    "margins": "evaluations/dpo@*/margins.parquet",
    "seal of margins": "evaluations/dpo@*/_ledger/files.json",
    "seal of a model": "models/dpo@*/_ledger/files.json",
    "summary of a model": "models/policy@*/summary.json",
    "report": "reports/*/report.json",
}


@pytest.mark.parametrize("damage", ["flip", "delete"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_made_again(whole: tuple[Path, Any], kind: str, damage: str, tmp_path: Path) -> None:
    folder, config = whole
    shutil.copytree(folder, tmp_path / "w")
    file = sorted((tmp_path / "w").glob(KINDS[kind]))[0]
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    storage = Storage(str(tmp_path / "w"))
    assert not verify(storage).is_clean
    if damage == "delete":
        run(config, str(tmp_path / "w"), QUIET)  # looks at existence alone
        assert verify(storage).is_clean
    else:
        assert mend(storage, QUIET).is_clean
    assert data_of(tmp_path / "w") == data_of(folder)


def test_a_training_begins_anew_where_its_checkpoints_cannot_be_read(whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder, config = whole
    shutil.copytree(folder, tmp_path / "w")
    (model,) = (tmp_path / "w").glob("models/dpo@*")
    shutil.rmtree(model)
    (model / "training").mkdir(parents=True)
    (model / "training/checkpoint_manager_snapshot.json").write_text("")  # as a kill leaves it
    run(config, str(tmp_path / "w"), QUIET)
    assert data_of(tmp_path / "w") == data_of(folder)
