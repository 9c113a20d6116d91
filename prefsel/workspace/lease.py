"""One writer per workspace: `lease.json` says who it is, and every write checks that it still is.

The holder counts heartbeats in the lease. Whoever wants the workspace watches them with its own clock alone: a count
that stands still for `expiry_s` belongs to a run that is gone, whatever the clocks of both machines show. It takes over
by a compare-and-swap against the count it saw, under a higher epoch, and what still runs for the old holder finds
another epoch before its next write (`Storage.write`) and stops.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from prefsel import interrupts
from prefsel.display import redact
from prefsel.errors import DamagedError, PrefselError, RefusedError, UserError, invalid
from prefsel.workspace.fence import LEASE
from prefsel.workspace.owner import Owner, this_process
from prefsel.workspace.storage import Storage
from prefsel.workspace.swap import Conflict, Version, read, swap

EXPIRY_S = 60.0
"""How long a holder may be silent before its workspace is taken over."""
EXPIRY = "PREFSEL_LEASE_EXPIRY_S"
"""The variable that sets it otherwise."""
BEATS = 6
"""Heartbeats within that time: as many in a row must fail before a holder that lives is taken for dead."""
RELEASED_WITHIN_S = 5.0
"""How long an interrupted run tries to give its lease back; it ends on this machine either way."""


@dataclass(frozen=True)
class Lease:
    """What `lease.json` holds."""

    epoch: int
    """Grows by one whenever a run begins to write."""
    beat: int
    owner: Owner
    since: str
    """When its run began, by its own clock, for people only."""
    expiry_s: float
    """Of its holder, whose heartbeats are this divided by `BEATS` apart."""
    is_released: bool = False

    def __str__(self) -> str:
        """For people."""
        return f"{self.owner}, since {self.since}"

    def to_bytes(self) -> bytes:
        """As the object holds it."""
        return json.dumps(asdict(self), indent=1).encode()


def holder(storage: Storage) -> Lease | None:
    """The lease of the run that writes to a workspace, or was killed while it did; None where none does."""
    found = _read(storage)
    return None if found is None or found[0].is_released else found[0]


def require_no_writer(storage: Storage) -> None:
    """Refuse at once, before anything is started, where another process of this machine is known to write.

    Raises:
        RefusedError: one does.
    """
    lease = None if storage.uri in _held else holder(storage)
    if lease is not None and lease.owner.is_at_work() and not _is_free(lease, this_process()):
        raise _refusal(storage, lease)


@contextmanager
def hold(
    storage: Storage, *, wait: bool = False, tell: Callable[[str], None] = print, expiry_s: float | None = None
) -> Iterator[Storage]:
    """Be the only writer of a workspace while the block runs; a block inside another of this process shares its lease.

    Args:
        storage: The workspace.
        wait: Wait until its writer has ended, and tell so once; otherwise be refused.
        tell: Prints a line.
        expiry_s: How long this holder may be silent; default: `PREFSEL_LEASE_EXPIRY_S`, or a minute.

    Yields:
        The workspace, to write through: it carries the epoch, also to where it is pickled to.

    Raises:
        RefusedError: another run writes to it.
        UserError: it cannot be written, or lies where two writers cannot be kept apart.
    """
    if storage.uri in _held:
        yield _held[storage.uri]
        return
    expiry_s = _expiry_s() if expiry_s is None else expiry_s
    try:
        lease, version = _take(storage, expiry_s, wait, tell)
    except OSError as error:
        raise UserError(f"workspace: cannot write {redact(storage.uri)!r}: {redact(str(error))}") from error
    heart = _Heart(storage, lease, version)
    held = _held[storage.uri] = replace(storage, epoch=lease.epoch)
    try:
        with interrupts.ending(heart.stop):
            held.sweep()
            yield held
    finally:
        del _held[storage.uri]
        heart.stop()


_held: dict[str, Storage] = {}
"""What this process holds, by URI."""


def _expiry_s() -> float:
    given = os.environ.get(EXPIRY)
    if not given:
        return EXPIRY_S
    with suppress(ValueError):
        if float(given) > 0:
            return float(given)
    raise invalid(EXPIRY, given, "seconds, above 0")


def _read(storage: Storage) -> tuple[Lease, Version] | None:
    try:
        found = read(storage, LEASE)
        if found is None:
            return None
        fields = json.loads(found[0])
        return Lease(**fields | {"owner": Owner(**fields["owner"])}), found[1]
    except (ValueError, TypeError, KeyError, DamagedError) as error:
        place = f"{redact(storage.uri)}/{LEASE}"
        raise PrefselError(f"{place}: not a lease; if no run writes to this workspace, remove it") from error


def _take(storage: Storage, expiry_s: float, wait: bool, tell: Callable[[str], None]) -> tuple[Lease, Version]:
    """Become the holder.

    Raises:
        RefusedError: another run holds it, and lives.
    """
    me = this_process()
    is_told, seen, seen_s = False, None, 0.0
    while True:
        found = _read(storage)
        there, version = found or (None, None)
        if there is None or _is_free(there, me) or _is_silent(there, seen, seen_s):
            since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            mine = Lease(there.epoch + 1 if there else 1, 0, me, since, expiry_s)
            with suppress(Conflict):  # somebody was faster, or the holder is alive after all
                return mine, swap(storage, LEASE, mine.to_bytes(), version)
            continue
        is_alive = there.owner.is_at_work() or seen not in (None, _count(there))
        if is_alive and not wait:
            raise _refusal(storage, there)
        if not is_told:
            for_what = "waiting for its end" if wait else f"watching up to {there.expiry_s:g} s whether it is alive"
            tell(f"workspace: held by {there}; {for_what}")
            is_told = True
        if _count(there) != seen:
            seen, seen_s = _count(there), time.monotonic()
        time.sleep(min(2.0, there.expiry_s / 30))


def _refusal(storage: Storage, lease: Lease) -> RefusedError:
    return RefusedError(
        f"workspace: {redact(storage.uri)!r} is being written by {lease}; wait for its end with --wait, or end it."
        " Commands that only read go on meanwhile"
    )


def _is_free(lease: Lease, me: Owner) -> bool:
    """Whether nobody has to be watched: it was given back, its process ended here, or this is that run's retry."""
    return lease.is_released or lease.owner == me or lease.owner.is_dead() or me.is_retry_of(lease.owner)


