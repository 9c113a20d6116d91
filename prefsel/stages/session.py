"""The Ray a run works on: a cluster that is there, or one of this process."""

from __future__ import annotations

import logging
import os
import site
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

import prefsel
from prefsel.config import RayOptions
from prefsel.errors import PrefselError, UserError
from prefsel.interrupts import kept_handlers
from prefsel.plan.resources import cluster_address


def connect(config: RayOptions, *, quiet: bool = False) -> None:
    """Join the Ray cluster of `config.address` or `RAY_ADDRESS` (set inside a Ray job), or start a Ray of this process.

    `num_cpus`, `num_gpus` and `object_store_gib` size a Ray that is started here; a cluster keeps its own.

    Raises:
        UserError: nothing answers at the address.
        PrefselError: a Ray of this process does not start.
    """
    if ray.is_initialized():
        return
    address = cluster_address(config)
    options = {"log_to_driver": not quiet, "logging_level": "warning", "configure_logging": True}
    if address:
        try:
            with kept_handlers():
                ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"ray.address: no Ray cluster answers at {address!r}: {error}") from error
    else:
        logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_news)
        with kept_handlers(), _found_first(), _started():
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                object_store_memory=int(config.object_store_gib * 2**30),
                include_dashboard=False,
                # Ray puts the working directory before everything else that its workers import from, and a folder
                # `prefsel` there would be taken for this package. What is imported before that stays.
                _system_config={"preload_python_modules": ["prefsel"]},
                **options,
            )
        _OWN.add(ray.get_runtime_context().gcs_address)
        _watch_agents()


def quiet_data() -> None:
    """Ray Data as passes use it: silent, since our own bars and lines say what happens, and errors as they were raised,
    not wrapped: else their cause is lost on the way.

    Called by what streams over it: to import it takes a second that other stages need not wait for.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def is_own() -> bool:
    """Whether this process started the Ray it works on: its resources are then final, while a cluster may grow."""
    return ray.get_runtime_context().gcs_address in _OWN


_OWN: set[str] = set()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether Ray's word on its tokens is a warning: not that they are on, which is as it should be."""
    return "authentication is enabled" not in record.getMessage()


@contextmanager
def _started() -> Iterator[None]:
    """Raise what Ray says when its processes do not come up in the 30 s it gives them as a known error."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # Ray has no class of its own for this
            raise
        reason = str(error).split(". ")[0]
        raise PrefselError(f"Ray did not start: {reason}; is this machine very busy? Run again to continue") from error


_END_AGENTS = 'cat > /dev/null; for pid in "$@"; do grep -qs Agent "/proc/$pid/cmdline" && kill -9 "$pid"; done'
_watcher: list[subprocess.Popen[bytes]] = []
"""Kept: its end of the pipe closes with this process, however that ends."""


def _watch_agents() -> None:
    """Have the agents of this process's Ray ended when it is killed.

    Everything else ends with it within seconds; the two agents first try for a minute, fixed in Ray's code, to tell a
    control store that is gone that their raylet is gone.
    """
    agents = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            agents += [str(process.pid)] if "Agent" in " ".join(process.cmdline()) else []
    command = ["sh", "-c", _END_AGENTS, "sh", *agents]
    _watcher[:] = [subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)]


@contextmanager
def _found_first() -> Iterator[None]:
    """Processes that the block starts find this very package, also in a checkout that is not installed."""
    root = Path(prefsel.__file__).resolve().parents[1]
    installed = [sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()]
    before = os.environ.get("PYTHONPATH")
    if root not in [Path(folder).resolve() for folder in installed]:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before
