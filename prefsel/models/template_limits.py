"""A chat template is a program of somebody else: how long it may run, and how much memory it may take.

    once per template    a process with limits renders two conversations ─▶ it ends, or the template is refused
    every rendering      a thread looks at the clock and ends it          ─▶ an error of that conversation

Jinja's sandbox keeps a template from files and code, not from `{% for i in range(99999) %}` ten deep or `'x' * 10**10`.
The process catches what hangs or eats memory whatever the conversation is, in C code too. The clock catches loops that
some conversations alone make long; it cannot interrupt a single operation in C.

This file is also the program of that process, so it imports nothing of this package at its top: it must start quickly.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess  # nosec B404 # of this very file, by a list of arguments
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

CPU_S, WALL_S = 5, 60
"""Of the process, its start (0.2 s) included."""
MEMORY_MIB = 1024
"""Address space of the process; Python and Jinja take 60."""
MAX_WRITTEN = 4 << 20
"""Characters that a template may write of the conversations of the process, which have 40 000."""
RENDER_S = 20.0
"""Of one rendering; real ones take below a millisecond."""
TOLD = {"time": f"over {CPU_S} s", "memory": f"over {MEMORY_MIB} MiB", "length": f"over {MAX_WRITTEN:,} characters"}

Result = TypeVar("Result")


def conversations() -> list[list[dict[str, str]]]:
    """What the process renders: a short conversation, and one of 32 turns of 1 250 characters."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": "some words "[:11] * 114} for n in range(32)]
    return [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], turns]


@lru_cache(maxsize=64)
def excess(template: str, before: str = "") -> str:
    """What a template takes too much of, in words; empty: nothing, or it ends with an error of its own.

    Args:
        template: Jinja source.
        before: Jinja source that stands before it.
    """
    asked = json.dumps({"template": before + template, "conversations": conversations()})
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=WALL_S)  # nosec B603
    except subprocess.TimeoutExpired:
        return TOLD["time"]
    if done.returncode < 0:  # ended by the kernel: of its CPU time, or where memory ran out
        return TOLD["time"] if -done.returncode in (9, 24) else TOLD["memory"]
    return TOLD.get(done.stdout.strip(), "")


class _TimeIsUp(BaseException):
    """Raised within a rendering by the thread that looks at the clock; no `except Exception` catches it."""


class TooSlow(Exception):
    """A rendering took longer than it may."""


class _Clock:
    """One thread for all renderings of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def start(self, seconds: float) -> None:
        with self._lock:
            self._ends[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # a fork leaves threads behind
                self._thread = threading.Thread(target=self._look, name="template-clock", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        with self._lock:
            if self._ends.pop(threading.get_ident(), None) is None:  # it was raised, and may be on its way still
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)

    def _look(self) -> None:
        while True:
            time.sleep(0.25)
            with self._lock:
                now = time.monotonic()
                for thread in [thread for thread, end in self._ends.items() if end < now]:
                    del self._ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))


_CLOCK = _Clock()


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns, where it returns in time. It costs a microsecond.

    Raises:
        TooSlow: It did not, and was ended.
    """
    try:
        _CLOCK.start(seconds)
        try:
            return call()
        finally:
            _CLOCK.stop()
    except _TimeIsUp:
        raise TooSlow(f"it was ended after {seconds:.0f} s") from None


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, in what decides how long a template runs."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise ValueError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, *_, indent=None, **__: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return made


def _main() -> None:
    """Render what stdin asks for under the limits; say what was too much."""
    asked = json.load(sys.stdin)
    template = None
    # Jinja is imported before: its own memory is not the template's.
    environment = _environment()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, MEMORY_MIB << 20))
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<s>")
    try:
        template = environment.from_string(asked["template"])
        for messages in asked["conversations"]:
            for is_open in (False, True):
                written = 0
                for piece in template.generate(messages=messages, add_generation_prompt=is_open, tools=None, **tokens):
                    written += len(piece)
                    if written > MAX_WRITTEN:
                        print("length")
                        return
    except MemoryError:
        print("memory")
    except Exception:  # noqa: BLE001  # what a template raises is told where the tokenizer renders it
        return


if __name__ == "__main__":
    _main()
