"""Fixtures of the whole test tree: golden examples, samples that lie beside a checkout, one local Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread per process: two cores are shared by the driver, Ray's workers and DeepSpeed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, Any]]:
    """The golden examples by name: see `golden/README.md`."""
    return json.loads((REPOSITORY / "tests/golden/examples.json").read_text())


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small preference data in four formats: see `jobs/data/make_samples.py`."""
    folder = tmp_path_factory.mktemp("samples")
    subprocess.run([sys.executable, REPOSITORY / "jobs/data/make_samples.py", "--into", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of samples of public data sets, which are not part of the repository and may lie beside a checkout."""
    folder = REPOSITORY.parent / "shared"
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
