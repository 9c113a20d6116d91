"""Adam's moments as they are exported, against those of torch's own AdamW in a textbook loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from naive_loop import NaiveRun, naive_training
from safetensors.torch import load_file
from tiny_policy import TinyRun
from transformers import AutoModelForCausalLM

from prefsel.errors import UserError
from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.data import TrainingPairs, epoch_order
from prefsel.train.deepspeed_config import DpoConfig, lr_factor
from prefsel.train.loop import train_dpo

CONFIG: dict[str, Any] = {
    "policy_is_reference": True,
    "learning_rate": 3e-3,
    "max_length": 128,
    "dtype": "fp32",
    "beta": 0.5,
    "global_batch_pairs": 8,
    "micro_batch_pairs": 3,
    "warmup_ratio": 0.3,
    "keep_optimizer_state": True,
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def run(tiny_run: TinyRun, output_dir: Path, resume_dir: Path | None = None, **options: Any) -> dict[str, Any]:
    """Three steps, the last of 6 pairs."""
    return train_dpo(
        DpoConfig.model_validate({**CONFIG, **options}),
        TrainingPairs.from_table(tiny_run.train),
        None,
        model_dir=tiny_run.model_dir,
        output_dir=output_dir,
        report=lambda record, checkpoint_dir: None,
        resume_dir=resume_dir,
    )


def moments(result: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(Path(result["optimizer_dir"]) / f"{name}.safetensors") for name in MOMENTS}


def dpo(row: dict[str, Any], chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    ratios = chosen - row["reference_logps_chosen"], rejected - row["reference_logps_rejected"]
    return -F.logsigmoid(CONFIG["beta"] * (ratios[0] - ratios[1]))


@pytest.fixture(scope="module")
def naive(tiny_run: TinyRun) -> NaiveRun:
    batches = [epoch_order(22, seed=0, epoch=0)[start : start + 8] for start in (0, 8, 16)]
    return naive_training(tiny_run, tiny_run.train, dpo, batches, learning_rate=3e-3, num_warmup_steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "optimizer_and_weights"},
    ],
    ids=str,
)
def test_moments_are_those_of_torchs_adamw(
    tiny_run: TinyRun, naive: NaiveRun, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = run(tiny_run, tmp_path, **options)
    got = moments(result)
    exported = AutoModelForCausalLM.from_pretrained(result["model_dir"])
    for moment in MOMENTS:
        assert set(got[moment]) == {name for name, _ in exported.named_parameters()}
        for name, parameter in naive.model.named_parameters():
            want = naive.optimizer.state[parameter][moment]
            assert got[moment][name].dtype == torch.float32
            largest = want.abs().max().item()
            assert largest > 0
            torch.testing.assert_close(got[moment][name], want, rtol=0, atol=2e-3 * largest, msg=f"{moment} {name}")
    state = json.loads((Path(result["optimizer_dir"]) / "state.json").read_text())
    last = 3e-3 * lr_factor(2, num_steps=3, num_warmup_steps=1, min_ratio=0.0)
    assert state == {"step": 3, "betas": [0.9, 0.999], "eps": 1e-8, "learning_rate": pytest.approx(last)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_fp32_moments(tiny_run: TinyRun, tmp_path: Path, stage: int) -> None:
    # One step: after it the rounded weights lead elsewhere.
    first = [epoch_order(22, seed=0, epoch=0)[:8]]
    naive = naive_training(tiny_run, tiny_run.train, dpo, first, learning_rate=3e-3, num_warmup_steps=1)
    got = moments(run(tiny_run, tmp_path, dtype="bf16", zero_stage=stage, max_steps=1))
    for moment in MOMENTS:
        flat = torch.cat([got[moment][name].flatten() for name, _ in naive.model.named_parameters()])
        want = torch.cat([naive.optimizer.state[p][moment].flatten() for p in naive.model.parameters()])
        assert flat.dtype == torch.float32
        assert not torch.equal(flat, flat.bfloat16().float())
        # torch's own loop in bf16 is 0.08 and 0.09 off the one in fp32, ours 0.11 and 0.13
        assert (flat - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_moments_after_a_resume_are_the_same_bits(tiny_run: TinyRun, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage, "checkpoint_every_steps": 1}
    clean = moments(run(tiny_run, tmp_path / "clean", **options))
    root = tmp_path / "clean" / "checkpoints"
    # From before the last step, and from after it, when only the export is left.
    for checkpoint in (root / "step-00000002", latest_checkpoint(root)):
        resumed = moments(run(tiny_run, tmp_path / "resumed", resume_dir=checkpoint, **options))
        for moment in MOMENTS:
            assert all(torch.equal(resumed[moment][name], clean[moment][name]) for name in clean[moment])


def test_they_are_kept_only_when_asked_for(tiny_run: TinyRun, tmp_path: Path) -> None:
    result = run(tiny_run, tmp_path, keep_optimizer_state=False, max_steps=1)
    assert result["optimizer_dir"] is None
    assert not (tmp_path / "optimizer").exists()


def test_an_optimizer_without_moments_per_parameter_is_refused(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefsel.train import export

    monkeypatch.setattr(export, "safe_get_full_optimizer_state", lambda parameter, moment: None)
    with pytest.raises(UserError, match=r"keep_optimizer_state: DeepSpeed has no exp_avg of model\.embed_tokens"):
        run(tiny_run, tmp_path, zero_stage=2, max_steps=1)
    assert not (tmp_path / "optimizer").exists()


def test_tied_weights_have_one_moment(tiny_run: TinyRun, tmp_path: Path) -> None:
    from tiny_policy import naive_logps
    from transformers import AutoTokenizer, LlamaForCausalLM

    untied = AutoModelForCausalLM.from_pretrained(tiny_run.model_dir)
    untied.config.tie_word_embeddings = True
    torch.manual_seed(2)
    tied = LlamaForCausalLM(untied.config).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model_dir)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    rows = tiny_run.train.slice(0, 4).to_pylist()
    for row in rows:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                row[f"reference_logps_{side}"] = naive_logps(tied, tokenizer, row["prompt"], row[side]).item()
    tied_run = TinyRun(tmp_path / "tied", pa.Table.from_pylist(rows), tiny_run.held_out)
    for stage in (0, 2):
        names = set(moments(run(tied_run, tmp_path / str(stage), zero_stage=stage, max_steps=1))["exp_avg"])
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names
