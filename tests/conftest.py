"""Fixtures of the whole test tree: the shared samples, and one local Ray for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per process: two cores are shared by the driver, Ray's workers and DeepSpeed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and real samples that lies beside a checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder of golden numbers and real samples does not lie beside this checkout")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for every test that needs one."""
    import ray

    from prefsel.config import RayOptions
    from prefsel.stages.session import connect

    connect(RayOptions(num_cpus=2, object_store_gib=0.25), quiet=True)
    yield
    ray.shutdown()
