"""The tiny policy with its pairs, a classifier on its trunk with others, and what the tests of both objectives run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_policy import TinyRun, make_tiny_run, make_tokenizer
from tiny_rewards import reward_table
from tiny_runs import Case, policy_case, reward_case
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def linear_stays_torchs() -> Iterator[None]:
    """DeepSpeed's stage 3 leaves a `linear` of its own in torch, which has no forward-mode derivative."""
    kept = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = kept


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_run(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    torch.set_num_threads(1)
    return make_tiny_run(tmp_path_factory.mktemp("tiny") / "policy", tokenizer)


@pytest.fixture(scope="session")
def policy(tiny_run: TinyRun) -> Case:
    return policy_case(tiny_run.model_dir, tiny_run.train, tiny_run.held_out)


@pytest.fixture(scope="session")
def rewards(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The tiny policy's trunk under a random head: a start that both loops read from the same file."""
    folder = tmp_path_factory.mktemp("start") / "classifier"
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run.model_dir, num_labels=1, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_run.model_dir).save_pretrained(folder)
    return reward_case(folder, reward_table(28))


@pytest.fixture(scope="session", params=["policy", "rewards"])
def case(request: pytest.FixtureRequest) -> Case:
    """Either objective."""
    found: Case = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def plain_policy(policy: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return policy.run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def plain_rewards(rewards: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rewards.run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def plain(case: Case, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A run of either objective with its defaults on one worker."""
    name = "plain_rewards" if case.held_out is None else "plain_policy"
    found: dict[str, Any] = request.getfixturevalue(name)
    return found
