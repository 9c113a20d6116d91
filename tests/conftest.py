"""Fixtures of the whole test tree: golden examples, samples that lie beside a checkout, one local Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread per process: two cores are shared by the driver, Ray's workers and DeepSpeed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, Any]]:
    """The golden examples by name: see `golden/README.md`."""
    return json.loads((Path(__file__).parent / "golden/examples.json").read_text())


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of samples of public data sets, which are not part of the repository and may lie beside a checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of samples of public data sets lies beside this checkout")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for every test that needs one."""
    import ray

    from prefsel.config import Ray
    from prefsel.session import connect

    connect(Ray(num_cpus=2, object_store_gib=0.25), quiet=True)
    yield
    ray.shutdown()
