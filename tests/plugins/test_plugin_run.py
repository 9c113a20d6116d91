"""A metric of an installed package, a format and a loss of a listed module, through the whole job in new processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from packages import FORMAT_AND_LOSS, METRIC, install, write

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PAIRS = 60
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 4, "batch_tokens": 512, "max_length": 64}


def corpus(file: Path) -> np.ndarray:
    """Rows in a format of their own; returns their margins, the better side's points less the other's."""
    points_N2 = np.random.default_rng(0).permutation(2 * NUM_PAIRS).reshape(-1, 2) / 7
    texts = (("a", "words here"), ("b", "other words there"))
    rows = [
        {"question": f"question {n}"}
        | {side: f"{text} {n}" for side, text in texts}
        | {f"{side}_points": float(points) for (side, _), points in zip(texts, points_N2[n])}
        for n in range(NUM_PAIRS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return np.abs(points_N2[:, 0] - points_N2[:, 1])


def configuration() -> dict[str, Any]:
    policy = {"kind": "scratch_policy", "name": "policy", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE}
    training = {"name": "tuned", "selection": "half", "model": "policy", "reference": "policy", "dtype": "fp32"}
    return {
        "name": "plugged",
        "plugins": ["others_module"],
        "sources": [{"name": "s", "paths": ["rows.jsonl"], "format": "points"}],
        "ingest": {"rows_per_shard": 15},
        "split": {"proxy": 0.3},
        "models": [policy],
        "scorers": [{"kind": "imported", "name": "gold"}, {"kind": "causal_logps", "model": "policy"}],
        "metrics": [{"name": "m", "metric": "centred", "params": {"rm": "gold", "factor": 3.0}}],
        "selections": [{"name": "half", "rule": {"kind": "top", "score": "score_m", "ratio": 0.5}}],
        "train": [
            training
            | {"loss": "doubled", "label_smoothing": 0.25, "learning_rate": 1e-3, "global_batch_pairs": 4}
            | {"micro_batch_pairs": 2, "max_steps": 1, "zero_stage": 0}
        ],
        "ray": {"num_cpus": 2, "object_store_gib": 0.2},
    }


class Elsewhere:
    """A folder with the packages, the corpus and the configuration, and a new process for every command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, folder / "w"
        (folder / "site").mkdir()
        self.metric = write(folder / "site", "centred_metric", METRIC)
        install(folder / "site", "centred", {"prefsel.metrics": {"centred": "centred_metric:METRIC"}})
        self.module = write(folder / "site", "others_module", FORMAT_AND_LOSS)
        self.margin_N = corpus(folder / "rows.jsonl")
        (folder / "c.yaml").write_text(yaml.safe_dump(configuration()))

    def __call__(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder / "site"), str(REPOSITORY)])
        code = "import sys; from prefsel.cli import main; sys.argv[0] = 'prefsel'; main()"
        arguments = [sys.executable, "-c", code, command, "c.yaml", "--workspace", "w", *more]
        environment = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": "local"}
        return subprocess.run(arguments, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def folders(self, pattern: str) -> set[str]:
        return {str(one.relative_to(self.workspace)) for one in self.workspace.glob(pattern)}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    made = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    done = made("run")
    assert done.returncode == 0, done.stderr + done.stdout
    return made


def scores(elsewhere: Elsewhere) -> pa.Table:
    (folder,) = elsewhere.workspace.glob("scores/m@*/s")
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet")))


def test_the_metric_scored_and_the_format_read(elsewhere: Elsewhere) -> None:
    table = scores(elsewhere)
    assert table.num_rows == NUM_PAIRS
    known_N = table["score"].to_numpy()
    is_scored_N = np.isfinite(known_N)
    assert 0 < is_scored_N.sum() < NUM_PAIRS  # the rest trained the policy
    # Pairs stand in the order of the file, shards in that of the catalog.
    catalog = json.loads((elsewhere.workspace / "catalog.json").read_text())["sources"]
    (file,) = catalog[0]["files"]
    assert file["format"] == "points"
    margins = dict(zip(order_of_pairs(elsewhere, file["shards"]), elsewhere.margin_N))
    margin_N = np.array([margins[one] for one in table["pair_id"].to_pylist()])
    expected = 3.0 * (margin_N[is_scored_N] - margin_N[is_scored_N].mean())
    assert known_N[is_scored_N] == pytest.approx(expected, abs=1e-12)


def order_of_pairs(elsewhere: Elsewhere, shards: list[str]) -> list[bytes]:
    folder = elsewhere.workspace / "pairs" / "s"
    return [one for shard in shards for one in pq.read_table(folder / f"{shard}.parquet")["pair_id"].to_pylist()]


def test_the_loss_trained(elsewhere: Elsewhere) -> None:
    """Before the first step policy and reference are one: twice the logarithm of two, and the constant."""
    (summary,) = elsewhere.workspace.glob("models/tuned@*/summary.json")
    history = json.loads(summary.read_text())["details"]["history"]
    check = next(record for record in history if record["event"] == "self_check")
    assert check["step0_loss"] == pytest.approx(2 * math.log(2) + 0.25, abs=1e-5)
    assert check["step0_expected"] == pytest.approx(2 * math.log(2) + 0.25, abs=1e-9)
    first = next(record for record in history if record["event"] == "step")
    assert first["loss"] == pytest.approx(check["step0_loss"], abs=1e-5)


def test_changed_code_is_another_recipe(elsewhere: Elsewhere) -> None:
    made = {pattern: elsewhere.folders(pattern) for pattern in ("scores/m@*", "models/*", "pairs/s/*.parquet")}
    again = elsewhere("run")
    assert "nothing to do" in again.stdout, again.stderr
    elsewhere.metric.write_text(elsewhere.metric.read_text().replace("- fitted", "- 2.0 * fitted"))
    done = elsewhere("select")
    assert done.returncode == 0, done.stderr
    assert len(elsewhere.folders("scores/m@*")) == 2  # the metric's own scores alone are made again
    assert elsewhere.folders("pairs/s/*.parquet") == made["pairs/s/*.parquet"]
    assert elsewhere.folders("models/*") == made["models/*"]
    elsewhere.module.write_text(elsewhere.module.read_text() + "\n# read otherwise\n")
    assert elsewhere("ingest").returncode == 0
    assert len(elsewhere.folders("pairs/s/*.parquet")) == 2 * len(made["pairs/s/*.parquet"])


def test_typos_are_answered_before_anything_starts(elsewhere: Elsewhere) -> None:
    wrong = configuration()
    wrong["metrics"][0]["params"]["facter"] = 1.0
    (elsewhere.folder / "c.yaml").write_text(yaml.safe_dump(wrong))
    try:
        refused = elsewhere("run")
    finally:
        (elsewhere.folder / "c.yaml").write_text(yaml.safe_dump(configuration()))
    assert refused.returncode == 2
    assert "metrics.m: metric centred: facter: unknown key; did you mean 'factor'?" in refused.stderr
