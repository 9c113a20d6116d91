"""A refresh after some new rows, against the first run of the same configuration and a run from scratch on the union.

    python benchmarks/refresh_cost.py [--pairs 20000] [--imported-pairs 1000000] [--write]

Once two models, policy and reference, score every completion, and 5 % of the pairs are new; once scores come with the
rows, everything is arithmetic, and 1 % is new. Each run is the product's own command in a process of its own, and its
time is all of it: starting Python and Ray, and the report. The refresh must score exactly the completions of the new
rows, keep the pairs that a run from scratch keeps, and do nothing when it is asked again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow.parquet as pq
import yaml
from score_throughput import small_model

from prefsel.scratch.tokenizer import train_tokenizer
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

MODELS = ("policy", "reference")
WORDS = 15
"""Of a prompt and of a completion."""


def write_rows(path: Path, rng: np.random.Generator, vocabulary: np.ndarray, numbers: range) -> None:
    """Pairs with distinct prompts, and a score per side."""
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            words = vocabulary[rng.integers(0, len(vocabulary), 3 * WORDS)].reshape(3, WORDS)
            prompt, chosen, rejected = (" ".join(part) for part in words)
            scores = dict(zip(("q_chosen", "q_rejected"), rng.normal(size=2).tolist(), strict=True))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "chosen": chosen, "rejected": rejected} | scores))
            file.write("\n")


def write_config(folder: Path, vocabulary: np.ndarray, scores: str, args: Any) -> None:
    """The configuration, and the models it names."""
    table: dict[str, Any] = {
        "name": "refresh",
        "sources": [{"name": "generated", "paths": [str(folder / "*.jsonl")]}],
        "ingest": {"rows_per_shard": 10_000 if scores == "imported" else 250},
        "ray": {"num_cpus": 2, "object_store_gib": 0.5},
        "selections": [{"name": "best", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.3}}],
    }
    if scores == "imported":
        table["scorers"] = [{"kind": "imported", "name": "q", "field": "q"}]
        table["metrics"] = [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "q"}}]
    else:
        tokenizer = train_tokenizer([" ".join(vocabulary)], kind="bpe", vocab_size=args.vocab_size)
        for name in MODELS:
            small_model(tokenizer, args).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        table["models"] = [
            {"kind": "pretrained", "name": name, "path": str(folder / name), "dtype": "fp32"} for name in MODELS
        ]
        table["scorers"] = [{"kind": "causal_logps", "model": name} for name in MODELS]
        params = dict(zip(MODELS, MODELS, strict=True))
        table["metrics"] = [{"name": "margin", "metric": "implicit_margin", "params": params}]
    (folder / "config.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")


def prefsel(command: str, folder: Path, workspace: str) -> tuple[float, str]:
    """Seconds of the product's command, and what it printed."""
    line = "import sys; from prefsel.cli import main; sys.argv[0] = 'prefsel'; main()"
    words = [sys.executable, "-c", line, command, str(folder / "config.yaml"), "--workspace", str(folder / workspace)]
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"prefsel {command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def computed(folder: Path, workspace: str) -> int:
    """Completions whose numbers one column set has not taken over from another shard, as its ledger says."""
    storage = Storage(str(folder / workspace))
    name = storage.folders("columns")[0]
    parts = [Artifact(storage, f"columns/{name}/{source}") for source in storage.folders(f"columns/{name}")]
    entries = [entry for part in parts for entry in part.entries().values()]
    return sum(entry.info["completions"] - entry.info.get("carried", 0) for entry in entries)


def kept(folder: Path, workspace: str, text: str) -> list[str]:
    """The pair_ids that a run has kept, of the dataset that it named."""
    (name,) = {word for word in text.split() if word.startswith("datasets/best@")}
    files = sorted((folder / workspace / name).rglob("*.parquet"))
    return sorted(pair for file in files for pair in pq.read_table(file, columns=["pair_id"])["pair_id"].to_pylist())


def measure(scores: str, pairs: int, new: int, args: Any) -> dict[str, Any]:
    """First run, refresh, refresh without news and a run from scratch, compared."""
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, vocabulary, scores, args)
        write_rows(folder / "a.jsonl", rng, vocabulary, range(pairs))
        first, _ = prefsel("refresh", folder, "w")
        before = computed(folder, "w")
        write_rows(folder / "b.jsonl", rng, vocabulary, range(pairs, pairs + new))
        second, text = prefsel("refresh", folder, "w")
        scored = computed(folder, "w") - before
        nothing, said = prefsel("refresh", folder, "w")
        assert "nothing to do" in said.splitlines()[-2], said
        scratch, whole = prefsel("run", folder, "scratch")
        assert kept(folder, "w", text) == kept(folder, "scratch", whole), "the refresh keeps other pairs than a run"
    assert scored == 2 * new, f"{scored} completions were scored, not {2 * new}"
    row = {"case": scores, "pairs": pairs, "new": new, "scored": scored, "first_s": first, "refresh_s": second}
    return row | {"scratch_s": scratch, "nothing_new_s": nothing}


def main() -> None:
    args = harness.arguments(
        __doc__, pairs=20_000, imported_pairs=1_000_000, hidden_size=192, layers=4, vocab_size=1024, threads=1
    )
    if args.quick:
        args.pairs, args.imported_pairs, args.hidden_size, args.layers = 200, 1000, 64, 1
    cases = (("two models", args.pairs, 20, "≤ 15"), ("imported", args.imported_pairs, 100, "≤ 5"))
    rows, claims = [], []
    for scores, pairs, part, goal in cases[:1] if args.quick else cases:
        row = measure(scores, pairs, pairs // part, args)
        what = f"refresh, {scores}: {pairs:,} pairs and {row['new']:,} new, {row['scored']:,} completions scored"
        ratio = 100 * row["refresh_s"] / row["first_s"]
        claims.append(harness.claim(what, ratio, f"% of the {row['first_s']:.0f} s of the first run", goal))
        rows.append(row)
    if args.quick:
        (row,) = rows
        print(f"{row['new']} new pairs: {row['scored']} completions scored, and kept is what a new run keeps")
        return
    harness.finish("refresh_cost", args, rows, list(rows[0]), claims, ("ray",))


if __name__ == "__main__":
    main()
