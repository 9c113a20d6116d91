"""Completion columns → committed pair scores: rounds of statistics over shards, then one pass that scores and commits.

shards ──partials──▶ fit (driver) ──fitted numbers──▶ shards: score, commit with histograms by (source, aspect)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError, NonFiniteError
from prefsel.lineage import Lineage
from prefsel.metrics.moments import Covariation, Moments, merge_covariations, merge_moments
from prefsel.metrics.reader import PairReader
from prefsel.metrics.statistics import Fitted, Request, fit, reply
from prefsel.metrics.table import complete, find_metric, read_columns, score_pairs
from prefsel.progress import Progress
from prefsel.schema import SCORES
from prefsel.select.radix import Histogram, stratum_histograms
from prefsel.select.table import strata
from prefsel.tasks import over_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex


@dataclass(frozen=True)
class Scoring:
    """What a task needs to score a shard; pickles small."""

    name: str
    metric: str
    params: Mapping[str, Any]
    reader: PairReader
    folder: str
    population: str | None = None
    """Scores whose pairs this metric, a control, draws from; None: all eligible pairs."""

    def flat(self, shard: ShardRef) -> pa.Table:
        """The shard's pairs; of a control those that its selector dropped are dropped for the same reason."""
        flat = self.reader.flat(shard)
        if self.population is None:
            return flat
        scores = Artifact(self.reader.storage, f"{self.population}/{shard.source}").read(shard.shard)
        if not scores["pair_id"].combine_chunks().equals(flat["pair_id"].combine_chunks()):
            raise IntegrityError(f"{self.population}/{shard.key}: its pair_ids are not those of pairs/{shard.key}")
        return flat.drop_columns("dropped").append_column("dropped", scores["dropped"].cast(pa.string()))


