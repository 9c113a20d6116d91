"""Fixtures of the whole test tree: golden examples, samples that lie beside a checkout, one local Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from prefsel.world.inputs import DemoInputs

# One thread per process: two cores are shared by the driver, Ray's workers and DeepSpeed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray makes its workers nice, and the other process of tests would starve them.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine is no fault of a property.
settings.register_profile("prefsel", deadline=None)
settings.load_profile("prefsel")


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `-n 2 --dist loadgroup`: what uses Ray stays in one process, so does what trains; the rest goes by file.

    One Ray serves all tests of its process. A second Ray or DeepSpeed beside it would only share its two cores.
    """
    for item in items:
        shared = [name for name in ("local_ray", "small_world") if name in getattr(item, "fixturenames", ())]
        group = "train" if item.path.parent.name == "train" else shared[0] if shared else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, Any]]:
    """The golden examples by name: see `golden/README.md`."""
    return json.loads((REPOSITORY / "tests/golden/examples.json").read_text())


class SmallWorld(NamedTuple):
    """Inputs of the demonstration in a few rows: 8 prompts, 10 policy steps, 60 labels, 8 reward steps."""

    home: Path
    inputs: DemoInputs
    seed: int
    scale: float
    told: list[tuple[str, int, int]]
    """What `make_inputs` reported while it made them."""


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Two small models and a corpus of the second's responses, made once."""
    from prefsel.world.inputs import make_inputs

    home, seed, scale = tmp_path_factory.mktemp("world"), 3, 0.005
    told: list[tuple[str, int, int]] = []
    inputs = make_inputs(home, seed=seed, scale=scale, on_progress=lambda *record: told.append(record))
    return SmallWorld(home, inputs, seed, scale, told)


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
    """One Ray of two CPUs for every test that needs one; its workers import what lies in this folder."""
    import ray

    from prefsel.config import RayOptions
    from prefsel.stages.session import connect

    path = os.pathsep.join([str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        connect(RayOptions(num_cpus=2, object_store_gib=0.25), quiet=True)
    yield
    ray.shutdown()
