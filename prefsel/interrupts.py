"""Ctrl-C and SIGTERM: one line says what is committed, nothing is left running, the exit code tells (130, 143).

The handler ends the process where it stands and raises nothing. An exception raised in the middle of Ray's or Arrow's
code was swallowed on its way (a run that was interrupted while it scored exited with 0), and leaving through Ray's own
shutdown, while another thread waits in it, ended in SIGABRT or a segmentation fault. Nothing needs to be unwound:
artifacts are committed whole or not at all, and the next run goes on from what is committed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GONE_WITHIN_S = 5.0
"""How long the ended processes are waited for; they got SIGKILL, so this only runs out for one stuck in the kernel."""

_told_by: list[Callable[[], str]] = []
_at_end: list[Callable[[], None]] = []
_is_ending = threading.Event()


def install() -> None:
    """Answer SIGINT and SIGTERM from now on. Only the main thread of a process may ask for it."""
    for number in SIGNALS:
        signal.signal(number, _end)


@contextmanager
def telling(committed: Callable[[], str]) -> Iterator[None]:
    """While the block runs, an interruption says what `committed` returns. It must not block: a handler calls it."""
    _told_by.append(committed)
    try:
        yield
    finally:
        _told_by.remove(committed)


@contextmanager
def ending(call: Callable[[], None]) -> Iterator[None]:
    """While the block runs, an interruption calls `call` when nothing else runs any more.

    A handler calls it: it may take no lock that the interrupted code could hold, and should not take long.
    """
    _at_end.append(call)
    try:
        yield
    finally:
        _at_end.remove(call)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back after a block that sets its own, as `ray.init` does.

    Ray's handler leaves with `sys.exit(SIGTERM)`; a SIGTERM that came inside the block is answered after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    came = False
    try:
        yield
    except SystemExit as leaving:
        if leaving.code != signal.SIGTERM:
            raise
        came = True
    finally:
        for number, handler in kept.items():
            if handler is not None:  # one that is not Python's own cannot be put back
                signal.signal(number, handler)
    if came:
        signal.raise_signal(signal.SIGTERM)


def _end(number: int, frame: object) -> None:
    """The first signal ends the run in order, a second one at once."""
    code = 128 + number
    if _is_ending.is_set():
        os._exit(code)
    _is_ending.set()
    committed = _told_by[-1]() if _told_by else "nothing new"
    name = signal.Signals(number).name
    # No buffered streams: the signal may have come in the middle of a write to one.
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\r\x1b[2K\x1b[?25h")  # away with the line of a bar; back with the cursor that it hides
        os.write(2, f"prefsel: {name}; committed so far: {committed}; run again to continue\n".encode())
    _mute()
    _end_children()
    for call in _at_end:
        call()
    os._exit(code)


def _mute() -> None:
    """What Ray's threads say about the processes that are ended now is news to nobody."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _end_children() -> None:
    """Kill every process below this one, parents first, so that none is started again, and wait until they are gone."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GONE_WITHIN_S)
