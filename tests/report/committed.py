"""Scores and selections of a tiny corpus, committed as stages do, so that tasks over shards can be called by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_shards import ScoreReader, score_table
from prefsel.schema import SELECTION
from prefsel.select.table import select_table
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

SCORES = "scores/s@0"


def pair_id(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Corpus:
    """Pairs in shards, each with a score or None."""

    storage: Storage
    shards: list[ShardRef]
    scores: list[list[float | None]]

    @property
    def ids(self) -> list[list[bytes]]:
        """Of every shard."""
        starts = np.cumsum([0, *(len(part) for part in self.scores)])
        return [[pair_id(int(start) + row) for row in range(len(part))] for start, part in zip(starts, self.scores)]

    @property
    def reader(self) -> ScoreReader:
        return ScoreReader(PairReader(self.storage, "eligible"), {"score_s": SCORES})

    def keep(self, folder: str, rule: dict[str, Any]) -> set[bytes]:
        """Commit a selection, decided over one table of all pairs; its ids."""
        flat = [(one, score) for ids, part in zip(self.ids, self.scores) for one, score in zip(ids, part)]
        table = pa.table(
            {"pair_id": pa.array([one for one, _ in flat], pa.binary(16)), "score_s": [s for _, s in flat]}
        )
        kept = {flat[row][0] for row in select_table(table, rule)}
        for number, ids in enumerate(self.ids):
            self.keep_rows(folder, number, [row for row, one in enumerate(ids) if one in kept])
        return kept

    def keep_rows(self, folder: str, number: int, rows: list[int]) -> None:
        """Commit what a selection keeps of one shard."""
        shard, ids, part = self.shards[number], self.ids[number], self.scores[number]
        columns = {
            "pair_id": [ids[row] for row in rows],
            "prompt_id": [ids[row] for row in rows],
            "score": [part[row] for row in rows],
            "percentile": [0.0] * len(rows),
            "stratum": ["all"] * len(rows),
            "row": rows,
        }
        artifact = Artifact(self.storage, f"{folder}/{shard.source}")
        artifact.commit(shard.shard, pa.table(columns, schema=SELECTION), made_from="", attempt="")


def commit_corpus(folder: Path, scores: Sequence[Sequence[float | None]]) -> Corpus:
    """The scores of some shards; every other one of another source."""
    shards = [ShardRef("ab"[number % 2], f"shard-{number}", "train", number) for number in range(len(scores))]
    corpus = Corpus(Storage(str(folder)), shards, [list(part) for part in scores])
    for shard, ids, part in zip(shards, corpus.ids, corpus.scores):
        like = {
            "pair_id": pa.array(ids, pa.binary(16)),
            "source": pa.array([shard.source] * len(ids)),
            "aspect": pa.nulls(len(ids), pa.string()),
        }
        score_N = np.array([np.nan if score is None else score for score in part], float)
        dropped = pa.array([None if score is not None else "holdout" for score in part], pa.string())
        artifact = Artifact(corpus.storage, f"{SCORES}/{shard.source}")
        unknown_N = np.full(len(ids), np.nan)
        table = score_table(like, score_N, dropped, (unknown_N, unknown_N))
        artifact.commit(shard.shard, table, made_from="", attempt="")
    return corpus
