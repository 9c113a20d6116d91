"""Plans of samples of three public data sets against what whole runs on them count."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefsel.cli import app, guarded
from prefsel.plan.counted import counted_work
from prefsel.workspace.documents import read_document
from prefsel.workspace.storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import bpe_tokenizer, tiny_causal, tiny_reward

pytestmark = [pytest.mark.slow, pytest.mark.samples]
SAMPLES = ("hh_rlhf_harmless_1156.jsonl.gz", "qa_feedback_250x4.jsonl.gz", "ultrafeedback_binarized_1k.jsonl.gz")


def configured(file: Path, folder: Path) -> dict[str, Any]:
    tokenizer = bpe_tokenizer()
    for name, model in (("policy", tiny_causal), ("rm", tiny_reward)):
        model(max_position_embeddings=4096).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shape = {"dtype": "fp32", "max_length": 4096}
    return {
        "name": "t",
        "sources": [{"name": "real", "paths": [str(file)]}],
        "ingest": {"rows_per_shard": 256},
        "models": [{"name": name, "path": str(folder / name), **shape} for name in ("policy", "rm")],
        "scorers": [{"kind": "causal_logps", "model": "policy"}, {"kind": "reward_model", "model": "rm"}],
        "metrics": [{"name": "ap", "metric": "alignment_potential", "params": {"rm": "rm", "policy": "policy"}}],
        "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_ap", "ratio": 0.3}}],
        "ray": {"num_cpus": 2},
    }


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("sample", SAMPLES)
def test_planned_is_counted(sample: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configured(shared / "data/real" / sample, tmp_path)))
    file, workspace = str(tmp_path / "c.yaml"), str(tmp_path / "w")

    def planned(size: str) -> dict[str, Any]:
        assert guarded(app, ["plan", file, "--workspace", workspace, "--sample", size, "--json"]) == 0
        return {one["node"]: one for one in json.loads(capsys.readouterr().out)["work"]}

    some, everything = planned("200"), planned("all")
    assert guarded(app, ["run", file, "--workspace", workspace]) == 0
    capsys.readouterr()
    storage = Storage(workspace)
    (manifest,) = storage.files("runs")
    stages = read_document(storage, manifest)["stages"]
    for name in ("policy", "rm"):
        (stage,) = (one for one in stages if (one["stage"], one["name"]) == ("score", name))
        counted = counted_work(stage)
        assert counted is not None
        for key in ("flops", "tokens", "items"):
            exact, told = everything[f"columns {name}"][key], some[f"columns {name}"][key]
            assert exact["low"] == exact["high"]
            assert exact["value"] == pytest.approx(counted[key], rel=1e-12)
            half = (told["high"] - told["low"]) / 2
            assert abs(told["value"] - counted[key]) <= 2 * half  # one draw: twice the interval, not by chance outside
    report = storage.read(f"{read_document(storage, manifest)['report']}/index.html").decode()
    assert "Planned and counted" in report
    assert planned("all")["columns policy"]["left"] == 0
