"""Who writes to a workspace: a process, and what it was started for."""

from __future__ import annotations

import getpass
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SLOT = "PREFSEL_SLOT"
"""The variable that names what a process was started for, such as one scheduled job: two of a name are one writer."""


@dataclass(frozen=True)
class Owner:
    """A writer."""

    slot: str | None
    """What it was started for: `PREFSEL_SLOT`, or the submission of a Ray job; None: by hand."""
    host: str
    machine: str
    """Boot of the kernel and space of process numbers: where `pid` and `started` mean something."""
    pid: int
    started: int
    """When the process began, in ticks of the kernel since the machine's boot: numbers of processes come again."""
    user: str

    def __str__(self) -> str:
        """For people."""
        job = f", {self.slot}" if self.slot else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}"

    def is_retry_of(self, other: Owner) -> bool:
        """Whether both were started for the same thing, so that the other one is over, whatever became of it."""
        return self.slot is not None and self.slot == other.slot

    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.machine == _machine()

    def is_dead(self) -> bool:
        """Whether it is known to have ended; False on another machine, where nobody knows."""
        return self.is_here() and _state(self.pid, self.started) in (None, "Z", "X")

    def is_at_work(self) -> bool:
        """Whether it is known to run: it is a process of this machine, and nobody has stopped it."""
        return self.is_here() and _state(self.pid, self.started) not in (None, "Z", "X", "T", "t")


def this_process() -> Owner:
    """The owner that this process is."""
    pid = os.getpid()
    slot = os.environ.get(SLOT) or _ray_submission()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, whose user has a number alone
        user = f"user {os.getuid()}"
    return Owner(slot, platform.node(), _machine(), pid, _read_stat(pid)[1], user)


def _ray_submission() -> str | None:
    """The submission that this process is the entry point of, as `ray job submit` tells it."""
    with suppress(ValueError):
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        name = config.get("metadata", {}).get("job_submission_id")
        return f"Ray job {name}" if name else None
    return None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _state(pid: int, started: int) -> str | None:
    """The letter of a process's state as Linux gives it; None where it has ended."""
    try:
        state, began = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state if began == started else None


def _read_stat(pid: int) -> tuple[str, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()  # a name may hold blanks and brackets
    return fields[0], int(fields[19])
