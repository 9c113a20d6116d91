"""Pieces of work that are made once: each leaves a marker of its parameters and is skipped while that still fits.

Pieces that do not need each other are made side by side, in fresh processes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

OnProgress = Callable[[str, int, int], None]
"""Told (task, units done, units in all); tasks may run side by side."""
Parameters = Mapping[str, Any]
"""Plain JSON values: everything that decides what is made."""

NUM_REPORTS: Final = 100
"""Times a piece in another process reports, at most."""


@dataclass(frozen=True)
class Piece:
    """What is made, by a function of a module (so that another process finds it)."""

    name: str
    output: str
    """The last file it writes, relative to the folder of all pieces."""
    make: Callable[[Path, Parameters, OnProgress], dict[str, Any]]
    """Returns facts worth keeping, as plain JSON values."""


def known(home: Path, piece: Piece, parameters: Parameters) -> dict[str, Any] | None:
    """The facts of a piece made with these parameters, and its `seconds`; None when it is missing or made otherwise."""
    marker = _marker(home, piece)
    if not (marker.is_file() and (home / piece.output).is_file()):
        return None
    record = json.loads(marker.read_text(encoding="utf-8"))
    return record["facts"] if record["fingerprint"] == _fingerprint(parameters) else None


def make(home: Path, piece: Piece, parameters: Parameters, report: OnProgress) -> None:
    """Make a piece, whatever is there; a piece that was interrupted has no marker."""
    marker = _marker(home, piece)
    marker.unlink(missing_ok=True)
    started = time.monotonic()
    facts = piece.make(home, parameters, report)
    facts["seconds"] = round(time.monotonic() - started, 1)
    marker.write_text(json.dumps({"fingerprint": _fingerprint(parameters), "facts": facts}), encoding="utf-8")


def make_side_by_side(home: Path, pieces: Sequence[Piece], parameters: Parameters, report: OnProgress) -> None:
    """Make pieces at the same time, each in a process of its own; the first failure is raised when all have ended."""
    # Not forked: a copy of a process that runs threads can deadlock.
    context = multiprocessing.get_context("spawn")
    # A simple queue: what a child has put is there before its result is.
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(len(pieces), mp_context=context, initializer=_attach, initargs=(queue,)) as pool:
        futures: list[Future[None]] = [pool.submit(_make_in_child, home, piece, parameters) for piece in pieces]
        while True:
            has_ended = all(future.done() for future in futures)
            while not queue.empty():
                report(*queue.get())
            if has_ended:
                break
            time.sleep(0.1)
        for future in futures:
            future.result()


_line_to_parent: Any = None


def _attach(queue: Any) -> None:
    global _line_to_parent
    _line_to_parent = queue


def _make_in_child(home: Path, piece: Piece, parameters: Parameters) -> None:
    def report(task: str, done: int, total: int) -> None:
        if done == total or done % -(-total // NUM_REPORTS) == 0:
            _line_to_parent.put((task, done, total))

    make(home, piece, parameters, report)


def _marker(home: Path, piece: Piece) -> Path:
    return home / f"{piece.name}.made.json"


def _fingerprint(parameters: Parameters) -> str:
    return blake2b(json.dumps(dict(parameters), sort_keys=True).encode("utf-8"), digest_size=8).hexdigest()
