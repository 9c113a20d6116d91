"""Adam's moments as they are exported, against those of torch's own AdamW in a textbook loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from naive_loop import NaiveRun, naive_training
from safetensors.torch import load_file
from tiny_policy import naive_logps
from tiny_runs import Case, first_epoch, policy_case
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prefsel.errors import UserError
from prefsel.train.checkpoint import latest_checkpoint
from prefsel.train.deepspeed_config import lr_factor

OPTIONS = {"num_epochs": 1, "warmup_ratio": 0.3, "keep_optimizer_state": True, "token_budget": 8192}
"""Three steps, the last of 6 pairs."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def run(policy: Case, output_dir: Path, resume_dir: Path | None = None, **options: Any) -> dict[str, Any]:
    return replace(policy, held_out=None).run(output_dir, resume_dir=resume_dir, **{**OPTIONS, **options})


def moments(result: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(Path(result["optimizer_dir"]) / f"{name}.safetensors") for name in MOMENTS}


def textbook(policy: Case, batches: list[Any]) -> NaiveRun:
    model = AutoModelForCausalLM.from_pretrained(policy.model_dir, dtype=torch.float32)
    tokenizer, rows = AutoTokenizer.from_pretrained(policy.model_dir), policy.table.to_pylist()
    options = {"output": policy.output, "loss": policy.loss, "learning_rate": 3e-3, "num_warmup_steps": 1}
    return naive_training(model, tokenizer, rows, batches, **options)


@pytest.fixture(scope="module")
def naive(policy: Case) -> NaiveRun:
    batches = first_epoch()
    return textbook(policy, batches)


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
    policy: Case, naive: NaiveRun, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = run(policy, tmp_path, **options)
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
def test_bf16_keeps_fp32_moments(policy: Case, tmp_path: Path, stage: int) -> None:
    # One step: after it the rounded weights lead elsewhere.
    first = first_epoch()[:1]
    naive = textbook(policy, first)
    got = moments(run(policy, tmp_path, dtype="bf16", zero_stage=stage, max_steps=1))
    for moment in MOMENTS:
        flat = torch.cat([got[moment][name].flatten() for name, _ in naive.model.named_parameters()])
        want = torch.cat([naive.optimizer.state[p][moment].flatten() for p in naive.model.parameters()])
        assert flat.dtype == torch.float32
        assert not torch.equal(flat, flat.bfloat16().float())
        # torch's own loop in bf16 is 0.08 and 0.09 off the one in fp32, ours 0.11 and 0.13
        assert (flat - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_moments_after_a_resume_are_the_same_bits(policy: Case, tmp_path: Path, stage: int) -> None:
    options = {"zero_stage": stage, "checkpoint_every_steps": 1}
    clean = moments(run(policy, tmp_path / "clean", **options))
    root = tmp_path / "clean" / "checkpoints"
    # From before the last step, and from after it, when only the export is left.
    for checkpoint in (root / "step-00000002", latest_checkpoint(root)):
        resumed = moments(run(policy, tmp_path / "resumed", resume_dir=checkpoint, **options))
        for moment in MOMENTS:
            assert all(torch.equal(resumed[moment][name], clean[moment][name]) for name in clean[moment])


def test_they_are_kept_only_when_asked_for(policy: Case, tmp_path: Path) -> None:
    result = run(policy, tmp_path, keep_optimizer_state=False, max_steps=1)
    assert result["optimizer_dir"] is None
    assert not (tmp_path / "optimizer").exists()


def test_an_optimizer_without_moments_per_parameter_is_refused(
    policy: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefsel.train import optimizer_state

    monkeypatch.setattr(optimizer_state, "safe_get_full_optimizer_state", lambda parameter, moment: None)
    with pytest.raises(UserError, match=r"keep_optimizer_state: DeepSpeed has no exp_avg of model\.embed_tokens"):
        run(policy, tmp_path, zero_stage=2, max_steps=1)
    assert not (tmp_path / "optimizer").exists()


def test_tied_weights_have_one_moment(policy: Case, tmp_path: Path) -> None:
    untied = AutoModelForCausalLM.from_pretrained(policy.model_dir)
    untied.config.tie_word_embeddings = True
    torch.manual_seed(2)
    tied = LlamaForCausalLM(untied.config).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy.model_dir)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    rows = policy.table.slice(0, 4).to_pylist()
    for row in rows:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                row[f"reference_logps_{side}"] = naive_logps(tied, tokenizer, row["prompt"], row[side]).item()
    tied_run = policy_case(tmp_path / "tied", pa.Table.from_pylist(rows), policy.held_out)
    for stage in (0, 2):
        names = set(moments(run(tied_run, tmp_path / str(stage), zero_stage=stage, max_steps=1))["exp_avg"])
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names


def test_moments_keep_their_names_where_some_weights_decay(policy: Case, tmp_path: Path) -> None:
    """Stage 0 reads them by place, the others by name; with decay the optimizer has another order than the model."""
    by_place, by_name = (
        moments(run(policy, tmp_path / str(stage), zero_stage=stage, weight_decay=0.5)) for stage in (0, 2)
    )
    for moment in MOMENTS:
        assert list(by_place[moment]) == list(by_name[moment])
        for name, value in by_name[moment].items():
            torch.testing.assert_close(by_place[moment][name], value, rtol=1e-3, atol=1e-7, msg=name)
