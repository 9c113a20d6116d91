"""Derived scores as artifacts: their names and folders, and the tasks that count, make and commit them.

They lie beside the metrics' scores and look like them, named after the selection they were made for; a control that
needs the same score shares its selection's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.pairs.score_shards import ScoreReader
from prefsel.plan.lineage import Lineage
from prefsel.rules import parse_rule
from prefsel.select import dedupe as best
from prefsel.select.compose import Derived, Keep, Plan, compile_rule
from prefsel.select.cuts import Cut
from prefsel.select.duplicates import Drops
from prefsel.select.evaluate import best_scores, keyed
from prefsel.select.fuse import Fitted, Partial, derive, statistics
from prefsel.select.rows import Rows
from prefsel.select.scored import score_table, shard_info
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.recipes import fingerprint, recipe


@dataclass(frozen=True)
class DerivedScore:
    """A score made for a selection, and where it lies."""

    step: Derived
    name: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Without the source."""
        return f"scores/{self.name}@{self.fingerprint}"

    @property
    def columns(self) -> list[str]:
        """What it is made from."""
        return list(dict.fromkeys((*self.step.population, *self.step.scores)))


def derived_scores(lineage: Lineage, name: str, plan: Plan) -> list[DerivedScore]:
    """The scores that selection, or control, `name` is made by, each after those it needs."""
    known = {}
    for selection in lineage.config.selections:
        if name != selection.name and name in selection.names:
            base = compile_rule(parse_rule(selection.rule))
            known = {one.fingerprint: one.name for one in derived_scores(lineage, selection.name, base)}
    return [
        DerivedScore(step, known.get(fp, f"{name}.{step.label}"), fp)
        for step, fp in zip(plan.derived, _fingerprints(lineage, plan))
    ]


def _fingerprints(lineage: Lineage, plan: Plan) -> Iterator[str]:
    """A step is what it does with which scores: those of metrics stand upstream, derived ones by their fingerprint."""
    metrics = [metric_of(column) for column in plan.inputs]
    upstream = {metric: fingerprint(lineage.metric_recipe(metric)) for metric in metrics}
    found: dict[str, str] = {}
    for step in plan.derived:
        params = {
            key: [found.get(one, one) for one in value] if isinstance(value, list) else value
            for key, value in step.params().items()
        }
        settings = {"how": step.how, "params": params}
        found[step.column] = fingerprint(recipe("selection", settings, upstream=upstream, corpus=lineage.corpus))
        yield found[step.column]


def metric_of(column: str) -> str:
    """The metric whose score a rule's column is."""
    return column.removeprefix("score_")


def score_reader(lineage: Lineage, plan: Plan, made: Sequence[DerivedScore]) -> ScoreReader:
    """A reader of every score of a plan."""
    folders = {column: lineage.scores_folder(metric_of(column)) for column in plan.inputs}
    return ScoreReader(lineage.reader([]), folders | {one.step.column: one.folder for one in made})


def score_name(column: str, made: Sequence[DerivedScore]) -> str:
    """What a column of a plan is called in reports: its metric, or the derived score."""
    return next((one.name for one in made if one.step.column == column), metric_of(column))


def facts(one: DerivedScore, reader: ScoreReader, made: Sequence[DerivedScore], fitted: Any) -> dict[str, Any]:
    """What a report says about how a score was made."""
    step = one.step
    kinds = {"best": f"dedupe by {step.by}", "middle": "nearest to the medians", "random": "random"}
    params = {
        key: [score_name(column, made) for column in value] if key in ("scores", "population") else value
        for key, value in step.params().items()
    }
    kind = kinds.get(step.how, f"fuse by {step.how}")
    return {"kind": kind, "params": params, "fitted": fitted, "warnings": [], "length_unit": reader.reader.length_unit}


def thresholds(plan: Plan, cuts: Sequence[Cut], made: Sequence[DerivedScore]) -> dict[str, Any]:
    """The cuts for a manifest: of one leaf as they are, of an intersection with the name of each leaf's score."""
    if isinstance(plan.keep, Keep):
        return cuts[0].to_json()
    names = [score_name(leaf.column, made) for leaf in plan.leaves]
    shown = [name if names.count(name) == 1 else f"{place + 1}: {name}" for place, name in enumerate(names)]
    return {f"{name} {key}": value for name, cut in zip(shown, cuts) for key, value in cut.to_json().items()}


