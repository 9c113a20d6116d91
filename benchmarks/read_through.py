"""A selection written out as a dataset, or read through by its trainings: which costs less, for how many readings.

    python benchmarks/read_through.py [--rows 40000] [--ratio 0.3] [--repeats 5] [--write]

Generated pairs of 2 KB with imported scores; a top `--ratio` is kept, by the product's own stages on a Ray with one
CPU. Writing is what selecting with a dataset takes longer than without; reading is what one worker of a training does,
from the dataset's files or from the corpus through the selection, and must give the same rows.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import Timing, alternate, arguments, claim, finish

from prefsel.config.file import parse_config
from prefsel.pipeline import run
from prefsel.plan.columns import pair_reader
from prefsel.plan.nodes import make_plan
from prefsel.progress import Progress
from prefsel.stages.select import select
from prefsel.train.pair_source import TEXT, Dataset, SelectionPairs
from prefsel.workspace.storage import Storage

QUIET = Progress(quiet=True)
COLUMNS = [*TEXT, "score"]
WORDS = 120
"""In a completion; a third as many in the prompt."""


def configure(folder: Path, args: Any) -> Any:
    """Write the corpus; the configuration, whose selection writes its dataset."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 4096)])
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for score in rng.normal(size=args.rows):
            word = vocabulary[rng.integers(0, len(vocabulary), WORDS // 3 + 2 * WORDS)]
            texts = (word[: WORDS // 3], word[WORDS // 3 : -WORDS], word[-WORDS:])
            row: dict[str, Any] = dict(zip(("prompt", "chosen", "rejected"), (" ".join(text) for text in texts)))
            file.write(json.dumps(row | {"gold_chosen": score, "gold_rejected": 0.0}) + "\n")
    return parse_config(
        {
            "name": "read",
            "sources": [{"name": "generated", "paths": [str(folder / "pairs.jsonl")]}],
            "scorers": [{"kind": "imported", "name": "gold", "field": "gold"}],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
            "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": args.ratio}}],
            "ray": {"num_cpus": 1, "object_store_gib": 0.25},
        }
    )


def size_mb(folder: Path) -> float:
    """Of every data file under it."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 1e6


def main() -> None:
    args = arguments(__doc__, rows=40_000, ratio=0.3)
    if args.quick:
        args.rows = 500
    with tempfile.TemporaryDirectory() as name:
        folder, workspace = Path(name), Path(name, "w")
        always = configure(folder, args)
        run(always, str(workspace), QUIET, until="select")
        never = parse_config(
            always.model_dump(by_alias=True)
            | {"selections": [always.selections[0].model_dump() | {"dataset": "never"}]}
        )
        storage = Storage(str(workspace))
        plan = make_plan(always, storage)
        selection, dataset = plan.node("selection", "top").path, plan.node("dataset", "top").path
        assert dataset is not None
        reader = pair_reader(plan, [], lengths=False)
        through = SelectionPairs(reader, tuple(plan.catalog.shards), selection)

        def keep(config: Any) -> None:
            storage.delete_tree(selection)
            if config is always:
                storage.delete_tree(dataset)
            plan = make_plan(config, storage)
            select(plan, plan.node("selection", "top"), QUIET)

        def read(source: Dataset | SelectionPairs) -> pa.Table:
            return pa.concat_tables(table.select(COLUMNS) for table in source.tables(COLUMNS))

        keep(never)
        written = Dataset(storage, dataset)
        if not read(through).equals(read(written)):
            raise SystemExit("the rows read through the selection are not those of its dataset")
        kept = read(written).num_rows
        if args.quick:
            print(f"{kept} of {args.rows} rows, read through their selection: those of its dataset, in its order")
            return
        sides = {
            "select_never": lambda: keep(never),
            "select_always": lambda: keep(always),
            "through": lambda: read(through),
            "dataset": lambda: read(written),
        }
        taken = alternate(sides, args.repeats)
        row = facts(taken) | {
            "rows": args.rows,
            "kept": kept,
            "corpus_mb": size_mb(workspace / "groups") + size_mb(workspace / "pairs"),
            "dataset_mb": size_mb(workspace / dataset),
        }
    what = f"readings from which a written dataset costs less than reading through ({args.ratio:.0%} kept)"
    claims = [claim(what, row["break_even"], "readings", "≥ 1")]
    raw = {side: {"wall": timing.wall, "cpu": timing.cpu} for side, timing in taken.items()}
    finish("read_through", args, [row], list(row), claims, ("ray",), raw=raw)


def facts(taken: dict[str, Timing]) -> dict[str, Any]:
    """Seconds of writing and of one reading either way, and from how many readings on writing pays."""
    writing = taken["select_always"].median - taken["select_never"].median
    through, written = taken["through"].median, taken["dataset"].median
    return {
        "write_s": writing,
        "through_s": through,
        "dataset_s": written,
        "break_even": writing / (through - written) if through > written else float("inf"),
        "spread": max(timing.spread for timing in taken.values()),
    }


if __name__ == "__main__":
    main()
