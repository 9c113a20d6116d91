"""Parts of a selection: consecutive shards whose kept rows are found, and written to one file, by one task.

A part is planned so that the number of files follows the rows kept and not the shards of the corpus. The numbers the
report needs (strata, lengths, score histogram of the kept) are counted while the rows are at hand and ride in the
ledger of the selection shards; of held-out pairs, which no rule selects, the lengths in that of the dataset's files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError
from prefsel.pairs.card import dataset_card
from prefsel.pairs.export import export_rows
from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_shards import ScoreReader
from prefsel.schema import SELECTION
from prefsel.select.compose import Plan, columns_of
from prefsel.select.cuts import Cut
from prefsel.select.evaluate import kept, stratum_names
from prefsel.select.radix import Histogram, histogram, id_words
from prefsel.select.rows import Rows
from prefsel.select.scored import mean_lengths
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import write_seal
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage, digest

ROWS_PER_FILE = 50_000
SHARDS_PER_FILE = 256
"""At most: a small share of many shards is still read in parallel."""


@dataclass(frozen=True)
class Chosen:
    """What a rule decided about the corpus, as tasks need it."""

    reader: ScoreReader
    plan: Plan
    cuts: tuple[Cut, ...]

    def rows(self, shard: ShardRef, *, ids: bool, more: Sequence[str] = ()) -> Rows:
        """The rows of a shard with all that the rule, and `more`, needs."""
        columns = list(dict.fromkeys((self.plan.score, *columns_of(self.plan.keep), *more)))
        by = [name for leaf in self.plan.leaves for name in leaf.by]
        return self.reader.rows(shard, columns, ids=ids, by=by)


@dataclass(frozen=True)
class Counted:
    """What a rule keeps of one shard."""

    kept: int
    dropped: dict[str, int]
    """Pairs that have the rule's score but lack another one it reads, by reason."""
    extremes: dict[str, tuple[float, float]]
    """Smallest and largest kept score of every column that stands in an intersection with a budget."""


def count_kept(shard: ShardRef, chosen: Chosen) -> Counted:
    """Count what is kept of a shard."""
    plan = chosen.plan
    shown = [column for step in plan.derived if step.how == "middle" for column in step.scores]
    rows = chosen.rows(shard, ids=any(cut.needs_ids for cut in chosen.cuts), more=shown)
    row_K = np.flatnonzero(kept(plan.keep, chosen.cuts, rows))
    scores = {column: rows.scores[column][row_K] for column in shown if len(row_K)}
    extremes = {column: (float(score_K.min()), float(score_K.max())) for column, score_K in scores.items()}
    return Counted(len(row_K), _missing(shard, chosen, rows), extremes)


def reached(counts: Sequence[Counted], column: str, histogram: Histogram) -> list[float]:
    """The smallest and largest percentile of the kept pairs in one score (binned); some pair is kept."""
    ends = [count.extremes[column] for count in counts if column in count.extremes]
    return histogram.percentile(np.array([min(low for low, _ in ends), max(high for _, high in ends)])).tolist()


def _missing(shard: ShardRef, chosen: Chosen, rows: Rows) -> dict[str, int]:
    plan = chosen.plan
    if plan.keep.population == (plan.score,):
        return {}
    is_there_N = np.zeros(rows.num_rows, bool)
    is_there_N[_all_or(rows.having([plan.score]))] = True
    is_there_N[_all_or(rows.having(plan.keep.population))] = False
    if not is_there_N.any():
        return {}
    reasons = chosen.reader.reasons(shard, plan.keep.population).filter(pa.array(is_there_N))
    return dict(sorted(Counter(reasons.to_pylist()).items()))


def _all_or(row_M: np.ndarray | None) -> np.ndarray | slice:
    return slice(None) if row_M is None else row_M


@dataclass(frozen=True)
class Keeper:
    """What a task needs to keep rows of a shard and export them."""

    reader: PairReader
    dataset: str | None
    """Folder of the dataset; None: only the selection is written."""
    chosen: Chosen | None = None
    total: Histogram | None = None
    """Of the rule's score over all pairs that have it: percentiles are read from it."""
    folder: str | None = None
    """Of the selection."""
    held_out: str | None = None
    """Instead of a rule: keep the pairs dropped for this reason."""

    def keep(self, shard: ShardRef, flat: pa.Table) -> tuple[np.ndarray, dict[str, pa.Array]]:
        """Kept rows of a shard and what is attached to them."""
        if self.chosen is None:
            return np.flatnonzero(pc.equal(flat["dropped"], self.held_out).fill_null(False).to_numpy()), {}
        assert self.total is not None
        plan, cuts = self.chosen.plan, self.chosen.cuts
        rows = self.chosen.rows(shard, ids=True)
        assert rows.ids_NW is not None
        if not np.array_equal(rows.ids_NW, id_words(flat["pair_id"])):
            raise IntegrityError(f"{self.folder}: the scores of {shard.key} are not those of pairs/{shard.key}")
        row_K = np.flatnonzero(kept(plan.keep, cuts, rows))
        score_K = rows.scores[plan.score][row_K]
        attached = {
            "score": pa.array(score_K),
            "percentile": pa.array(self.total.percentile(score_K)),
            "stratum": pa.array(stratum_names(plan, cuts, rows, row_K), pa.string()),
        }
        return row_K, attached


