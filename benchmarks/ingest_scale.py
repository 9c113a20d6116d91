"""Ingest of generated pairs: rows and megabytes a second, and memory that must not grow with the file.

    python benchmarks/ingest_scale.py [--rows 1e6] [--rows-per-shard 4096] [--repeats 5] [--write]

Files of 1e4 rows, ten times as many, and so on up to `--rows`, as JSONL. Each repeat is a fresh process that reads a
file, cuts it into windows and commits their tables to a workspace, without Ray. No peer does the same work, so the
counts are checked against what was generated: some rows are broken, some repeat an earlier one of their window.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import arguments, claim, finish
from score_shards import peak_mib

SMALLEST = 10_000
WORDS = 120
"""In a completion: with 40 in the prompt a row has about 2 KB, as in UltraFeedback."""
BROKEN_EVERY, REPEATED_EVERY = 1000, 100
"""One row of so many is not JSON, one of so many is the row before it once more."""


def write_pairs(path: Path, num_rows: int, rows_per_shard: int) -> dict[str, int]:
    """Write `num_rows` lines; what ingest must make of them."""
    rng = np.random.default_rng(num_rows)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 4096)])
    expected = {"rows": num_rows, "accepted": 0, "quarantined": 0, "duplicate": 0, "pairs": 0}
    line = ""
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            is_first = row % rows_per_shard == 0  # a row that repeats one of another window is no duplicate
            if row % BROKEN_EVERY == BROKEN_EVERY - 1:
                expected["quarantined"] += 1
                file.write('{"prompt": "cut off\n')
                continue
            if row % REPEATED_EVERY == REPEATED_EVERY // 2 and not is_first:
                expected["duplicate"] += 1
            else:
                word = vocabulary[rng.integers(0, len(vocabulary), 40 + 2 * WORDS)]
                parts = word[:40], word[40 : 40 + WORDS], word[40 + WORDS :]
                texts = (" ".join(part) for part in parts)
                line = json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n"
                expected["accepted"] += 1
                expected["pairs"] += 1
            file.write(line)
    return expected


def ingest(file: str, workspace: str, rows_per_shard: int) -> dict[str, Any]:
    """Bring one file into a workspace, as the task of the ingest stage does."""
    from prefsel.config import FormatOptions, Ingest
    from prefsel.ingest.readers import read_rows
    from prefsel.ingest.windows import ingest_windows
    from prefsel.workspace.ledger import Artifact
    from prefsel.workspace.storage import Storage

    storage = Storage(workspace)
    before = peak_mib()
    counts = dict.fromkeys(("rows", "accepted", "quarantined", "duplicate", "pairs"), 0)
    committing = 0.0
    started, busy = time.perf_counter(), time.process_time()
    rows = read_rows(file, max_row_bytes=int(Ingest().max_row_mib * 2**20))
    windows = ingest_windows(rows, file=file, format="auto", options=FormatOptions(), rows_per_shard=rows_per_shard)
    for number, window in enumerate(windows):
        named = [window.num_rows, window.num_accepted, window.num_quarantined, window.num_duplicate]
        for name, count in zip(counts, [*named, window.pairs.num_rows]):
            counts[name] += count
        begun = time.perf_counter()
        for kind in ("groups", "pairs", "quarantine"):
            artifact = Artifact(storage, f"{kind}/generated")
            shard = f"{window.digest[:16]}-{number:05d}"
            attempt = artifact.log_attempt(shard)
            artifact.commit(shard, getattr(window, kind), made_from=window.digest, attempt=attempt)
        committing += time.perf_counter() - begun
    return {
        "counts": counts,
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - busy,
        "commit_s": committing,
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def fresh(file: Path, expected: dict[str, int], rows_per_shard: int) -> dict[str, Any]:
    """`ingest` in a process of its own, checked."""
    with tempfile.TemporaryDirectory() as workspace:
        command = [sys.executable, __file__, "--file", str(file), "--workspace", workspace]
        command += ["--rows-per-shard", str(rows_per_shard)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(run.stdout)
    if result["counts"] != expected:
        raise SystemExit(f"{file.name}: ingested {result['counts']}, generated {expected}")
    return result


def line(file: Path, num_rows: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one size."""
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "counts"}
    mb = file.stat().st_size / 1e6
    return {
        "rows": num_rows,
        "mb": mb,
        "wall_s": median["wall_s"],
        "cpu_s": median["cpu_s"],
        "commit_share": median["commit_s"] / median["wall_s"],
        "rows_per_s": round(num_rows / median["wall_s"]),
        "mb_per_s": mb / median["wall_s"],
        "spread": max(run["wall_s"] for run in runs) / min(run["wall_s"] for run in runs),
        "before_mib": median["before_mib"],
        "peak_mib": max(run["peak_mib"] for run in runs),
    }


def main() -> None:
    options = arguments(__doc__, rows=1e6, rows_per_shard=4096, file="", workspace="")
    if options.file:  # the child of `fresh`
        print(json.dumps(ingest(options.file, options.workspace, options.rows_per_shard)))
        return
    if options.quick:
        options.rows, options.repeats = 2e4, 1
    sizes = [min(SMALLEST, int(options.rows))]
    while sizes[-1] < int(options.rows):
        sizes.append(min(10 * sizes[-1], int(options.rows)))
    with tempfile.TemporaryDirectory() as folder:
        files = {size: Path(folder, f"{size}.jsonl") for size in sizes}
        expected = {size: write_pairs(file, size, options.rows_per_shard) for size, file in files.items()}
        runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
        for _ in range(options.repeats):
            for size, file in files.items():
                runs[size].append(fresh(file, expected[size], options.rows_per_shard))
        lines = [line(files[size], size, runs[size]) for size in sizes]
    growth = lines[-1]["peak_mib"] / lines[0]["peak_mib"]
    what = f"ingest: peak memory at {sizes[-1]:,} rows over that at {sizes[0]:,} ({lines[-1]['rows_per_s']:,} rows/s)"
    if options.quick:
        print(f"{sizes[-1]:,} rows: every count is what was generated; peak memory {growth:.2f} of {sizes[0]:,} rows")
        return
    claims = [claim(what, growth, "×", "≤ 1.2")]
    raw = {str(size): runs[size] for size in sizes}
    finish("ingest_scale", options, lines, list(lines[0]), claims, raw=raw, memory_growth=growth)


if __name__ == "__main__":
    main()
