"""What holds whatever is trained: the textbook's trajectory, however a step is computed; faults; the export; no Ray."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from naive_loop import naive_training
from tiny_runs import COMMON, Case, assert_same_history, fresh_environment, losses, steps, weights
from transformers import AutoTokenizer

from prefsel.errors import IntegrityError, NonFiniteError
from prefsel.models.chat import Encoder
from prefsel.train.data import TrainingPairs
from prefsel.train.engine import start_worker


def test_trajectory_and_weights_are_those_of_a_textbook_loop(case: Case, plain: dict[str, Any]) -> None:
    model = case.auto_class.from_pretrained(case.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(case.model_dir)
    start_worker()
    corpus = case.objective().prepare(TrainingPairs.from_table(case.table), None, Encoder(tokenizer))
    epochs = [corpus.draws.of_epoch(epoch) for epoch in (0, 1)]
    batches = [epoch[start : start + 8] for epoch in epochs for start in range(0, len(epoch), 8)]
    naive = naive_training(
        model,
        tokenizer,
        case.table.to_pylist(),
        batches,
        output=case.output,
        loss=case.loss,
        learning_rate=COMMON["learning_rate"],
        num_warmup_steps=2,
    )
    assert losses(plain) == pytest.approx(naive.losses, abs=1e-5)
    # Clipping and Adam forgive a wrongly scaled gradient; its norm before clipping does not.
    assert [record["grad_norm"] for record in steps(plain)] == pytest.approx(naive.norms, rel=1e-4)
    assert np.ptp(naive.losses) > 0.1  # the weights move, so the comparison is about something
    exported = case.auto_class.from_pretrained(plain["model_dir"], dtype=torch.float32)
    for (name, got), want in zip(exported.named_parameters(), naive.model.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_pairs": 1},
        {"micro_batch_pairs": 8, "token_budget": 8192},
        {"gradient_checkpointing": True},
        {"zero_stage": 1},
        {"zero_stage": 2, "micro_batch_pairs": 1},
        {"zero_stage": 3, "micro_batch_pairs": 1},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 3, "offload": "optimizer_and_weights"},
        {"zero_stage": 2, "offload": "optimizer", "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500}}},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(
    case: Case, plain: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    result = case.run(tmp_path, **options)
    assert_same_history(result["history"], plain["history"])
    assert result["flops_forward"] == pytest.approx(plain["flops_forward"], rel=1e-12)
    assert result["flops_train"] == (4 if options.get("gradient_checkpointing") else 3) * result["flops_forward"]


def test_bf16_follows_fp32_and_exports_bf16(case: Case, plain: dict[str, Any], tmp_path: Path) -> None:
    result = case.run(tmp_path, dtype="bf16", zero_stage=2)
    assert losses(result) == pytest.approx(losses(plain), abs=0.05)
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.bfloat16}


def test_what_is_not_finite_names_its_pair(case: Case, tmp_path: Path) -> None:
    poisoned = case.auto_class.from_pretrained(case.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(case.model_dir)
    word = case.table["chosen"][3].as_py()[0]["content"].split()[0]
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = math.nan
    poisoned.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    alone = case.table.slice(3, 1)
    with pytest.raises(NonFiniteError, match=f"output: NaN or infinite for pair_ids {3:032x}; no weight was changed"):
        case.run(tmp_path / "out", table=alone, model_dir=tmp_path / "poisoned", max_steps=1, **case.unchecked)
    assert not (tmp_path / "out" / "model").exists()


def test_an_export_that_does_not_reload_to_the_same_outputs_fails(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefsel.train import export

    def forgets_a_layer(model: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
        found = {name: value.detach().clone() for name, value in model.named_parameters()}
        found["model.layers.1.mlp.down_proj.weight"].zero_()
        return found

    monkeypatch.setattr(export, "gather_weights", forgets_a_layer)
    with pytest.raises(IntegrityError, match="outputs of the reloaded model differ"):
        case.run(tmp_path, max_steps=1)
    assert not (tmp_path / "model").exists()


def test_it_runs_where_ray_cannot_even_be_imported(policy: Case, plain_policy: dict[str, Any], tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["ray"] = None  # importing it raises
import json, pathlib, torch
import pyarrow.parquet as pq
from prefsel.train.data import TrainingPairs
from prefsel.train.loop import train
from prefsel.train.preference import Preference
from prefsel.train.run_config import DpoConfig

torch.set_num_threads(1)
config = DpoConfig.model_validate({policy.objective().config.model_dump()!r})
pairs = TrainingPairs.from_parquet({str(tmp_path / "pairs.parquet")!r})
result = train(Preference(config), pairs, model_dir={str(policy.model_dir)!r}, output_dir={str(tmp_path / "out")!r})
assert not any(name.split(".")[0] == "ray" and module for name, module in sys.modules.items())
pathlib.Path({str(tmp_path / "result.json")!r}).write_text(json.dumps(result))
"""
    pq.write_table(policy.table, tmp_path / "pairs.parquet")
    subprocess.run([sys.executable, "-c", code], check=True, env=fresh_environment())
    result = json.loads((tmp_path / "result.json").read_text())
    assert losses(result) == losses(plain_policy)
