"""The table of docs/performance.md, from the newest result file of each benchmark.

python benchmarks/table.py            # prints it
python benchmarks/table.py --write    # puts it into the page, between its two marks
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
    "ingest_scale",
    "generation",
)
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
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


def page() -> str:
    """The page with the table of today between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
