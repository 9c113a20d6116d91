"""Committed scores, of metrics and of rules alike: their tables, what rides in their ledgers, their reports."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.numbers.moments import Covariation, Moments, merge_covariations, merge_moments
from prefsel.rules import Label
from prefsel.schema import SCORES
from prefsel.select.fences import Bounds, fences
from prefsel.select.radix import Histogram, stratum_histograms
from prefsel.select.table import strata
from prefsel.workspace.catalog import Catalog
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage


def score_table(
    like: Mapping[str, pa.ChunkedArray | pa.Array], score_N: np.ndarray, dropped: pa.ChunkedArray | pa.Array
) -> pa.Table:
    """A shard of scores, schema `SCORES`.

    Args:
        like: pair_id, source and aspect of the pairs.
        score_N: float64, NaN for pairs without a score.
        dropped: text, why a pair cannot be selected; null where it can.
    """
    return pa.table(
        {
            "pair_id": like["pair_id"],
            "score": pa.array(score_N, from_pandas=True),
            "dropped": _encoded(dropped, "dropped"),
            "source": _encoded(like["source"], "source"),
            "aspect": _encoded(like["aspect"], "aspect"),
        },
        schema=SCORES,
    )


def _encoded(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.string()).dictionary_encode().cast(SCORES.field(name).type)


def shard_info(table: pa.Table, lengths: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What rides in the ledger: drops, histograms by (source, aspect), moments of the score, lengths.

    Args:
        table: schema `SCORES`.
        lengths: of the chosen and rejected completion of each pair, NaN where unknown.
    """
    row_M = np.flatnonzero(pc.is_null(table["dropped"]).to_numpy())
    scored = table.take(pa.array(row_M))
    score_M = scored["score"].to_numpy()
    codes, labels = strata([scored["source"], scored["aspect"]])
    histograms = stratum_histograms(score_M, codes, len(labels))
    chosen_M, rejected_M = (length_N[row_M] for length_N in lengths)
    known = np.isfinite(chosen_M) & np.isfinite(rejected_M)
    difference = (chosen_M - rejected_M)[known]
    return {
        "dropped": merge_counts({reason: 1} for reason in table["dropped"].to_pylist() if reason),
        "histograms": [
            {"source": source, "aspect": aspect, **histogram.to_text(), "fences": fences(score_M[codes == code])}
            | {"rows": histogram.total}
            for code, ((source, aspect), histogram) in enumerate(zip(labels, histograms))
        ],
        "moments": asdict(Moments.of(score_M)) if len(score_M) else None,
        "length": asdict(Covariation.of(difference, score_M[known])) if known.any() else None,
        "length_sums": [int(known.sum()), float(chosen_M[known].sum()), float(rejected_M[known].sum())],
    }


class CorpusHistograms(Mapping[Label, Histogram]):
    """The committed histograms, added up by stratum when one is asked for: where fences do, none is."""

    def __init__(self, entries: Iterable[Entry], by: tuple[str, ...]) -> None:
        self._rows = _by_label(entries, by) or {(): []}
        self._added: dict[Label, Histogram] = {}

    def __getitem__(self, label: Label) -> Histogram:
        if label not in self._added:
            self._added[label] = Histogram.merge(Histogram.from_text(row) for row in self._rows[label])
        return self._added[label]

    def __iter__(self) -> Iterator[Label]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def corpus_bounds(entries: Iterable[Entry], by: tuple[str, ...]) -> dict[Label, Bounds]:
    """What the committed fences say, by stratum."""
    rows = _by_label(entries, by)
    return {label: Bounds.of([(row["rows"], row["fences"]) for row in many]) for label, many in rows.items()}


def _by_label(entries: Iterable[Entry], by: tuple[str, ...]) -> dict[Label, list[dict[str, Any]]]:
    """What the ledgers keep of every stratum of every shard, by label."""
    found: dict[Label, list[dict[str, Any]]] = {}
    for entry in entries:
        for row in entry.info["histograms"]:
            found.setdefault(tuple(row[name] for name in by), []).append(row)
    return found


def stratum_sizes(entry: Entry, by: tuple[str, ...]) -> dict[Label, int]:
    """Rows of one shard that have a score, by stratum."""
    sizes: dict[Label, int] = {}
    for row in entry.info["histograms"]:
        label = tuple(row[name] for name in by)
        sizes[label] = sizes.get(label, 0) + row["rows"]
    return sizes


def committed(storage: Storage, catalog: Catalog, folder: str, inputs: Mapping[str, str]) -> dict[str, Entry]:
    """Ledger entries of the shards that are scored from exactly `inputs` (shard key → hash), by shard key."""
    entries = {}
    for source, shards in catalog.sources_of().items():
        wanted = {shard.shard: inputs[shard.key] for shard in shards}
        done = Artifact(storage, f"{folder}/{source}").done(wanted)
        entries.update({f"{source}/{name}": entry for name, entry in done.items()})
    return entries


def score_report(
    entries: Sequence[Entry],
    *,
    stage: str,
    name: str,
    folder: str,
    computed: int,
    started: float,
    facts: Mapping[str, Any],
) -> StageReport:
    """The report of a score, from what its shards put into the ledger.

    Args:
        entries: of all shards, in corpus order.
        stage: `metric` or `fuse`.
        name: of the score.
        folder: where it lies.
        computed: shards this run computed.
        started: `time.monotonic()` when the work began.
        facts: `kind`, `params`, `fitted` and `length_unit`.
    """
    infos = [entry.info for entry in entries]
    rows_in = sum(entry.rows for entry in entries)
    dropped = merge_counts(info["dropped"] for info in infos)
    moments = merge_moments(Moments(**info["moments"]) for info in infos if info["moments"])
    details = {
        **facts,
        "moments": {"mean": moments.mean, "std": moments.std, "min": moments.low, "max": moments.high}
        if moments.count
        else None,
        "histogram": Histogram.merge(
            Histogram.from_text(row) for info in infos for row in info["histograms"]
        ).to_json(),
        "length_correlation": correlation(info["length"] for info in infos if info["length"]),
        "length": {"all": mean_lengths([info["length_sums"] for info in infos])},
        "strata": merge_counts(
            {
                f"{row['source']} / {row['aspect']}" if row["aspect"] else row["source"]: row["rows"]
                for row in info["histograms"]
            }
            for info in infos
        ),
    }
    return StageReport(
        stage=stage,
        name=name,
        unit="pairs",
        rows_in=rows_in,
        rows_out=rows_in - sum(dropped.values()),
        dropped=dropped,
        shards=len(entries),
        computed_shards=computed,
        seconds=time.monotonic() - started,
        artifact=folder,
        fingerprint=folder.rsplit("@", 1)[1],
        details=details,
    )


def correlation(parts: Iterable[Mapping[str, Any]]) -> float | None:
    """Pearson correlation of the score with the length difference chosen − rejected; None when one is constant."""
    both = merge_covariations(
        Covariation(Moments(**part["x"]), Moments(**part["y"]), part["product"]) for part in parts
    )
    scale = both.x.m2 * both.y.m2
    return both.product / math.sqrt(scale) if scale > 0 else None


def mean_lengths(sums: list[list[float]]) -> dict[str, float | None]:
    """Mean lengths from (count, chosen, rejected) sums."""
    count, chosen, rejected = (sum(row[i] for row in sums) for i in range(3))
    if not count:
        return {"chosen": None, "rejected": None, "difference": None}
    return {"chosen": chosen / count, "rejected": rejected / count, "difference": (chosen - rejected) / count}
