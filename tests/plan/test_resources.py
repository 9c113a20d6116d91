"""What asks for more than there can ever be is refused with its place; what may fit is let through."""

from __future__ import annotations

from typing import Any

import pytest

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.resources import check_resources, cluster_address, given_resources

MODEL = {"kind": "pretrained", "name": "policy", "path": "m", "gpus_per_replica": 2}
SCORER = {"kind": "causal_logps", "model": "policy"}
TRAIN = {"name": "dpo", "selection": "all", "model": "policy", "reference": "policy", "learning_rate": 1e-6}


def config(**more: Any) -> Any:
    return parse_config({"name": "x", "sources": [{"name": "a", "paths": ["a.jsonl"]}], "models": [MODEL]} | more)


@pytest.mark.parametrize(
    ("more", "have", "told"),
    [
        (
            {"scorers": [SCORER | {"pool": {"size": 3}}]},
            {"CPU": 2.0},
            "scorers.policy.pool.num_cpus: 3 x 1 CPUs asked, 3 in all, but this Ray has 2;",
        ),
        (
            {"scorers": [SCORER | {"pool": {"min_size": 2, "max_size": 9, "num_cpus": 1.5}}]},
            {"CPU": 2.0},
            "2 x 1.5 CPUs asked, 3 in all",
        ),
        (
            {"scorers": [SCORER | {"pool": {"num_gpus": 0.5}}]},
            {"CPU": 2.0, "GPU": 0.0},
            "scorers.policy.pool.num_gpus: 1 x 0.5 GPUs asked, 0.5 in all, but this Ray has 0; valid: a "
            "smaller number, a larger ray.num_gpus, or ray.address of a cluster",
        ),
        ({"scorers": [SCORER]}, {"CPU": 2.0, "GPU": 1.0}, "1 x 2 GPUs asked"),  # gpus_per_replica
        ({"train": [TRAIN | {"workers": 3}]}, {"CPU": 2.0}, "train.dpo.workers: 3 x 1 CPUs asked"),
        ({"train": [TRAIN | {"gpus_per_worker": 1}]}, {"GPU": 0.0}, "train.dpo.workers: 1 x 1 GPUs asked"),
        ({"train": [TRAIN | {"workers": 2}]}, {"CPU": 4.0, "GPU": 1.0}, "2 x 1 GPUs asked"),
    ],
)
def test_refusals(more: dict[str, Any], have: dict[str, float], told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_resources(config(**more), have)
    assert told in str(caught.value)


def test_what_fits_or_is_not_known_passes() -> None:
    everything = config(
        scorers=[SCORER | {"pool": {"size": 2}}, {"kind": "imported", "name": "gold"}], train=[TRAIN | {"workers": 2}]
    )
    check_resources(everything, {"CPU": 2.0, "GPU": 0.0})
    check_resources(everything, {"CPU": 2.0})
    check_resources(everything, {})


def test_given_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert given_resources(config(ray={"num_cpus": 2}).ray) == {"CPU": 2.0}
    assert cluster_address(config().ray) is None
    assert cluster_address(config(ray={"address": "local"}).ray) is None
    assert cluster_address(config(ray={"address": "10.0.0.1:6379"}).ray) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_address(config().ray) == "auto"
