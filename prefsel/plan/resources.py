"""What pools and trainings ask of a Ray, held against what it has, before anything is started on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.config import Config, RayOptions
from prefsel.errors import UserError

KEYS = {"CPU": "ray.num_cpus", "GPU": "ray.num_gpus"}
"""Where the configuration says how much of a resource a Ray of this process gets."""


@dataclass(frozen=True)
class Demand:
    """What has to be there at once for one pool or one training."""

    field: str
    what: str
    """How many times how much."""
    resource: str
    amount: float


def cluster_address(options: RayOptions) -> str | None:
    """Where the cluster is that a run joins; None where it starts a Ray of its own."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def given_resources(options: RayOptions) -> dict[str, float]:
    """What the configuration gives a Ray of this process; what it leaves to Ray is not there."""
    given = {"CPU": options.num_cpus, "GPU": options.num_gpus}
    return {name: float(number) for name, number in given.items() if number is not None}


def check_resources(config: Config, have: Mapping[str, float]) -> None:
    """Refuse a pool or a training that a Ray with these resources can never hold.

    Args:
        config: The run.
        have: Number of `CPU` and `GPU`; one that is not known yet is left out.

    Raises:
        UserError: names the field, what it asks for and what there is.
    """
    for demand in _demands(config, have):
        known = have.get(demand.resource)
        if known is not None and demand.amount > known:
            raise UserError(
                f"{demand.field}: {demand.what} asked, {demand.amount:g} in all, but this Ray has {known:g}; "
                f"valid: a smaller number, a larger {KEYS[demand.resource]}, or ray.address of a cluster"
            )


def _demands(config: Config, have: Mapping[str, float]) -> Iterator[Demand]:
    """Everything that must fit; without GPUs an actor or worker asks for one only where the configuration says so."""
    spread = {spec.name: spec.gpus_per_replica for spec in config.models}
    scorers: Sequence[Any] = config.scorers
    for scorer in scorers:
        if not scorer.runs_models:
            continue
        pool, field = scorer.pool, f"scorers.{scorer.label}.pool"
        size = pool.min_size or pool.size or 1
        yield Demand(f"{field}.num_cpus", f"{size} x {pool.num_cpus:g} CPUs", "CPU", size * pool.num_cpus)
        gpus = pool.num_gpus
        if gpus is None:
            models = scorer.models(config)
            gpus = spread.get(models[-1], 1) if models and have.get("GPU") else 0
        yield Demand(f"{field}.num_gpus", f"{size} x {gpus:g} GPUs", "GPU", size * gpus)
    for spec in config.train:
        gpus = spec.gpus_per_worker if spec.gpus_per_worker is not None else (1 if have.get("GPU") else 0)
        cpus, field = spec.cpus_per_worker, f"train.{spec.name}.workers"
        yield Demand(field, f"{spec.workers} x {cpus:g} CPUs", "CPU", spec.workers * cpus)
        yield Demand(field, f"{spec.workers} x {gpus:g} GPUs", "GPU", spec.workers * gpus)
