"""The demo's gold table and what the page makes of it, against numpy on the same responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config.file import parse_config
from prefsel.demo import SELECTIONS, demo_config, gold_table, paired
from prefsel.plan.nodes import make_plan
from prefsel.progress import Progress
from prefsel.report.verdict import comparisons
from prefsel.stages.report import given_measures
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage
from prefsel.world.inputs import evaluate_gold, read_prompts

SEED = 4
Z_95 = 1.959963984540054


class Measured(NamedTuple):
    table: dict[str, Any]
    golds: dict[str, np.ndarray]
    """Gold of each model's sampled responses, by the name that the table shows."""


@pytest.fixture(scope="module")
def measured(small_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The table of three models that nothing trained: the small policy with noise on its weights."""
    home, inputs = tmp_path_factory.mktemp("gold"), small_world.inputs
    plan = make_plan(parse_config(demo_config(inputs, SEED)), Storage(str(home)))
    folders = {"untrained": Path(inputs.policy)}
    for number, name in enumerate(SELECTIONS):
        folders[name] = noisy(inputs.policy, home / name, number)
    reports = [StageReport("train", f"dpo-{name}", "pairs", 9, 9, {}, 1, 1, 0.0, artifact=name) for name in SELECTIONS]
    table = gold_table(plan, reports, inputs, SEED, Progress(quiet=True))
    prompts = read_prompts(inputs.heldout)
    golds = {name: evaluate_gold(folder, prompts, seed=SEED + 1).per_prompt for name, folder in folders.items()}
    return Measured(table, {name: np.array(values) for name, values in golds.items()})


def noisy(policy: Path, folder: Path, seed: int) -> Path:
    model, generator = AutoModelForCausalLM.from_pretrained(policy), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder


def test_a_paired_error_is_that_of_the_differences() -> None:
    """Prompts differ by far more than the two models do: 10, 20, 30, 40 against 9, 18, 29, 38.

    The differences are 1, 2, 1, 2: mean 1.5, sample variance 1/3, standard error √(1/3 / 4).
    """
    assert paired([10, 20, 30, 40], [9, 18, 29, 38]) == pytest.approx((1.5, (1 / 12) ** 0.5))
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0)


def test_the_gain_of_a_model_is_over_the_same_prompts(measured: Measured) -> None:
    base = measured.golds["untrained"]
    rows = {row[0]: row[1:] for row in measured.table["rows"]}
    assert list(rows) == ["untrained", *SELECTIONS]
    assert rows["untrained"][3:5] == [0.0, 0.0]
    for name in SELECTIONS:
        golds = measured.golds[name]
        _, mean, error, gain, gain_error, *_ = rows[name]
        n = len(golds)
        assert (mean, error) == pytest.approx((golds.mean(), golds.std(ddof=1) / n**0.5))
        assert gain == pytest.approx(golds.mean() - base.mean())
        assert gain_error == pytest.approx((golds - base).std(ddof=1) / n**0.5)
        unpaired = ((golds.var(ddof=1) + base.var(ddof=1)) / n) ** 0.5
        assert abs(gain_error - unpaired) > 0.01 * unpaired, "the two errors would be told apart"


def test_the_page_compares_the_same_prompts_of_two_trainings(measured: Measured) -> None:
    """The verdict's interval against random is 1.96 standard errors of the differences to either side."""
    trainings = [
        {"name": f"dpo-{name}", "selection": name, "num_pairs": 9, "model": "policy", "reference": "policy"}
        for name in SELECTIONS
    ]
    found = comparisons(trainings, ["random30"], given_measures([measured.table]))
    by_selection = {one["selection"]: one for one in found if one["measure"] == "gold reward, T = 1"}
    assert set(by_selection) == {"pd30", "potential30"}
    for name, one in by_selection.items():
        difference = measured.golds[name] - measured.golds["random30"]
        half = Z_95 * difference.std(ddof=1) / len(difference) ** 0.5
        assert one["difference"]["mean"] == pytest.approx(difference.mean())
        assert one["difference"]["low"] == pytest.approx(difference.mean() - half)
        assert one["difference"]["high"] == pytest.approx(difference.mean() + half)
