"""Committed scores as a selection reads them: eligible rows of a shard, strata, and the corpus's histograms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.select.radix import Histogram, id_words
from prefsel.select.rules import Label, ShardScores, merge_histograms
from prefsel.select.table import strata
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Scored:
    """A metric's committed scores, as tasks need them."""

    storage: Storage
    folder: str
    by: tuple[str, ...] = ()
    """Columns that make the strata."""

    def rows(self, shard: ShardRef, *, ids: bool) -> tuple[ShardScores, np.ndarray]:
        """The eligible rows of a shard, and their positions in it."""
        columns = ["score", *(["pair_id"] if ids else []), *self.by]
        table = Artifact(self.storage, f"{self.folder}/{shard.source}").read(shard.shard, [*columns, "dropped"])
        row_N = np.flatnonzero(pc.is_null(table["dropped"]).to_numpy())
        table = table.take(pa.array(row_N))
        words = id_words(table["pair_id"]) if ids else None
        codes, labels = strata([table[name] for name in self.by]) if self.by else (None, [()])
        return ShardScores(table["score"].to_numpy(), words, codes, labels), row_N


def corpus_histograms(entries: Iterable[Entry], by: tuple[str, ...]) -> dict[Label, Histogram]:
    """The committed histograms, added up by stratum."""
    many = []
    for entry in entries:
        for row in entry.info["histograms"]:
            label = tuple(row[name] for name in by)
            many.append({label: Histogram.from_json(row)})
    return merge_histograms(many) or {(): Histogram.from_json({"bins": [], "counts": []})}
