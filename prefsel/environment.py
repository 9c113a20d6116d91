"""What a bug report needs to know of the machine: versions, hardware, where Ray is; nothing that could be secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

import prefsel
from prefsel.display import redact

PACKAGES = (
    *("ray", "torch", "transformers", "tokenizers", "datasets", "deepspeed", "accelerate", "peft", "pyarrow", "numpy"),
    *("pydantic", "typer"),
)
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # nosec B108 # read alone, where Ray writes it
"""Where `ray start` leaves the address of the cluster that it started on this machine."""


def environment() -> dict[str, str]:
    """Everything, by what it is called."""
    memory = psutil.virtual_memory()
    return {
        "prefsel": f"{prefsel.__version__} at {Path(prefsel.__file__).parent}",
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": f"{platform.platform()}, {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "cpus": f"{os.cpu_count()}, of which this process may use {len(os.sched_getaffinity(0))}",
        "memory": f"{memory.total / 2**30:.1f} GiB, of which {memory.available / 2**30:.1f} are free",
        "gpus": _gpus(),
        "ray address": _ray_address(),
    }


def lines() -> Iterator[str]:
    """The environment as text."""
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        yield f"{name:<{width}}  {value}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    """The GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return f"none that torch can use; it was built for CUDA {torch.version.cuda}"
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return "; ".join(f"{one.name}, {one.total_memory / 2**30:.1f} GiB" for one in found)


def _ray_address() -> str:
    """What a run without `ray.address` would do."""
    given = os.environ.get("RAY_ADDRESS")
    if given and given != "local":
        return f"RAY_ADDRESS is {redact(given)}: a run joins that cluster"
    told = "a run starts a Ray of its own"
    if CURRENT_CLUSTER.is_file():
        there = redact(CURRENT_CLUSTER.read_text().strip())
        told += f"; `ray start` left one at {there}, which `ray.address: auto` joins"
    return told
