"""What a run says while it works: bars in a terminal, one plain line per interval in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

LOG_INTERVAL_S = 10.0


class Counter:
    """Advances one bar, or prints a line at most every `LOG_INTERVAL_S`."""

    def __init__(self, console: Console, label: str, total: int, unit: str, bars: Bars | None) -> None:
        self._console, self._label, self._total, self._unit, self._bars = console, label, total, unit, bars
        self._task = bars.add_task(label, total=total) if bars else None
        self._done, self._note = 0, ""
        self._last_s = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside them."""
        self._done, self._note = self._done + count, note
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, description=f"{self._label} {note}".rstrip())
        elif time.monotonic() - self._last_s >= LOG_INTERVAL_S:
            self._last_s = time.monotonic()
            self._console.print(f"  {self._label}: {self._done:,}/{self._total:,} {self._unit} {note}".rstrip())


class Progress:
    """The voice of a run. `quiet` says nothing at all."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    @contextmanager
    def track(self, label: str, total: int, unit: str = "shards") -> Iterator[Counter]:
        """Count towards `total` while the block runs."""
        if not self._console.is_terminal or self._console.quiet:
            yield Counter(self._console, label, total, unit, None)
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=self._console, transient=True) as bars:
            yield Counter(self._console, label, total, unit, bars)
