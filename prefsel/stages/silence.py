"""An actor that hangs ends itself, so that its pool answers as it does to one that died."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Mapping
from typing import Any


class EndedWhenSilent:
    """An actor of a pool that ends when none of the shards in its hand was begun or finished for some time.

    The clock is a thread of C code, which needs no lock of the interpreter: a kernel that never returns and a call that
    holds the lock are noticed as well as a request without an answer. Where every thread stood is written to the
    worker's log. A process that was stopped from outside has no running thread, and is not ended.
    """

    def __init__(self, actor: type, arguments: Mapping[str, Any], silence_s: float) -> None:
        """Begin as the actor begins.

        Args:
            actor: What is called with a batch of one shard.
            arguments: Of its constructor.
            silence_s: Seconds without a sign after which it ends, loading the models included.
        """
        self._actor = actor(**arguments)
        self._silence_s, self._in_hand, self._lock = silence_s, 0, threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As of the actor."""
        self._count(+1)
        try:
            return self._actor(batch)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        """Start the clock again, or stop it when the last shard has left."""
        with self._lock:
            self._in_hand += change
            if self._in_hand:
                faulthandler.dump_traceback_later(self._silence_s, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()