def score_metrics(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Score every eligible pair by every configured metric."""
    return [score_metric(lineage, name, progress) for name in lineage.metrics]


def score_metric(lineage: Lineage, name: str, progress: Progress) -> StageReport:
    """Fit and commit one metric.

    Raises:
        UserError: a statistic cannot be computed (no rows, zero variance, a quantile of 0).
        NonFiniteError: a NaN or infinity in a column; names column, shard and first pair_ids.
    """
    started = time.monotonic()
    folder = lineage.scores_folder(name)
    if (done := load_summary(lineage.storage, folder)) is not None:
        return done
    spec = lineage.metrics[name]
    metric, params = find_metric(spec.metric, spec.params)
    reader = lineage.reader(lineage.metric_columns(name), field=f"metrics.{name}")
    base = lineage.controls.get(name)
    population = lineage.scores_folder(base) if base else None
    scoring = Scoring(name, spec.metric, spec.params, reader, folder, population)
    shards = lineage.catalog.shards

    def ask(request: Request) -> list[Any]:
        return over_shards(_reply_shard, shards, shared=(scoring, request))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told below, and kept for the report
        fitted = fit(metric, params, ask)
    told = metric.warnings(params, fitted)
    for text in told:
        progress.line(f"metric    {name}: warning: {text}")
    inputs = shard_inputs(lineage, fitted)
    entries = committed(lineage, folder, inputs)
    pending = [shard for shard in shards if shard.key not in entries]
    with progress.track(f"metric {name}", len(pending)) as counter:
        items = [(shard, inputs[shard.key]) for shard in pending]
        over_shards(_commit_shard, items, shared=(scoring, fitted), counter=counter)
    entries = committed(lineage, folder, inputs)
    report = summarise(scoring, fitted, [entries[shard.key] for shard in shards], len(pending), started)
    report.details["warnings"] = list(told)
    save_summary(lineage.storage, report)
    return report


def shard_inputs(lineage: Lineage, fitted: Fitted) -> dict[str, str]:
    """What each shard's scores are made from: its pairs and the numbers of the corpus. (Columns are in the recipe.)"""
    pairs = lineage.catalog.entries(lineage.storage, "pairs")
    numbers = hash_hex(repr(sorted((name, sorted(values.items())) for name, values in fitted.items())))
    return {key: hash_hex(entry.content, numbers) for key, entry in pairs.items()}


def committed(lineage: Lineage, folder: str, inputs: Mapping[str, str]) -> dict[str, Entry]:
    """Ledger entries of the shards that are scored, by shard key."""
    entries = {}
    for source, shards in lineage.catalog.sources_of().items():
        wanted = {shard.shard: inputs[shard.key] for shard in shards}
        done = Artifact(lineage.storage, f"{folder}/{source}").done(wanted)
        entries.update({f"{source}/{name}": entry for name, entry in done.items()})
    return entries


def _reply_shard(shard: ShardRef, shared: Any) -> Any:
    scoring, request = shared
    metric, params = find_metric(scoring.metric, scoring.params)
    flat = scoring.flat(shard)
    eligible = flat.filter(pc.is_null(flat["dropped"]))
    return reply(metric, params, complete(metric, params, _columns(shard, eligible, metric, params)), request)


def _columns(shard: ShardRef, flat: pa.Table, metric: Any, params: Any) -> dict[str, np.ndarray]:
    try:
        return read_columns(flat, metric, params)
    except NonFiniteError as error:
        raise NonFiniteError(f"metric {metric.name}, shard {shard.key}: {error}") from None


def _commit_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (scoring, fitted) = item, shared
    metric, params = find_metric(scoring.metric, scoring.params)
    artifact = Artifact(scoring.reader.storage, f"{scoring.folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    flat = scoring.flat(shard)
    row_M = np.flatnonzero(pc.is_null(flat["dropped"]).to_numpy())
    found = score_pairs(metric, params, _columns(shard, flat.take(pa.array(row_M)), metric, params), fitted)
    score_N = np.full(flat.num_rows, np.nan)
    score_N[row_M] = found.score_N
    dropped = np.array(flat["dropped"].to_pylist(), object)
    is_missing_M = found.missing_N >= 0
    dropped[row_M[is_missing_M]] = [f"missing_{found.names[place]}" for place in found.missing_N[is_missing_M]]
    table = pa.table(
        {
            "pair_id": flat["pair_id"],
            "score": pa.array(score_N, from_pandas=True),
            "dropped": pa.array(dropped, pa.string()).dictionary_encode().cast(SCORES.field("dropped").type),
            "source": flat["source"].combine_chunks().dictionary_encode().cast(SCORES.field("source").type),
            "aspect": flat["aspect"].combine_chunks().dictionary_encode().cast(SCORES.field("aspect").type),
        },
        schema=SCORES,
    )
    lengths = scoring.reader.lengths(shard, flat)
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=shard_info(table, lengths))


def shard_info(table: pa.Table, lengths: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What rides in the ledger: drops, histograms by (source, aspect), moments of the score, lengths."""
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
            {"source": source, "aspect": aspect, **histogram.to_json()}
            for (source, aspect), histogram in zip(labels, histograms)
        ],
        "moments": asdict(Moments.of(score_M)) if len(score_M) else None,
        "length": asdict(Covariation.of(difference, score_M[known])) if known.any() else None,
        "length_sums": [int(known.sum()), float(chosen_M[known].sum()), float(rejected_M[known].sum())],
    }


def summarise(scoring: Scoring, fitted: Fitted, entries: list[Entry], computed: int, started: float) -> StageReport:
    """The report of a metric, from what its shards put into the ledger."""
    infos = [entry.info for entry in entries]
    rows_in = sum(entry.rows for entry in entries)
    dropped = merge_counts(info["dropped"] for info in infos)
    moments = merge_moments(Moments(**info["moments"]) for info in infos if info["moments"])
    details = {
        "kind": scoring.metric,
        "params": dict(scoring.params),
        "fitted": fitted,
        "moments": {"mean": moments.mean, "std": moments.std, "min": moments.low, "max": moments.high}
        if moments.count
        else None,
        "histogram": Histogram.merge(
            Histogram.from_json(row) for info in infos for row in info["histograms"]
        ).to_json(),
        "length_correlation": correlation(info["length"] for info in infos if info["length"]),
        "length_unit": scoring.reader.length_unit,
        "length": {"all": mean_lengths([info["length_sums"] for info in infos])},
        "strata": merge_counts(
            {f"{row['source']} / {row['aspect']}" if row["aspect"] else row["source"]: sum(row["counts"])}
            for info in infos
            for row in info["histograms"]
        ),
    }
    return StageReport(
        stage="metric",
        name=scoring.name,
        unit="pairs",
        rows_in=rows_in,
        rows_out=rows_in - sum(dropped.values()),
        dropped=dropped,
        shards=len(entries),
        computed_shards=computed,
        seconds=time.monotonic() - started,
        artifact=scoring.folder,
        fingerprint=scoring.folder.rsplit("@", 1)[1],
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
