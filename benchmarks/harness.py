"""Side by side: the same work by two sides in turn, in one process, equality first, medians and raw repeats kept.

    python benchmarks/<name>.py [--device cuda] [--repeats 5] [--write] [--quick]

`--write` keeps the result as `benchmarks/results/<name>_<hardware>_<date>.json`, from which `table.py` makes the table
of the README. `--quick` is for CI: a tiny size, equality and exact counters, no clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True)
class Timing:
    """Repeats of one side."""

    wall: list[float]
    """Seconds, one per repeat."""
    cpu: list[float]
    """Seconds of this process on all its threads, one per repeat."""

    @property
    def median(self) -> float:
        """Of the wall seconds."""
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Largest wall time over the smallest."""
        return max(self.wall) / min(self.wall)


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Run the sides A → B → A → B … after one warm-up each; seconds by side.

    Args:
        sides: what is timed, by name.
        repeats: of each side.
    """
    for side in sides.values():
        side()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started, busy = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - busy)
    return {name: Timing(wall[name], cpu[name]) for name in sides}


def arguments(description: str | None, **more: Any) -> argparse.Namespace:
    """The command line that every benchmark shares; `more` are further options with their defaults."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the result file")
    parser.add_argument("--quick", action="store_true", help="tiny, equality and counters only, no times")
    parser.add_argument("--data", default="", help="folder of public samples; default: the repository's own, made anew")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=type(default))
    return parser.parse_args()


def surroundings(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a number must be read with: versions, cores, load, day."""
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
    }


def hardware(device: str) -> str:
    """A short name for file names: the GPU's, or the number of CPU cores."""
    if device == "cpu":
        return f"{os.cpu_count()}cpu"
    import torch

    return torch.cuda.get_device_name().lower().replace(" ", "-")


def keep(name: str, device: str, result: Mapping[str, Any]) -> Path:
    """Write a result file; returns where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{hardware(device)}_{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def row(name: str, ours: Timing, peer: Timing, goal: str) -> dict[str, Any]:
    """One line of a table: both medians, their ratio, spreads."""
    return {
        "case": name,
        "ours_s": ours.median,
        "peer_s": peer.median,
        "ratio": peer.median / ours.median,
        "spread": [ours.spread, peer.spread],
        "goal": goal,
        "raw": {"ours": ours.wall, "peer": peer.wall, "ours_cpu": ours.cpu, "peer_cpu": peer.cpu},
    }


def claim(what: str, measured: float, unit: str, goal: str) -> dict[str, Any]:
    """One line of the README's table: what was measured, and whether it reaches the goal, `≥ x` or `≤ x`."""
    sign, number = goal.split()
    is_met = measured >= float(number) if sign == "≥" else measured <= float(number)
    return {"what": what, "measured": measured, "unit": unit, "goal": goal, "is_met": is_met}


def finish(
    name: str,
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    claims: Sequence[Mapping[str, Any]],
    packages: Sequence[str] = (),
    **more: Any,
) -> None:
    """Print a benchmark's table, its claims and where it was made; keep all of it if asked.

    Args:
        name: of the script.
        options: its command line.
        rows: of the table, with raw repeats.
        columns: of the table that are printed.
        claims: of `claim`.
        packages: whose versions matter besides `PACKAGES`.
        **more: kept with the result.
    """
    where = surroundings(packages)
    show(name, rows, columns)
    if claims:
        show("claims", claims, ("what", "measured", "unit", "goal", "is_met"))
    print(where)
    if options.write:
        result = {"surroundings": where, "options": vars(options), "claims": claims, "rows": rows, **more}
        print(keep(name, options.device, result))


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a plain table."""
    cells = [[_text(one.get(column)) for column in columns] for one in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(title)
    for line in (list(columns), *cells):
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths)))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
