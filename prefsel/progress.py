"""What a run says while it works: bars in a terminal, plain lines at a fixed interval in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from prefsel.display import shown

LOG_INTERVAL_S = 30.0
"""A log gets a line this often, also when nothing advances: silence and a hang look alike."""


class Counter:
    """How far a piece of work is, in units; scoring adds tokens and how large each unit is."""

    def __init__(self, total: int, unit: str, note: str, total_size: float) -> None:
        self.total, self.unit, self.note = total, unit, note
        self.done, self.tokens = 0, 0
        self._size, self._total_size = 0.0, total_size or float(total)
        self._began_s = self._first_s = self._last_s = time.monotonic()
        self._first_size, self._first_tokens = 0.0, 0

    def advance(self, count: int = 1, note: str = "", *, tokens: int = 0, size: float | None = None) -> None:
        """Count finished units.

        Args:
            count: Units that are done now.
            note: What is shown beside the count from now on.
            tokens: Tokens in them.
            size: Their share of `total_size`; default: every unit is alike.
        """
        self._last_s = time.monotonic()
        if not self.done:  # until now models were loaded too, so speeds count from here
            self._first_s, self._first_size, self._first_tokens = self._last_s, size or count, tokens
        self.done, self.tokens, self.note = self.done + count, self.tokens + tokens, note
        self._size += count if size is None else size

    @property
    def share(self) -> float:
        """How much is done, by size, between 0 and 1."""
        return min(1.0, self._size / self._total_size) if self._total_size else 1.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began_s

    def remaining_s(self) -> float | None:
        """Seconds to the end, at the speed between the first unit and the last one; None before the second one."""
        size, seconds = self._size - self._first_size, self._last_s - self._first_s
        if size <= 0 or self.done >= self.total:
            return None
        return max(0.0, (self._total_size - self._size) * seconds / size - (time.monotonic() - self._last_s))

    def text(self) -> str:
        """Count, tokens and their speed, time left, note: what is known of them."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
            seconds = self._last_s - self._first_s
            if self.tokens > self._first_tokens and seconds > 0:
                parts.append(f"{(self.tokens - self._first_tokens) / seconds:,.0f} tokens/s")
        if (left := self.remaining_s()) is not None:
            parts.append(f"{clock(left)} left")
        return ", ".join([*parts, self.note] if self.note else parts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> clock(3723.4)
    '1:02:03'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Told(ProgressColumn):
    """What a counter says, and how long it has been at work."""

    def render(self, task: Task) -> Text:
        counter: Counter = task.fields["counter"]
        task.completed = counter.share
        return Text(f"{shown(counter.text())}  {clock(counter.elapsed_s)}")


class Progress:
    """The voice of a run. `quiet` says nothing at all."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._finished: list[str] = []
        self._committing: tuple[str, Counter] | None = None
        self._voices: list[Callable[[], str]] = []

    def line(self, text: str) -> None:
        """Print one line, whatever its text came from: what acts on a terminal as its escape, and no secrets."""
        self._console.print(shown(text), markup=False)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    def finished(self, label: str) -> None:
        """`label` is committed: an interruption will name it."""
        self._finished.append(label)

    def committed(self) -> str:
        """What an interrupted run does not have to do again, in one line."""
        parts = list(self._finished)
        if self._committing is not None:
            label, counter = self._committing
            parts.append(f"{label} {counter.done:,}/{counter.total:,} {counter.unit}")
        return ", ".join(parts) or "nothing new"

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Say that something takes a while, of which no part can be counted."""
        began = time.monotonic()
        if not self._console.is_terminal or self._console.quiet:
            self.line(f"{text} …")
            with self._beating(lambda: f"{text} … {clock(time.monotonic() - began)}"):
                yield
            return
        with Bars(
            SpinnerColumn(), TextColumn("{task.description} …", markup=False), console=self._console, transient=True
        ) as bars:
            bars.add_task(shown(text))
            yield

    @contextmanager
    def track(
        self,
        label: str,
        total: int,
        unit: str = "shards",
        *,
        note: str = "",
        total_size: float = 0.0,
        commits: bool = False,
    ) -> Iterator[Counter]:
        """Count towards `total` while the block runs.

        Args:
            label: What is done.
            total: Units to do.
            unit: What they are, in the plural.
            note: What is shown until the first of them is done.
            total_size: The sum of their sizes, where they differ much; the time left is estimated from it.
            commits: Whether a unit that is done is committed, so that an interrupted run keeps it.
        """
        counter = Counter(total, unit, note, total_size)
        before, self._committing = self._committing, (label, counter) if commits else None
        if not self._console.is_terminal or self._console.quiet:
            if note:
                self.line(f"  {label}: {counter.text()}")
            with self._beating(lambda: f"  {label}: {counter.text()}  {clock(counter.elapsed_s)}"):
                yield counter
        else:
            columns = (TextColumn("  {task.description}", markup=False), BarColumn(bar_width=20), _Told())
            with Bars(*columns, console=self._console, transient=True) as bars:
                bars.add_task(shown(label), total=1.0, counter=counter)
                yield counter
        self._committing = before

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """What a log hears of while the block runs and nothing inside it says more."""
        began = time.monotonic()
        if self._console.is_terminal or self._console.quiet:
            yield
            return
        with self._beating(lambda: f"  at {what}  {clock(time.monotonic() - began)}"):
            yield

    @contextmanager
    def _beating(self, told: Callable[[], str]) -> Iterator[None]:
        """Print what `told` returns every `LOG_INTERVAL_S` while the block runs; of nested blocks the inmost speaks."""
        if self._console.quiet:
            yield
            return
        is_over = threading.Event()
        self._voices.append(told)

        def beat() -> None:
            while not is_over.wait(LOG_INTERVAL_S):
                if self._voices[-1:] == [told]:
                    self.line(told())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self._voices.remove(told)
