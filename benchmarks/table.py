"""The tables of docs/performance.md and docs/selfplay.md, from the newest result file of each benchmark.

python benchmarks/table.py            # prints them
python benchmarks/table.py --write    # puts them into their pages, between two marks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS

SCRIPTS = (
    "score_throughput",
    "score_flops",
    "influence_cost",
    "select_scale",
    "select_quota",
    "train_step",
    "end_to_end",
    "read_through",
    "ray_overhead",
    "resume_cost",
    "refresh_cost",
    "many_shards",
    "ingest_scale",
    "generation",
)
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- benchmarks: written by benchmarks/table.py -->", "<!-- end of benchmarks -->"


def newest() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(script, hardware, result) of the newest file of each script and hardware; the name ends in the date."""
    for script in SCRIPTS:
        files = {path.stem.removeprefix(f"{script}_").rsplit("_", 1)[0]: path for path in sorted(files_of(script))}
        for hardware, path in files.items():
            yield script, hardware, json.loads(path.read_text(encoding="utf-8"))


def files_of(script: str) -> list[Path]:
    """Result files of a script, oldest first."""
    return sorted(RESULTS.glob(f"{script}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1])


def table() -> str:
    """The table in Markdown; a goal that was missed says so."""
    lines = ["| script | what | measured | goal | verdict |", "|---|---|---|---|---|"]
    for script, hardware, result in newest():
        on = f"[`{script}`](../benchmarks/{script}.py), {hardware}"
        for claim in result["claims"]:
            verdict = "" if claim["is_met"] else "**missed**"
            measured = f"{claim['measured']:.3g} {claim['unit']}"
            lines.append(f"| {on} | {claim['what']} | {measured} | {claim['goal']} | {verdict} |")
            on = ""
    return "\n".join(lines)


ROUNDS = {
    "gold": "gold, gained",
    "gold over random": "gold over `random`",
    "overall": "judge, gained",
    "kl": "KL per answer, nats",
    "tokens": "tokens",
}
"""Numbers of `selfplay_rounds` and what their columns are called."""


def rounds() -> str:
    """What self-play did in the generated world, a row per arm and round, means and intervals over seeds."""
    *_, newest_file = files_of("selfplay_rounds")
    result = json.loads(newest_file.read_text(encoding="utf-8"))
    lines = [" | ".join(["| arm", "round", "pairs", *ROUNDS.values()]) + " |", "|---" * (3 + len(ROUNDS)) + "|"]
    for name, numbers in result["models"].items():
        arm, _, number = name.rpartition("-")
        shown = [with_interval(numbers.get(key), signed=key not in ("kl", "tokens")) for key in ROUNDS]
        lines.append(" | ".join([f"| `{arm}`", number, f"{result['cost'][name]['pairs']:.0f}", *shown]) + " |")
    return "\n".join(lines)


def with_interval(found: dict[str, float] | None, *, signed: bool) -> str:
    """A mean and its interval, with a sign where `signed`; empty where there is none."""
    if found is None:
        return ""
    sign = "+" if signed else ""
    around = f" ({found['low']:{sign}.2f} to {found['high']:{sign}.2f})" if "low" in found else ""
    return f"{found['mean']:{sign}.2f}{around}"


TABLES = {"performance.md": table, "selfplay.md": rounds}
"""Page → what stands between its marks."""


def page(name: str) -> str:
    """A page with the table of today between its marks."""
    text = (DOCS / name).read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{TABLES[name]()}\n\n{END}{after}"


def main() -> None:
    for name, made in TABLES.items():
        if "--write" in sys.argv[1:]:
            (DOCS / name).write_text(page(name), encoding="utf-8")
        else:
            print(made())


if __name__ == "__main__":
    main()
