"""The Ray a run works on: a cluster that is there, or one of this process."""

from __future__ import annotations

import logging
import os

import ray

from prefsel.config import RayOptions
from prefsel.errors import UserError


def connect(config: RayOptions, *, quiet: bool = False) -> None:
    """Join the Ray cluster of `config.address` or `RAY_ADDRESS` (set inside a Ray job), or start a Ray of this process.

    `num_cpus`, `num_gpus` and `object_store_gib` size a Ray that is started here; a cluster keeps its own.

    Raises:
        UserError: nothing answers at the address.
    """
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": not quiet, "logging_level": "warning", "configure_logging": True}
    if address and address != "local":
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"ray.address: no Ray cluster answers at {address!r}: {error}") from error
    else:
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            object_store_memory=int(config.object_store_gib * 2**30),
            include_dashboard=False,
            **options,
        )
        _OWN.add(ray.get_runtime_context().gcs_address)
    # Our own bars and lines say what happens; Ray Data's flood the log of a job.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def is_own() -> bool:
    """Whether this process started the Ray it works on: its resources are then final, while a cluster may grow."""
    return ray.get_runtime_context().gcs_address in _OWN


_OWN: set[str] = set()
