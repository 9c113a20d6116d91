"""Weight decay: as torch's AdamW on the groups of transformers' trainer, whatever is trained and however sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_loop import naive_training
from tiny_runs import COMMON, Case, assert_same_weights, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

from prefsel.models.chat import Encoder
from prefsel.train.checkpoint import run_identity
from prefsel.train.data import TrainingPairs
from prefsel.train.engine import start_worker
from prefsel.train.weight_decay import in_groups, optimizer_groups

DECAY = 30.0
"""So large that six steps of a learning rate of at most 3e-3 halve a weight that decays."""


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "gemma2"])
def test_what_decays_is_what_the_trainer_of_transformers_decays(model_type: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    expected = set(Trainer.get_decay_parameter_names(None, model)) & {name for name, _ in model.named_parameters()}
    decaying, spared = in_groups(model.parameters(), 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[one] for one in decaying} == expected
    assert {names[one] for one in spared} == set(names.values()) - expected


def test_without_decay_there_is_one_group_in_the_models_order() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    assert all(one is other for one, other in zip(optimizer_groups(model.parameters(), 0.0), model.parameters()))
    decaying, spared = optimizer_groups(model.parameters(), 0.5)
    assert [len(decaying["params"]), decaying["weight_decay"]] == [2, 0.5]
    assert [len(spared["params"]), spared["weight_decay"]] == [4, 0.0]


@pytest.fixture(scope="module")
def decayed(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return case.run(tmp_path_factory.mktemp("decayed"), weight_decay=DECAY)


@pytest.fixture(scope="module", params=["policy", "rewards"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def test_weights_are_those_of_a_textbook_loop(case: Case, decayed: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.model_dir)
    start_worker()
    corpus = case.objective().prepare(TrainingPairs.from_table(case.table), None, Encoder(tokenizer))
    epochs = [corpus.draws.of_epoch(epoch) for epoch in (0, 1)]
    naive = naive_training(
        case.auto_class.from_pretrained(case.model_dir, dtype=torch.float32),
        tokenizer,
        case.table.to_pylist(),
        [epoch[start : start + 8] for epoch in epochs for start in range(0, len(epoch), 8)],
        output=case.output,
        loss=case.loss,
        learning_rate=COMMON["learning_rate"],
        num_warmup_steps=2,
        weight_decay=DECAY,
    )
    start = dict(case.auto_class.from_pretrained(case.model_dir, dtype=torch.float32).named_parameters())
    found = weights(decayed)
    for name, want in naive.model.named_parameters():
        torch.testing.assert_close(found[name], want.detach(), rtol=0, atol=3e-4, msg=name)
        shrunk = (found[name].norm() / start[name].norm()).item()
        assert shrunk > 0.97 if "norm" in name else shrunk < 0.85, name


@pytest.mark.parametrize("options", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_shards_decay_alike(options: dict[str, Any], case: Case, decayed: dict[str, Any], tmp_path: Path) -> None:
    assert_same_weights(case.run(tmp_path, weight_decay=DECAY, **options), decayed, atol=3e-5)


def test_a_checkpoint_with_other_groups_belongs_to_another_run(case: Case) -> None:
    identity = run_identity(case.objective(weight_decay=DECAY).config, "pairs")
    assert identity["decayed"] == "matrices"
    assert "decayed" not in run_identity(case.objective().config, "pairs")
