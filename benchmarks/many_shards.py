"""A workspace of 100 000 shards before anything is computed: a command that has nothing to do, and `verify --quick`.

    python benchmarks/many_shards.py [--shards 100000] [--write]

A small corpus goes through the product's own run; then its corpus is made many times as long by further names for the
same shards: data files are links to the real ones, and everything that a later command reads, the catalog, the ledgers
and the summaries, holds all of them. Twenty artifacts, so two million entries. Each command is a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import harness
import yaml
from resume_cost import peak_mib

from prefsel.config.file import load_config
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.workspace.catalog import Catalog, read_catalog, write_catalog
from prefsel.workspace.documents import read_document, write_document
from prefsel.workspace.entries import COPIES, LEDGER, PIECE, PIECE_SHARDS, Entry, entries_of
from prefsel.workspace.manifest import load_summary, save_summary
from prefsel.workspace.storage import Storage

SOURCE = "generated"
REAL_SHARDS, ROWS = 50, 20
SIDES = ("chosen", "rejected")
RATINGS = ("a", "b", "c", "d")


def prepare(folder: Path) -> Path:
    """A corpus of few shards and a configuration with twenty artifacts of one entry per shard; where that is."""
    rows = [
        {"prompt": f"question {number}", "chosen": f"yes {number}", "rejected": f"no {number}"}
        | {f"{rating}_{side}": (number * 7 + place) % 31 for place, rating in enumerate(RATINGS) for side in SIDES}
        for number in range(REAL_SHARDS * ROWS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rule = {"kind": "top", "ratio": 0.3}
    table = {
        "name": "many",
        "sources": [{"name": SOURCE, "paths": [str(folder / "pairs.jsonl")]}],
        "ingest": {"rows_per_shard": ROWS},
        "scorers": [{"kind": "imported", "name": name, "field": name} for name in RATINGS],
        "metrics": [{"name": name, "metric": "explicit_margin", "params": {"rm": name}} for name in RATINGS],
        "selections": [
            {"name": f"{name}-{share}", "rule": {**rule, "score": f"score_{name}", "ratio": share}, "dataset": "never"}
            for name in RATINGS
            for share in (0.2, 0.4)
        ],
        "ray": {"num_cpus": 2, "object_store_gib": 0.25},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    return folder / "config.yaml"


def renamed(shard: str, number: int) -> str:
    """Another name of a shard, as long as its own; the 0th is its own."""
    return shard if not number else f"{number:08x}{shard[8:]}"


def lengthen(storage: Storage, config: Path, times: int) -> int:
    """Make the corpus and all that was made of it so many times as long; returns how many artifacts it has."""
    catalog = read_catalog(storage)
    nodes = all_nodes(make_plan(load_config(config, []), storage))
    old = {(node.kind, node.name): node.path for node in nodes}
    summaries = {path: load_summary(storage, path) for path in old.values()}
    for kind in ("groups", "pairs", "quarantine"):
        lengthen_ledger(storage, f"{kind}/{SOURCE}", times)
    for name in storage.files(f"groups/{SOURCE}/_files"):
        record = read_document(storage, name)
        rows = [row | {"shard": renamed(row["shard"], n)} for n in range(times) for row in record["shards"]]
        write_document(storage, name, record | {"shards": rows})
    ((source,),) = [[one] for one in catalog.sources]
    files = [replace(file, shards=[renamed(s, n) for n in range(times) for s in file.shards]) for file in source.files]
    write_catalog(storage, Catalog([replace(source, files=files)]))
    nodes = all_nodes(make_plan(load_config(config, []), storage))
    for node in nodes:
        was, path = old[node.kind, node.name], node.path
        entries = entries_of(storage, f"{was}/{SOURCE}")
        if was != path:
            storage.local(was).rename(storage.local(path))
        lengthen_ledger(storage, f"{path}/{SOURCE}", times, entries)
        if (summary := summaries[was]) is not None:
            report = replace(summary, artifact=path, shards=times * len(entries))
            save_summary(storage, report)
    storage.delete_tree("runs")  # the manifest of the shorter corpus names what is not there any more
    return 3 + len(nodes)


def lengthen_ledger(storage: Storage, path: str, times: int, entries: dict[str, Entry] | None = None) -> None:
    """Give every shard of an artifact further names: links to its data, and entries, folded as the product folds."""
    entries = entries_of(storage, path) if entries is None else entries
    ledger = storage.local(f"{path}/{LEDGER}")
    shutil.rmtree(ledger)
    rows = []
    for shard, entry in entries.items():
        data = storage.local(f"{path}/{shard}.parquet")
        for number in range(times):
            name = renamed(shard, number)
            rows.append(asdict(entry) | {"shard": name})
            if number:
                os.link(data, storage.local(f"{path}/{name}.parquet"))
    rows.sort(key=lambda row: row["shard"])
    for start in range(0, len(rows), PIECE_SHARDS):
        piece = rows[start : start + PIECE_SHARDS]
        for place in ("", f"{COPIES}/"):
            name = f"{path}/{LEDGER}/{place}{PIECE}{piece[0]['shard']}.json"
            write_document(storage, name, {"shards": piece})


def prefsel(*words: str) -> tuple[float, float, str]:
    """Seconds and MiB of the product's command, and what it printed."""
    line = "import sys; from prefsel.cli import main; sys.argv[0] = 'prefsel'; main()"
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", line, *words], stdout=subprocess.PIPE, text=True)
    peak, text = 0.0, []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: text.extend(process.stdout), daemon=True)
    reader.start()
    while process.poll() is None:
        peak = max(peak, peak_mib(process.pid))
        time.sleep(0.05)
    reader.join()
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"prefsel {words[0]}: exit {process.returncode}\n{''.join(text)}")
    return seconds, peak, "".join(text)


def main() -> None:
    args = harness.arguments(__doc__, shards=100_000)
    if args.quick:
        args.shards = 400
    times = args.shards // REAL_SHARDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, workspace = prepare(folder), str(folder / "w")
        prefsel("run", str(config), "--workspace", workspace)
        artifacts = lengthen(Storage(workspace), config, times)
        # Not `run`: the report of the longer corpus would be made, which reads all of it.
        no_op, no_op_mib, text = prefsel("select", str(config), "--workspace", workspace)
        assert "nothing to do: every artifact" in text, text
        quick, quick_mib, text = prefsel("verify", "--quick", "--workspace", workspace)
    shards = times * REAL_SHARDS
    row = {"shards": shards, "artifacts": artifacts, "no_op_s": no_op, "no_op_mib": no_op_mib}
    row |= {"verify_s": quick, "verify_mib": quick_mib}
    if args.quick:
        print(f"{shards} shards in {artifacts} artifacts: nothing to do, and nothing wrong")
        return
    what = f"{artifacts} artifacts of {shards:,} shards"
    claims = [
        harness.claim(f"nothing to do, {what}", no_op, "s", "≤ 60"),
        harness.claim(f"verify --quick, {what}", quick, "s", "≤ 60"),
        harness.claim("memory of the driver", max(no_op_mib, quick_mib), "MiB", "≤ 2048"),
    ]
    harness.finish("many_shards", args, [row], list(row), claims, ("ray",))


if __name__ == "__main__":
    main()
