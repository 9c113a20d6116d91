"""Completion columns → committed pair scores: rounds of statistics over shards, then one pass that scores and commits.

shards ──partials──▶ fit (driver) ──fitted numbers──▶ shards: score, commit with histograms by (source, aspect)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.metrics.statistics import Fitted, Request, fit, reply
from prefsel.metrics.table import complete, find_metric, read_columns, score_pairs
from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_report import score_report
from prefsel.pairs.score_shards import committed, score_table, shard_info
from prefsel.plan.columns import pair_reader, scorers_for
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plan.scores import control_metrics, metric_columns
from prefsel.progress import Progress
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.verify import finished


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


def score_metric(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Fit and commit one metric.

    Raises:
        UserError: a statistic cannot be computed (no rows, zero variance, a quantile of 0).
        NonFiniteError: a NaN or infinity in a column; names column, shard and first pair_ids.
    """
    started = time.monotonic()
    name, spec, folder, storage, catalog = node.name, node.spec, node.path, plan.storage, plan.catalog
    if (done := finished(storage, folder)) is not None:
        return done
    metric, params = find_metric(spec.metric, spec.params)
    reader = pair_reader(plan, scorers_for(plan, metric_columns(plan, name), field=f"metrics.{name}"))
    base = control_metrics(plan).get(name)
    population = plan.node("scores", base).path if base else None
    scoring = Scoring(name, spec.metric, spec.params, reader, folder, population)
    shards = catalog.shards

    def ask(request: Request) -> list[Any]:
        return map_shards(_reply_shard, shards, shared=(scoring, request))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told below, and kept for the report
        try:
            fitted = fit(metric, params, ask)
        except UserError as error:
            raise UserError(f"metrics.{name}: {error}") from None
    told = metric.warnings(params, fitted)
    for text in told:
        progress.line(f"metric    {name}: warning: {text}")
    inputs = _shard_inputs(plan, fitted)
    entries = committed(storage, catalog, folder, inputs)
    pending = [shard for shard in shards if shard.key not in entries]
    with progress.track(f"metric {name}", len(pending)) as counter:
        items = [(shard, inputs[shard.key]) for shard in pending]
        map_shards(_commit_shard, items, shared=(scoring, fitted), counter=counter)
    entries = committed(storage, catalog, folder, inputs)
    facts = {"kind": spec.metric, "params": dict(spec.params), "fitted": fitted, "warnings": list(told)}
    report = score_report(
        [entries[shard.key] for shard in shards],
        stage="metric",
        name=name,
        folder=folder,
        computed=len(pending),
        started=started,
        facts=facts | {"length_unit": reader.length_unit},
    )
    save_summary(storage, report)
    return report


def _shard_inputs(plan: Plan, fitted: Fitted) -> dict[str, str]:
    """What each shard's scores are made from: its pairs and the numbers of the corpus. (Columns are in the recipe.)"""
    pairs = plan.catalog.entries(plan.storage, "pairs")
    numbers = hash_hex(repr(sorted((name, sorted(values.items())) for name, values in fitted.items())))
    return {key: hash_hex(entry.content, numbers) for key, entry in pairs.items()}


def _reply_shard(shard: ShardRef, shared: Any) -> Any:
    scoring, request = shared
    metric, params = find_metric(scoring.metric, scoring.params)
    flat = scoring.flat(shard)
    eligible = flat.filter(pc.is_null(flat["dropped"]))
    with _named(scoring, shard):
        return reply(metric, params, complete(metric, params, read_columns(eligible, metric, params)), request)


@contextmanager
def _named(scoring: Scoring, shard: ShardRef) -> Iterator[None]:
    """Numbers that are refused are those of one entry under `metrics`, in one shard."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"metrics.{scoring.name} ({scoring.metric}), shard {shard.key}: {error}") from None


def _commit_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (scoring, fitted) = item, shared
    metric, params = find_metric(scoring.metric, scoring.params)
    artifact = Artifact(scoring.reader.storage, f"{scoring.folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    flat = scoring.flat(shard)
    row_M = np.flatnonzero(pc.is_null(flat["dropped"]).to_numpy())
    with _named(scoring, shard):
        columns = read_columns(flat.take(pa.array(row_M)), metric, params)
        found = score_pairs(metric, params, columns, fitted)
    score_N = np.full(flat.num_rows, np.nan)
    score_N[row_M] = found.score_N
    dropped = np.array(flat["dropped"].to_pylist(), object)
    is_missing_M = found.missing_N >= 0
    dropped[row_M[is_missing_M]] = [f"missing_{found.names[place]}" for place in found.missing_N[is_missing_M]]
    lengths = scoring.reader.lengths(shard, flat)
    table = score_table(flat, score_N, pa.array(dropped, pa.string()), lengths)
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=shard_info(table, lengths))
