"""Every rule keeps the pairs it kept, writes the rows it wrote, and every score it reads is what it was.

One run of the real pipeline over four shards of two sources with ties, an offset and missing numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpora
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import select_all
from golden import Golden, digest, table_digest

TIED, OFFSET, WIDE, GAPS = (f"score_{name}" for name in corpora.SCORES)
BANDS = [{"kind": "band", "score": score, "low": 10, "high": 80} for score in (OFFSET, GAPS)]
RANK = {"kind": "fuse", "scores": [OFFSET, WIDE], "how": "rank", "weights": [1.0, 0.5], "ratio": 0.4}
ZSCORE = {"kind": "fuse", "scores": [TIED, OFFSET, GAPS], "how": "zscore", "count": 31}
HALF = {"kind": "top", "score": TIED, "ratio": 0.5}
RULES: dict[str, dict[str, Any]] = {
    "top-ratio": {"kind": "top", "score": WIDE, "ratio": 0.3},
    "top-count": {"kind": "top", "score": OFFSET, "count": 37},
    "top-ties": {"kind": "top", "score": TIED, "ratio": 0.3},
    "top-gaps": {"kind": "top", "score": GAPS, "ratio": 0.45},
    "top-last": {"kind": "top", "score": TIED, "count": 40, "reverse": True},
    "top-all": {"kind": "top", "score": OFFSET, "ratio": 1.0},
    "above": {"kind": "above", "score": GAPS, "threshold": 1.0},
    "above-not": {"kind": "above", "score": TIED, "threshold": 0.0, "reverse": True},
    "band": {"kind": "band", "score": OFFSET, "low": 35, "high": 65},
    "band-ties": {"kind": "band", "score": TIED, "low": 20, "high": 90},
    "band-outside": {"kind": "band", "score": WIDE, "low": 12.5, "high": 77.7, "reverse": True},
    "quota-source": {"kind": "quota", "score": WIDE, "by": "source", "ratio": 0.25},
    "quota-aspect": {"kind": "quota", "score": TIED, "by": "aspect", "count": 41},
    "quota-length": {"kind": "quota", "score": GAPS, "by": "length_bin", "ratio": 0.3},
    "quota-both": {"kind": "quota", "score": TIED, "by": ["source", "aspect"], "ratio": 0.35},
    "quota-last": {
        **{"kind": "quota", "score": OFFSET, "by": ["source", "length_bin"], "length_bins": 3},
        **{"ratio": 0.4, "reverse": True},
    },
    "zscore": ZSCORE,
    "zscore-by": {**ZSCORE, "by": "aspect", "weights": [1.0, -2.0, 0.5]},
    "rank": RANK,
    "rank-by": {**RANK, "by": ["length_bin"], "length_bins": 2, "reverse": True},
    "both": {"kind": "intersect", "rules": BANDS},
    "either-not": {"kind": "intersect", "rules": [BANDS[0], HALF], "reverse": True},
    "middle": {"kind": "intersect", "rules": BANDS, "budget": {"ratio": 0.3}},
    "middle-not": {"kind": "intersect", "rules": BANDS, "budget": {"count": 50}, "reverse": True},
    "prompt-once": {"kind": "dedupe", "by": "prompt", "rule": HALF},
    "prompt-last": {"kind": "dedupe", "by": "prompt", "rule": {**HALF, "score": GAPS, "reverse": True}},
    "pair-once": {"kind": "dedupe", "by": "pair", "rule": RANK},
    "deep": {"kind": "intersect", "rules": [{"kind": "dedupe", "by": "prompt", "rule": HALF}, {**RANK, "ratio": 0.9}]},
    "drawn": {"kind": "random", "scores": [GAPS], "ratio": 0.25, "seed": 3},
    "random-metric": {"kind": "top", "score": "score_random", "ratio": 0.5},
    "divergence": {"kind": "top", "score": "score_divergence", "ratio": 0.3},
}
"""Of every kind, with every option that decides which pairs are kept."""
CONTROLLED = ("top-ties", "top-gaps", "above", "band", "quota-both", "zscore-by", "rank", "both", "middle", "pair-once")
NAMES = [*RULES, *(f"{name}-{control}" for name in CONTROLLED for control in ("random", "reverse"))]
METRICS: dict[str, dict[str, Any]] = {
    **{name: {"metric": "explicit_margin", "params": {"rm": name}} for name in corpora.SCORES},
    "random": {"metric": "random", "params": {"seed": 11}},
    "divergence": {
        "metric": "preference_divergence",
        "params": {"aspects": list(corpora.RATINGS), "source": "ratings"},
    },
    "divergence-all": {
        "metric": "preference_divergence",
        "params": {"aspects": list(corpora.RATINGS), "source": "ratings", "own_aspect": None},
    },
    "map-mean": {"metric": "data_map", "params": {"rm": "offset", "axis": "mean"}},
    "map-variance": {"metric": "data_map", "params": {"rm": "wide", "axis": "variance"}},
}


def table(home: Path) -> dict[str, Any]:
    selections = [{"name": name, "rule": rule} for name, rule in RULES.items()]
    for one in selections:
        one["controls"] = ["random", "reverse"] if one["name"] in CONTROLLED else []
    numbers = [{"kind": "imported", "name": name, "field": name} for name in corpora.SCORES]
    ratings = {"kind": "imported", "name": "ratings", "field": list(corpora.RATINGS), "as": "ratings"}
    policy = corpora.pretrained(home / "policy", ["LABEL_0"], max_length=1024)
    train = {"name": "never-run", "loss": "simpo", "simpo_gamma": 0.5, "selection": "all", "model": "policy"}
    return {
        "name": "rules",
        "sources": [
            {"name": name, "paths": [corpora.write_jsonl(home / f"{name}.jsonl", corpora.scored_pairs(name, number))]}
            for name, number in (("first", 22), ("second", 18))
        ],
        "ingest": {"rows_per_shard": 66},
        "split": {"holdout": 0.1},
        "duplicates": {"contradictions": "keep"},
        "models": [{"kind": "pretrained", "name": "policy", "path": policy}],
        "scorers": [*numbers, ratings],
        "metrics": [{"name": name, **metric} for name, metric in METRICS.items()],
        "selections": selections,
        # Makes the held-out pairs a dataset; nothing trains.
        "train": [{**train, "learning_rate": 1e-3}],
    }


class Workspace:
    """What a run left, read as anyone could: folders, Parquet files and JSON."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, name: str) -> Path:
        (found,) = self.root.glob(f"{kind}/{name}@*")
        return found

    def rows(self, kind: str, name: str) -> pa.Table:
        """All rows of an artifact of one folder per source, in the order of the catalog.

        Of scores the columns that were there when they were recorded: lengths came to stand beside them.
        """
        files = [self.folder(kind, name) / f"{source}/{shard}.parquet" for source, shard in self.shards()]
        columns = ["pair_id", "score", "dropped", "source", "aspect"] if kind == "scores" else None
        return pa.concat_tables(pq.read_table(file, columns=columns) for file in files)

    def shards(self) -> Iterator[tuple[str, str]]:
        for source in json.loads((self.root / "catalog.json").read_text())["sources"]:
            for file in source["files"]:
                yield from ((source["name"], shard) for shard in file["shards"])

    def dataset(self, name: str) -> dict[str, Any]:
        """How many files and rows, and the rows in their order with the schema."""
        folder = self.folder("datasets", name)
        files = sorted((folder / "data").glob("*.parquet"))
        rows = pa.concat_tables(pq.read_table(file) for file in files)
        return {"files": len(files), "rows": rows.num_rows, "values": table_digest(rows)}

    def dataset_columns(self, name: str) -> list[str]:
        (first, *_) = sorted((self.folder("datasets", name) / "data").glob("*.parquet"))
        return pq.read_schema(first).names

    def dataset_bytes(self, name: str) -> dict[str, str]:
        folder = self.folder("datasets", name)
        return {file.name: digest(file.read_bytes()) for file in sorted((folder / "data").glob("*.parquet"))}

    def summary(self, kind: str, name: str) -> dict[str, Any]:
        return json.loads((self.folder(kind, name) / "summary.json").read_text())


