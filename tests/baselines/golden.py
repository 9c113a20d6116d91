"""Recorded numbers: what was found before is compared, never written, unless recording was asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

FOLDER = Path(__file__).parent / "golden"
RECORD = "python -m pytest tests/baselines --record-baselines"
SHOWN = 12


def digest(value: Any) -> str:
    """Hash of plain values, floats with all their bits (`repr` round-trips)."""
    text = json.dumps(value, sort_keys=True, default=lambda one: one.hex(), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def machine() -> dict[str, str]:
    """What decides how floating point is rounded, beyond IEEE: the version of torch, and the processor, by whose maker
    kernels are chosen even where the vectors are the same."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.split("+")[0], "capability": capability, "processor": _processor()}


def _processor() -> str:
    """The name of the processor; empty where the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def table_digest(table: pa.Table) -> str:
    """Hash of a table's schema and logical values in row order: the same for every Parquet writer."""
    columns = [(field.name, str(field.type), field.nullable) for field in table.schema]
    return digest([columns, *(table[name].to_pylist() for name in table.column_names)])


class Golden:
    """One file of recorded numbers: a table of entries."""

    def __init__(self, name: str, *, is_recording: bool) -> None:
        self.path = FOLDER / f"{name}.json"
        self.is_recording = is_recording

    def entry(self, key: str, found: Any) -> Any:
        """What was recorded as `key`; while recording, `found` itself, which is written."""
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if self.is_recording:
            known[key] = json.loads(json.dumps(found))  # as it will be read
            self.path.write_text(_json(known))
        elif key not in known:
            raise AssertionError(f"{self.path.name}: {key!r} was never recorded; {RECORD} records it")
        return known[key]

    def check(self, key: str, found: Any, *, rel: float = 0.0) -> None:
        """Compare with what was recorded; `rel` is how far floats may be apart.

        Raises:
            AssertionError: names every place that differs, what was recorded and what was found.
        """
        expected = self.entry(key, found)
        wrong = list(differences(expected, json.loads(json.dumps(found)), rel))
        if wrong:
            more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            lines = "\n  ".join([*wrong[:SHOWN], *more])
            raise AssertionError(f"{self.path.name}: {key} is not what was recorded:\n  {lines}")


def _json(entries: dict[str, Any]) -> str:
    """A line for every part of an entry, so that a change of the file reads as what changed."""
    lines = []
    for key, entry in sorted(entries.items()):
        parts = entry.items() if isinstance(entry, dict) else None
        inside = None if parts is None else ",\n".join(f"  {_line(name)}: {_line(part)}" for name, part in parts)
        lines.append(f" {_line(key)}: {_line(entry)}" if inside is None else f" {_line(key)}: {{\n{inside}\n }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def differences(expected: Any, found: Any, rel: float, place: str = "") -> Iterator[str]:
    """One line for every leaf that is missing, new or different."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys((*expected, *found)):
            below = f"{place} → {key}" if place else key
            if key not in found:
                yield f"{below}: recorded {expected[key]!r}, found nothing"
            elif key not in expected:
                yield f"{below}: recorded nothing, found {found[key]!r}"
            else:
                yield from differences(expected[key], found[key], rel, below)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found)):
            yield from differences(*pair, rel, f"{place}[{number}]")
    elif not _is_equal(expected, found, rel):
        yield f"{place}: recorded {expected!r}, found {found!r}"


def _is_equal(expected: Any, found: Any, rel: float) -> bool:
    if isinstance(expected, float) and isinstance(found, float | int):
        return math.isclose(expected, found, rel_tol=rel, abs_tol=0.0)
    return type(expected) is type(found) and expected == found
