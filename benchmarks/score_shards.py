"""Generated workspaces with committed scores, and the two ways in which selecting from them is timed.

    the stage        what `prefsel select` runs: committed scores in, kept rows committed; on a Ray that is running
    the mechanism    only its search: scores are read and the thresholds found, on one core; nothing is written

What `select_scale` and `select_quota` have in common. Of pairs only what a selection without a dataset reads is there.

Suffixes: N rows of the corpus, n rows of a shard, K kept rows, W = 2 big-endian words of a pair_id.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.config import RayOptions as RayOptions
from prefsel.config.file import parse_config
from prefsel.numbers.columns import id_words
from prefsel.pairs.score_report import score_report
from prefsel.pairs.score_shards import committed_summaries, score_table, shard_info
from prefsel.plan.derived import score_reader
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.rules import parse_rule
from prefsel.schema import ID
from prefsel.select.compose import Keep, compile_rule
from prefsel.select.evaluate import ShardQuery, answer, decide_leaf
from prefsel.select.thresholds import Decided
from prefsel.stages import select as stage
from prefsel.stages.select import select
from prefsel.stages.session import connect
from prefsel.workspace.catalog import Catalog, FileRecord, ShardRef, SourceRecord, write_catalog
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, save_summary
from prefsel.workspace.storage import Storage

SOURCE, METRIC, NAME = "generated", "generated", "timed"
COLUMN = f"score_{METRIC}"
RATIO = 0.3
TOP = {"kind": "top", "score": COLUMN, "ratio": RATIO}
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
    """A workspace with the shards `SOURCE/00000`, `SOURCE/00001`, …"""

    folder: str

    @cached_property
    def storage(self) -> Storage:
        return Storage(self.folder)

    @cached_property
    def plan(self) -> Plan:
        return self.planned(TOP)

    def planned(self, rule: Mapping[str, Any]) -> Plan:
        """The plan of a run that selects by a rule."""
        table = {
            "name": "scale",
            "sources": [{"name": SOURCE, "paths": ["generated.jsonl"]}],
            "scorers": [{"kind": "imported", "name": "gold", "field": "gold"}],
            "metrics": [{"name": METRIC, "metric": "explicit_margin", "params": {"rm": "gold"}}],
            "selections": [{"name": NAME, "rule": dict(rule), "dataset": "never"}],
        }
        return make_plan(parse_config(table), self.storage)

    @cached_property
    def scores(self) -> Artifact:
        return Artifact(self.storage, f"{self.plan.node('scores', METRIC).path}/{SOURCE}")

    @property
    def shards(self) -> list[ShardRef]:
        return self.plan.catalog.shards

    @cached_property
    def files(self) -> list[str]:
        """Score shards in corpus order, for peers."""
        return [str(self.storage.local(self.scores.file(shard.shard))) for shard in self.shards]

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each shard."""
        entries = self.scores.entries()
        return [entries[shard.shard].rows for shard in self.shards]

    def read_scores(self) -> int:
        """Read the column once and put it away; number of rows. What the mechanism is measured against."""
        return sum(self.each(lambda shard: self.scores.read(shard.shard, ["score"]).num_rows))

    def ids(self) -> np.ndarray:
        """All pair_ids, `>u8` [N, W]."""
        return np.concatenate(
            [id_words(self.scores.read(shard.shard, ["pair_id"])["pair_id"]) for shard in self.shards]
        )

    def each(self, work: Callable[[ShardRef], Found]) -> list[Found]:
        """One result per shard, one after the other: what is measured is the time of one core."""
        return [work(shard) for shard in self.shards]

    # ------------------------------------------------------------------------------------------------- mechanism

    def locate(self, rule: Mapping[str, Any]) -> Decided:
        """The thresholds of a rule of one leaf: the functions of the stage, called one shard after the other."""
        compiled = compile_rule(parse_rule(rule))
        leaf, reader = compiled.keep, score_reader(self.plan, compiled, [])
        assert isinstance(leaf, Keep)

        def ask(asked: ShardQuery) -> list[Mapping[Any, Any]]:
            return self.each(lambda shard: answer(asked, reader.rows(shard, [COLUMN], ids=asked.needs_ids, by=leaf.by)))

        entries = self.scores.entries()
        return decide_leaf(leaf, ask, committed=committed_summaries(entries.values(), leaf.by))

    # ----------------------------------------------------------------------------------------------------- stage

    def select(self, rule: Mapping[str, Any]) -> StageReport:
        """The whole stage: kept rows are committed, after those of the run before are removed."""
        self.storage.delete_tree("selections")
        plan = self.planned(rule)
        (report,) = select(plan, plan.node("selection", NAME), Progress(quiet=True))
        return report

    def kept(self, report: StageReport) -> np.ndarray:
        """What the stage committed, as a mask of the corpus, bool [N]."""
        masks = []
        for shard, size in zip(self.shards, self.sizes):
            file = self.storage.local(f"{report.artifact}/{shard.key}.parquet")
            masks.append(np.zeros(size, bool))
            masks[-1][pq.read_table(file, columns=["row"])["row"].to_numpy()] = True
        return np.concatenate(masks)


