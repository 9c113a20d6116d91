"""Parts of a dataset: consecutive shards whose kept rows become one file, committed together with their selections.

A part is planned so that the number of files follows the rows kept and not the shards of the corpus. The numbers the
report needs (strata, lengths, score histogram of the kept) are counted while the rows are at hand and ride in its
ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.metrics.reader import PairReader
from prefsel.schema import SELECTION
from prefsel.select.export import export_rows
from prefsel.select.radix import Histogram, histogram
from prefsel.select.rules import Cut, keep, label_text
from prefsel.select.scored import Scored
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact

ROWS_PER_FILE = 50_000
SHARDS_PER_FILE = 256
"""At most: a small share of many shards is still read in parallel."""


@dataclass(frozen=True)
class Keeper:
    """What a task needs to keep rows of a shard and export them."""

    scored: Scored | None
    reader: PairReader
    cut: Cut | None
    total: Histogram | None
    folder: str | None
    dataset: str
    """Folder of the dataset."""
    held_out: str | None = None
    """Instead of a cut: keep the pairs dropped for this reason."""

    def keep(self, shard: ShardRef, flat: pa.Table) -> tuple[np.ndarray, dict[str, pa.Array]]:
        """Kept rows of a shard and what is attached to them."""
        if self.held_out is not None:
            return np.flatnonzero(pc.equal(flat["dropped"], self.held_out).fill_null(False).to_numpy()), {}
        assert self.scored is not None
        assert self.cut is not None
        assert self.total is not None
        rows, row_N = self.scored.rows(shard, ids=True)
        kept_N = np.flatnonzero(keep(self.cut, rows))
        score_K = rows.score_N[kept_N]
        names = [label_text(label) for label in rows.labels]
        codes = np.zeros(len(kept_N), np.int64) if rows.code_N is None else rows.code_N[kept_N]
        attached = {
            "score": pa.array(score_K),
            "percentile": pa.array(self.total.percentile(score_K)),
            "stratum": pa.array([names[code] for code in codes], pa.string()),
        }
        return row_N[kept_N], attached


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


def write_part(item: tuple[str, list[ShardRef], str], keeper: Keeper) -> None:
    """Commit the selection shards of one part, then its dataset file with what the report needs."""
    name, shards, made_from = item
    storage = keeper.reader.storage
    artifact = Artifact(storage, f"{keeper.dataset}/data")
    attempt = artifact.log_attempt(name)
    tables, scores, sides = [], [], []
    for shard in shards:
        flat, pairs = keeper.reader.flat(shard), keeper.reader.pairs(shard)
        row_K, attached = keeper.keep(shard, flat)
        commit_selection(keeper, shard, pairs, row_K, attached)
        if keeper.held_out is None:
            scores.append(attached["score"].to_numpy())
        chosen_N, rejected_N = keeper.reader.lengths(shard, flat)
        sides.append(np.stack([chosen_N[row_K], rejected_N[row_K]]))
        tables.append(export_rows(row_K, pairs, keeper.reader.groups(shard), flat, attached))
    table = pa.concat_tables(tables)
    lengths = np.concatenate(sides, axis=1)
    known = lengths[:, np.isfinite(lengths).all(axis=0)]
    info: dict[str, Any] = {
        "strata": strata_counts(table),
        "lengths": {"count": known.shape[1], "chosen": float(known[0].sum()), "rejected": float(known[1].sum())},
    }
    if scores:
        info["histogram"] = histogram(np.concatenate(scores)).to_json()
    artifact.commit(name, table, made_from=made_from, attempt=attempt, info=info)


def commit_selection(
    keeper: Keeper, shard: ShardRef, pairs: pa.Table, row_K: np.ndarray, attached: Mapping[str, pa.Array]
) -> None:
    """The selection shard: kept ids, in corpus order, with score, percentile and stratum."""
    if keeper.folder is None:
        return
    artifact = Artifact(keeper.reader.storage, f"{keeper.folder}/{shard.source}")
    ids = pairs.select(["pair_id", "prompt_id"]).take(pa.array(row_K))
    table = pa.table({**{n: ids[n] for n in ids.column_names}, **attached, "row": pa.array(row_K)}, schema=SELECTION)
    attempt = artifact.log_attempt(shard.shard)
    artifact.commit(shard.shard, table, made_from=shard.shard, attempt=attempt)


def strata_counts(table: pa.Table) -> dict[str, int]:
    """Rows by `source / aspect`."""
    pairs = zip(table["source"].to_pylist(), table["aspect"].to_pylist())
    return dict(sorted(Counter(f"{source} / {aspect}" if aspect else source for source, aspect in pairs).items()))