def plan_parts(shards: Sequence[ShardRef], counts: Sequence[int]) -> list[list[ShardRef]]:
    """Consecutive shards that together give about `ROWS_PER_FILE` rows, and that one task can read."""
    parts: list[list[ShardRef]] = [[]]
    rows = 0
    for shard, count in zip(shards, counts):
        if parts[-1] and (rows + count > ROWS_PER_FILE or len(parts[-1]) == SHARDS_PER_FILE):
            parts.append([])
            rows = 0
        parts[-1].append(shard)
        rows += count
    return [part for part in parts if part]


def part_names(parts: Sequence[Sequence[ShardRef]], counts: Mapping[ShardRef, int], split: str) -> list[str]:
    """`<split>-00000-of-N` for the parts with rows; the others get a name that `datasets`, which opens none, skips."""
    has_rows = [any(counts[shard] for shard in part) for part in parts]
    number, names = 0, []
    for position, is_full in enumerate(has_rows):
        names.append(f"{split}-{number:05d}-of-{sum(has_rows):05d}" if is_full else f"empty-{position:05d}")
        number += is_full
    return names


@dataclass(frozen=True)
class Part:
    """One task's work."""

    name: str
    """Of its file."""
    shards: tuple[ShardRef, ...]
    contents: tuple[str, ...]
    """Hash of the pairs of each shard."""

    @property
    def made_from(self) -> str:
        """What the file is made from."""
        return hash_hex(*self.contents)


def write_part(part: Part, keeper: Keeper) -> None:
    """Commit the selection shards of one part, then its dataset file, as far as they are asked for."""
    artifact = attempt = None
    if keeper.dataset is not None:
        artifact = Artifact(keeper.reader.storage, f"{keeper.dataset}/data")
        attempt = artifact.log_attempt(part.name)
    tables, counted = [], []
    for shard, content in zip(part.shards, part.contents):
        flat, pairs = keeper.reader.flat(shard), keeper.reader.pairs(shard)
        row_K, attached = keeper.keep(shard, flat)
        counted.append(kept_numbers(keeper, shard, flat, row_K, attached))
        if keeper.folder is not None:
            commit_selection(keeper, shard, pairs, row_K, attached, content, counted[-1])
        if artifact is not None:
            tables.append(export_rows(row_K, pairs, keeper.reader.groups(shard), flat, attached))
    if artifact is not None and attempt is not None:
        info = {"lengths": added_lengths(counted)}
        artifact.commit(part.name, pa.concat_tables(tables), made_from=part.made_from, attempt=attempt, info=info)


def commit_selection(
    keeper: Keeper,
    shard: ShardRef,
    pairs: pa.Table,
    row_K: np.ndarray,
    attached: Mapping[str, pa.Array],
    made_from: str,
    info: Mapping[str, Any],
) -> None:
    """The selection shard: kept ids, in corpus order, with score, percentile, stratum and row in `pairs`."""
    artifact = Artifact(keeper.reader.storage, f"{keeper.folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    ids = pairs.select(["pair_id", "prompt_id"]).take(pa.array(row_K))
    table = pa.table({**{n: ids[n] for n in ids.column_names}, **attached, "row": pa.array(row_K)}, schema=SELECTION)
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=info)


def kept_numbers(
    keeper: Keeper, shard: ShardRef, flat: pa.Table, row_K: np.ndarray, attached: Mapping[str, pa.Array]
) -> dict[str, Any]:
    """What the report needs to know of the kept rows of a shard: `strata`, `lengths`, of a rule the `histogram`."""
    lengths = np.stack(keeper.reader.lengths(shard, flat))[:, row_K]
    known = lengths[:, np.isfinite(lengths).all(axis=0)]
    aspects = Counter(flat["aspect"].take(pa.array(row_K)).to_pylist())
    strata = {f"{shard.source} / {aspect}" if aspect else shard.source: count for aspect, count in aspects.items()}
    info: dict[str, Any] = {
        "strata": dict(sorted(strata.items())),
        "lengths": {"count": known.shape[1], "chosen": float(known[0].sum()), "rejected": float(known[1].sum())},
    }
    if "score" in attached:
        info["histogram"] = histogram(attached["score"].to_numpy()).to_text()
    return info


def added_lengths(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The `lengths` of several pieces, added."""
    return {key: sum(info["lengths"][key] for info in infos) for key in ("count", "chosen", "rejected")}


def kept_lengths(entries: Iterable[Entry]) -> dict[str, float | None]:
    """Mean lengths of the kept completions."""
    sums = [entry.info["lengths"] for entry in entries]
    return mean_lengths([[one["count"], one["chosen"], one["rejected"]] for one in sums])


def seal_dataset(
    storage: Storage, dataset: str, name: str, split: str, parts: Sequence[Entry], facts: Mapping[str, Any]
) -> None:
    """Write the card of a dataset and seal it."""
    rows = sum(part.rows for part in parts)
    columns = Artifact(storage, f"{dataset}/data").read(parts[0].shard).column_names
    card = dataset_card(name=name, split=split, rows=rows, columns=columns, facts=facts).encode()
    storage.write(f"{dataset}/README.md", card)
    listed = {f"data/{part.shard}.parquet": {"bytes": part.bytes, "blake2b": part.content} for part in parts}
    listed["README.md"] = {"bytes": len(card), "blake2b": digest(card)}
    write_seal(storage, dataset, listed, {"rows": rows})