def make_corpus(
    folder: str, shape: str, num_rows: int, shard_rows: int, *, aspects: Sequence[float] = (1.0,)
) -> Corpus:
    """Commit `num_rows` scores with random pair_ids, as the stages before `select` leave them.

    Args:
        folder: of the workspace; must be empty.
        shape: a key of `SHAPES`.
        num_rows: of the corpus.
        shard_rows: of each shard but the last.
        aspects: shares of the aspects `aspect-0`, `aspect-1`, …
    """
    corpus, started = Corpus(folder), time.monotonic()
    shards = [f"{number:05d}" for number in range(-(-num_rows // shard_rows))]
    file = FileRecord("generated.jsonl", "0" * 32, shards, {}, {})
    write_catalog(corpus.storage, Catalog([SourceRecord(SOURCE, "train", [file])]))
    texts = pa.array([f"aspect-{place}" for place in range(len(aspects))])

    def ids(number: int, kind: int) -> pa.Array:
        count = min(shard_rows, num_rows - number * shard_rows)
        data = np.random.default_rng([number, num_rows, kind]).bytes(16 * count)
        return pa.FixedSizeBinaryArray.from_buffers(ID, count, [None, pa.py_buffer(data)])

    def commit_pairs(number: int) -> None:
        table = pa.table({"pair_id": ids(number, 0), "prompt_id": ids(number, 1)})
        _commit(Artifact(corpus.storage, f"pairs/{SOURCE}"), shards[number], table, {})

    def commit_scores(number: int) -> None:
        rng, pair_ids = np.random.default_rng([number, num_rows, 2]), ids(number, 0)
        count = len(pair_ids)
        code_n = rng.choice(len(aspects), count, p=aspects).astype(np.int32)
        like = {
            "pair_id": pair_ids,
            "source": pa.array([SOURCE] * count),
            "aspect": pa.DictionaryArray.from_arrays(pa.array(code_n), texts),
        }
        lengths = tuple(rng.integers(20, 600, (2, count)).astype(float))
        table = score_table(like, SHAPES[shape](rng, count), pa.nulls(count, pa.string()), lengths)
        _commit(corpus.scores, shards[number], table, shard_info(table, lengths))

    for commit in (commit_pairs, commit_scores):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(commit, range(len(shards))))
    entries = corpus.scores.entries()
    report = score_report(
        [entries[shard] for shard in shards],
        stage="metric",
        name=METRIC,
        folder=corpus.plan.node("scores", METRIC).path,
        computed=len(shards),
        started=started,
        facts={"kind": "explicit_margin", "params": {}, "fitted": {}, "length_unit": "characters"},
    )
    save_summary(corpus.storage, report)
    return corpus


def _commit(artifact: Artifact, shard: str, table: pa.Table, info: dict[str, Any]) -> None:
    artifact.commit(shard, table, made_from=shard, attempt=artifact.log_attempt(shard), info=info)


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """How often each column of a shard is read by the stage, `<kind>.<column>`; its tasks run here, one by one."""
    reads: Counter[str] = Counter()
    real = Artifact.read

    def read(artifact: Artifact, shard: str, columns: list[str] | None = None) -> pa.Table:
        table = real(artifact, shard, columns)
        reads.update(f"{artifact.path.split('/')[0]}.{name}" for name in table.column_names)
        return table

    def serial(function: Callable[..., Any], items: Sequence[Any], *, shared: Any = None, **_: Any) -> list[Any]:
        return [function(item, shared) for item in items]

    with mock.patch.object(Artifact, "read", read), mock.patch.object(stage, "map_shards", serial):
        yield reads


def words(chunks: Sequence[Any]) -> np.ndarray:
    """A column of 16-byte values of any Arrow type as `>u8` [K, 2]."""
    return id_words(pa.chunked_array(chunks).cast(pa.binary(16)))


@contextmanager
def started_ray() -> Iterator[None]:
    """The Ray that the stage runs on, of all CPUs; a run's own start is not timed."""
    import ray

    connect(RayOptions(object_store_gib=0.5), quiet=True)
    yield
    ray.shutdown()


def same_ids(first_KW: np.ndarray, second_KW: np.ndarray) -> bool:
    """Whether two lists of pair_ids hold the same ones, in whatever order."""
    lists = [np.ascontiguousarray(one, ">u8").astype(np.uint64) for one in (first_KW, second_KW)]
    first, second = (one[np.lexsort((one[:, 1], one[:, 0]))] for one in lists)
    return np.array_equal(first, second)


def peak_mib(process: int | str = "self") -> float:
    """Most memory a process, by default this one, ever had resident.

    From /proc and not from `getrusage`, whose number a child inherits from the process that started it.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/{process}/status: no VmHWM; memory is measured on Linux only")
    return int(found[1]) / 1024
