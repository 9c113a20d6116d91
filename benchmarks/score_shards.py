"""Generated score shards, committed as the library commits them, and a selection from them as the stage makes it.

What `select_scale` and `select_quota` have in common. `prefsel.select.sweep` selects, with the brackets and cuts of the
stage on Ray.

Suffixes: N rows of the corpus, n rows of a shard, K kept rows, W = 2 big-endian words of a pair_id.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_shards import ScoreReader
from prefsel.rules import parse_rule
from prefsel.schema import ID
from prefsel.select.compose import compile_rule
from prefsel.select.radix import id_words
from prefsel.select.scored import score_table, shard_info
from prefsel.select.sweep import sweep
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.storage import Storage

SOURCE, FOLDER, COLUMN = "generated", "scores", "score_generated"
RATIO = 0.3
TIE, TIE_SHARE = 0.25, 0.4
"""24 % of the rows lie above the tie and 64 % at or above it, so the cut of 30 % falls among tied rows."""

Shape = Callable[[np.random.Generator, int], np.ndarray]
SHAPES: dict[str, Shape] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "ties": lambda rng, n: np.where(rng.random(n) < TIE_SHARE, TIE, rng.standard_normal(n)),
    "offset": lambda rng, n: 1e6 + rng.standard_normal(n),
}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Corpus:
    """A folder with the score shards `SOURCE/00000`, `SOURCE/00001`, …"""

    folder: str

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact(Storage(self.folder), f"{FOLDER}/{SOURCE}")

    @cached_property
    def shards(self) -> list[ShardRef]:
        return [ShardRef(SOURCE, name, "train", number) for number, name in enumerate(sorted(self.artifact.entries()))]

    @cached_property
    def files(self) -> list[str]:
        """In corpus order, for peers."""
        return [str(self.artifact.storage.local(self.artifact.file(shard.shard))) for shard in self.shards]

    @property
    def reader(self) -> ScoreReader:
        return ScoreReader(PairReader(self.artifact.storage, eligible=""), {COLUMN: FOLDER})

    def entries(self) -> dict[str, Entry]:
        """The ledger, read anew."""
        return self.artifact.entries()

    def ids(self) -> np.ndarray:
        """All pair_ids, `>u8` [N, W]."""
        return np.concatenate([id_words(table["pair_id"]) for table in self.each(self._table(["pair_id"]))])

    def read_scores(self) -> int:
        """Read the column once and put it away; number of rows. What a selection is measured against."""
        return sum(self.each(lambda shard: self._table(["score"])(shard).num_rows))

    def _table(self, names: list[str]) -> Callable[[ShardRef], pa.Table]:
        return lambda shard: self.reader.table(shard, COLUMN, names)

    def each(self, work: Callable[[ShardRef], Found]) -> list[Found]:
        """One result per shard, runs of shards in a thread per core, as `sweep` takes them."""
        threads = os.cpu_count() or 1
        runs = np.array_split(np.arange(len(self.shards)), min(len(self.shards), 4 * threads))
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda run: [work(self.shards[number]) for number in run], runs)
            return [one for run in found for one in run]


def make_corpus(
    folder: str, shape: str, num_rows: int, shard_rows: int, *, aspects: Sequence[float] = (1.0,)
) -> Corpus:
    """Commit `num_rows` scores with random pair_ids.

    Args:
        folder: of the workspace; must be empty.
        shape: a key of `SHAPES`.
        num_rows: of the corpus.
        shard_rows: of each shard but the last.
        aspects: shares of the aspects `aspect-0`, `aspect-1`, …
    """
    corpus = Corpus(folder)
    names = pa.array([f"aspect-{place}" for place in range(len(aspects))])

    def commit(number: int) -> None:
        rng = np.random.default_rng([number, num_rows])
        count = min(shard_rows, num_rows - number * shard_rows)
        code_n = rng.choice(len(aspects), count, p=aspects).astype(np.int32)
        like = {
            "pair_id": pa.FixedSizeBinaryArray.from_buffers(ID, count, [None, pa.py_buffer(rng.bytes(16 * count))]),
            "source": pa.array([SOURCE] * count),
            "aspect": pa.DictionaryArray.from_arrays(pa.array(code_n), names),
        }
        table = score_table(like, SHAPES[shape](rng, count), pa.nulls(count, pa.string()))
        unknown = np.full(count, np.nan)
        name = f"{number:05d}"
        info = shard_info(table, (unknown, unknown))
        corpus.artifact.commit(name, table, made_from=name, attempt=corpus.artifact.log_attempt(name), info=info)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(commit, range(-(-num_rows // shard_rows))))
    corpus.artifact.compact()  # as the stage that commits scores leaves its ledger
    return corpus


def select(corpus: Corpus, rule: Mapping[str, Any]) -> tuple[list[np.ndarray], Counter[str]]:
    """Keep rows of every shard, as bitmaps (`np.packbits`), and how often each column was read."""
    swept = sweep(compile_rule(parse_rule(rule)), corpus.reader, corpus.shards, list(corpus.entries().values()))
    swept.reads["score"] = swept.reads.pop(COLUMN)
    return swept.bitmaps, swept.reads


def mask_of(corpus: Corpus, bitmaps: Sequence[np.ndarray]) -> np.ndarray:
    """Bitmaps of shards as one mask of the corpus, bool [N]."""
    entries = corpus.entries()
    sizes = [entries[shard.shard].rows for shard in corpus.shards]
    return np.concatenate([np.unpackbits(bits, count=size).astype(bool) for bits, size in zip(bitmaps, sizes)])


def same_ids(first_KW: np.ndarray, second_KW: np.ndarray) -> bool:
    """Whether two lists of pair_ids hold the same ones, in whatever order."""
    lists = [np.ascontiguousarray(one, ">u8").astype(np.uint64) for one in (first_KW, second_KW)]
    first, second = (one[np.lexsort((one[:, 1], one[:, 0]))] for one in lists)
    return np.array_equal(first, second)


def peak_mib() -> float:
    """Most memory this process ever had resident.

    From /proc and not from `getrusage`, whose number a child inherits from the process that started it.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status: no VmHWM; memory is measured on Linux only")
    return int(found[1]) / 1024