def without_ids(thresholds: dict[str, Any]) -> dict[str, Any]:
    """The scores of cuts. Where a tie is cut, any id between the last kept and the first left out does."""
    return {
        name: {"score": cut["score"], "is_tie": cut["pair_id"] is not None} if isinstance(cut, dict) else cut
        for name, cut in thresholds.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Workspace:
    home = tmp_path_factory.mktemp("rules")
    select_all(table(home), home / "w")
    return Workspace(home / "w")


def test_the_corpus_has_what_makes_selecting_hard(made: Workspace) -> None:
    assert len(list(made.shards())) == 4
    scores = {name: made.rows("scores", name)["score"] for name in corpora.SCORES}
    assert len(scores["tied"].unique()) == 12
    assert scores["gaps"].null_count > 2 * scores["offset"].null_count
    assert made.rows("scores", "tied")["aspect"].null_count


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_keeps_the_same_pairs_and_writes_the_same_rows(
    name: str, made: Workspace, golden: Callable[[str], Golden]
) -> None:
    summary, rows = made.summary("selections", name), made.rows("selections", name)
    details = summary["details"]
    found = {
        "kept": rows.num_rows,
        "dropped": summary["dropped"],
        "thresholds": without_ids(details["thresholds"]),
        "pair_ids": digest(sorted(rows["pair_id"].to_pylist())),
        **{column: digest(rows[column].to_pylist()) for column in rows.column_names if column != "pair_id"},
        "length_edges": details.get("length_edges"),
        "percentiles": details.get("percentiles"),
        "strata": details["strata"],
        "length": details["length"],
        "dataset": made.dataset(name),
    }
    golden("selections").check(name, found)


def test_the_held_out_pairs_are_the_same_rows(made: Workspace, golden: Callable[[str], Golden]) -> None:
    found = {**made.dataset("holdout"), "columns": made.dataset_columns("holdout")}
    golden("selections").check("holdout", found)


def test_dataset_files_are_the_same_bytes(made: Workspace, golden: Callable[[str], Golden]) -> None:
    """With the version of pyarrow they were recorded with; another one writes the same rows in other bytes."""
    recorded = golden("bytes").entry("pyarrow", pa.__version__)
    if pa.__version__ != recorded:
        pytest.skip(f"recorded with pyarrow {recorded}, this is {pa.__version__}")
    golden("bytes").check("datasets", {name: made.dataset_bytes(name) for name in (*NAMES, "holdout")})
    folders: dict[str, list[str]] = defaultdict(list)
    for kind in ("eligible", "columns", "scores", "selections", "datasets"):
        for folder in sorted((made.root / kind).iterdir()):
            folders[kind].append(folder.name)
    golden("bytes").check("folders", folders)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_the_same_scores(name: str, made: Workspace, golden: Callable[[str], Golden]) -> None:
    rows = made.rows("scores", name)
    found = {"rows": rows.num_rows, "dropped": made.summary("scores", name)["dropped"], "values": table_digest(rows)}
    golden("scores").check(name, found)


def test_derived_scores_are_the_same(made: Workspace, golden: Callable[[str], Golden]) -> None:
    """Fusions, draws and what a dedupe leaves: stored beside the scores of metrics, named after their selection."""
    names = sorted(folder.name.split("@")[0] for folder in (made.root / "scores").iterdir())
    derived = [name for name in names if name not in METRICS and not name.startswith("random-")]
    golden("scores").check("derived", {name: table_digest(made.rows("scores", name)) for name in derived})