def _is_silent(lease: Lease, seen: tuple[int, int] | None, seen_s: float) -> bool:
    """Whether its heartbeats have stood still for as long as it allowed, since they were `seen` first."""
    return _count(lease) == seen and time.monotonic() - seen_s >= lease.expiry_s


def _count(lease: Lease) -> tuple[int, int]:
    return lease.epoch, lease.beat


class _Heart:
    """Counts heartbeats in a thread of its own until it is stopped, and then gives the lease back."""

    def __init__(self, storage: Storage, lease: Lease, version: Version) -> None:
        self._storage, self._lease, self._version = storage, lease, version
        # Its `put` may be called by a signal's handler, whatever the handler has interrupted.
        self._stopped = queue.SimpleQueue[None]()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give the lease back and stop counting; a store that does not answer is not waited for any longer."""
        self._stopped.put(None)
        self._thread.join(RELEASED_WITHIN_S)

    def _beat(self) -> None:
        is_last = False
        while not is_last:
            try:
                self._stopped.get(timeout=self._lease.expiry_s / BEATS)
                is_last = True
            except queue.Empty:
                pass
            try:
                self._write(replace(self._lease, beat=self._lease.beat + 1, is_released=is_last))
            except Conflict:
                return  # taken over: the next write of this run finds another epoch
            except (OSError, PrefselError):
                continue  # the store did not answer; the next heartbeat, or the one that takes over, will tell

    def _write(self, lease: Lease) -> None:
        """Swap the lease in.

        Raises:
            Conflict: the workspace has another holder.
        """
        try:
            self._version = swap(self._storage, LEASE, lease.to_bytes(), self._version)
        except Conflict:
            # A heartbeat that seemed to fail may have arrived: then the lease is still ours, with another version.
            found = _read(self._storage)
            if found is None or (found[0].epoch, found[0].owner) != (lease.epoch, lease.owner):
                raise
            self._version = swap(self._storage, LEASE, lease.to_bytes(), found[1])
        self._lease = lease
