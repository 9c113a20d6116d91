"""Whether a process may still write to a workspace: whether the lease it writes under is the one in force."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from prefsel.errors import LostLeaseError

LEASE = "lease.json"
FRESH_S = 1.0
"""How long the epoch that was read last is believed."""

_checked: dict[str, tuple[int, float]] = {}


def require_epoch(uri: str, epoch: int, read: Callable[[str], bytes]) -> None:
    """Refuse to go on where another writer has taken the workspace over, or this one has given it back.

    The age of what was read counts from before the reading, and by a clock that goes on while a process is stopped or
    its machine sleeps. A virtual machine that its host stops for a while notices nothing and may be wrong for
    `FRESH_S` afterwards.

    Args:
        uri: Of the workspace.
        epoch: Of the lease that the caller writes under.
        read: Gives the bytes of a file of the workspace.

    Raises:
        LostLeaseError: the lease in force is another.
    """
    known = _checked.get(uri)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    if known is not None and known[0] == epoch and now - known[1] < FRESH_S:
        return
    _checked.pop(uri, None)
    try:
        lease = json.loads(read(LEASE))
        in_force, is_released = lease["epoch"], lease["is_released"]
    except FileNotFoundError:
        raise LostLeaseError(f"workspace: its {LEASE} is gone, so nothing more is written to it") from None
    except (ValueError, TypeError, KeyError):
        raise LostLeaseError(f"workspace: its {LEASE} is no lease any more, so nothing more is written to it") from None
    if in_force != epoch:
        raise LostLeaseError(
            "workspace: another run has taken it over while this one was silent for too long; this one writes nothing"
            " more to it, and what it had committed is kept"
        )
    if is_released:
        raise LostLeaseError("workspace: the run that this process worked for has ended; nothing more is written to it")
    _checked[uri] = (epoch, now)