def marks(plan: Plan, cuts: Sequence[Cut]) -> list[float]:
    """Values of the plan's own score where it is cut: one of a top, two of a band; none for the many of a quota."""
    found: list[float] = []
    for leaf, cut in zip(plan.leaves, cuts):
        if leaf.column == plan.score:
            ends = [one.score for one in cut.thresholds.values() if one is not None]
            found += [edge for edge in cut.edges if math.isfinite(edge)] if cut.edges else ends if not leaf.by else []
    return found


# ---------------------------------------------------------------------------------------------------------- tasks


def count_statistics(shard: ShardRef, shared: tuple[ScoreReader, DerivedScore]) -> Partial:
    """What one shard says about the population."""
    reader, one = shared
    return statistics(one.step, reader.rows(shard, one.columns))


def commit_derived(item: tuple[ShardRef, str], shared: tuple[ScoreReader, DerivedScore, Fitted]) -> None:
    """Score and commit one shard."""
    (shard, made_from), (reader, one, fitted) = item, shared
    attempt = _artifact(reader, one, shard).log_attempt(shard.shard)
    rows = reader.rows(shard, one.columns, ids=True)
    dropped = reader.reasons(shard, one.step.population)
    _commit(reader, one, shard, derive(one.step, fitted, rows), dropped, made_from, attempt)


@dataclass(frozen=True)
class BestPass:
    """A dedupe over all shards: each sends its rows to partitions, which tell it the ones that lost."""

    reader: ScoreReader
    score: DerivedScore
    inputs: Mapping[str, str]
    """Shard key → hash of what its scores are made from."""

    def send(self, shard: ShardRef, num_partitions: int) -> list[best.KeyedRows]:
        """The rows of a shard, by partition."""
        return keyed(self.score.step, self._rows(shard), shard.number, num_partitions)

    def merge(self, sent: Iterable[best.KeyedRows]) -> best.KeyedRows:
        """Rows of one partition."""
        return best.KeyedRows.merge(sent)

    def settle(self, rows: best.KeyedRows) -> Drops:
        """What a partition drops."""
        return best.losers(rows)

    def commit(self, shard: ShardRef, drops: Sequence[Drops]) -> dict[str, int]:
        """Commit one shard; nothing more is counted."""
        attempt = _artifact(self.reader, self.score, shard).log_attempt(shard.shard)
        lost = [drop.row_M[drop.shard_M == shard.number] for drop in drops]
        lost_M = np.concatenate([np.empty(0, np.int64), *lost])
        rows = self._rows(shard)
        is_lost_N = np.zeros(rows.num_rows, bool)
        is_lost_N[lost_M] = True
        kept = self.reader.reasons(shard, self.score.step.population)
        dropped = pc.if_else(pa.array(is_lost_N), f"same_{self.score.step.by}", kept)
        score_N = best_scores(self.score.step, rows, lost_M)
        _commit(self.reader, self.score, shard, score_N, dropped, self.inputs[shard.key], attempt)
        return {}

    def _rows(self, shard: ShardRef) -> Rows:
        return self.reader.rows(shard, self.score.columns, ids=True, keys=[self.score.step.by])


def _artifact(reader: ScoreReader, one: DerivedScore, shard: ShardRef) -> Artifact:
    return Artifact(reader.reader.storage, f"{one.folder}/{shard.source}")


def _commit(
    reader: ScoreReader,
    one: DerivedScore,
    shard: ShardRef,
    score_N: np.ndarray,
    dropped: pa.Array,
    made_from: str,
    attempt: str,
) -> None:
    like = reader.table(shard, one.columns[0], ["pair_id", "source", "aspect"])
    table = score_table({name: like[name] for name in like.column_names}, score_N, dropped)
    info = shard_info(table, reader.lengths(shard))
    _artifact(reader, one, shard).commit(shard.shard, table, made_from=made_from, attempt=attempt, info=info)
