"""An actor of a pool: of the two shards it holds, one has the models; the other is read, tokenised or committed.

    thread 1   read ─ tokenise ─ │██ models ██│ ─ commit ─ read the next ─ tokenise ─ wait │██ models ██│
    thread 2        read ─ tokenise ─ wait ───│██████ models ██████│ ─ commit ─ read …

A shard has the models to itself until it is through, so that engines need no lock, and two shards do not finish, and
leave the models idle, at the same time. With two shards there is never more than one that waits: no order to keep.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import PrefselError
from prefsel.plugins.failures import naming_plugins
from prefsel.plugins.registry import load as load_plugins
from prefsel.score.carried import Numbers, completion_ids, joined, without
from prefsel.score.contract import check_scored
from prefsel.score.job import Job
from prefsel.score.kinds import Loaded, load, origin
from prefsel.score.shards import commit_scored
from prefsel.score.summary import shares
from prefsel.score.utilization import Span, as_info
from prefsel.stages import telemetry
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

SHARDS_IN_HAND = 2
"""Calls that run at once in an actor, and most shards that a killed one loses."""

Record = Callable[[str, Mapping[str, float], Mapping[str, float]], None]


class ScoreShards:
    """Ray Data actor: loads its models once, then turns shard names into committed columns."""

    def __init__(
        self,
        jobs: Sequence[Job],
        storage: Storage,
        folders: Sequence[str],
        record: Record = telemetry.record,
        plugins: Sequence[str] = (),
    ) -> None:
        """Begin to load, and return at once: the first shards are read meanwhile, and what fails is told at them.

        Args:
            jobs: One, or several that share a pass.
            storage: The workspace.
            folders: The column set of each job.
            record: Where counters go besides the ledger.
            plugins: Modules to load before the jobs.
        """
        self._jobs, self._storage, self._folders, self._record = jobs, storage, folders, record
        self._turn = threading.Lock()
        self._name = uuid.uuid4().hex[:12]
        loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._loaded = loader.submit(_load, plugins, jobs, storage)
        loader.shutdown(wait=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score one shard (`batch_size=1`); returns its key and its tokens, when its ledger objects are written."""
        source, shard, made_from = (str(batch[key][0]) for key in ("source", "shard", "made_from"))
        with naming_plugins():
            tokens = self.score(ShardRef(source, shard, "", 0), made_from)
        return {"source": [source], "shard": [shard], "tokens": [tokens]}

    def score(self, shard: ShardRef, made_from: str) -> int:
        """Read a groups shard, run the models on it, commit the columns that are not there yet.

        Returns:
            Tokens that went through the models; 0 where everything was there.

        Raises:
            PrefselError: as loading and scoring raise it.
        """
        began = time.time()
        artifacts = [Artifact(self._storage, f"{folder}/{shard.source}") for folder in self._folders]
        # Ray repeats the shards of a dead actor, also one that was committed and not yet reported.
        is_open = [not artifact.is_done(shard.shard, made_from) for artifact in artifacts]
        if not any(is_open):
            return 0
        attempts = [artifact.log_attempt(shard.shard) if o else "" for artifact, o in zip(artifacts, is_open)]
        groups = Artifact(self._storage, f"groups/{shard.source}").read(shard.shard)
        loaded = self._loaded.result()
        known = [self._known(job, shard, made_from) for job in self._jobs]
        is_known_N = _known_to_all(known, groups)
        part, row_M = (groups, None) if is_known_N is None else without(groups, is_known_N)
        compute = loaded.begin(shard, part)
        with self._turn:
            entered = time.time()
            scored = compute()
            left = time.time()
        if len(scored) != len(self._jobs):
            label, where = self._jobs[0].label, origin(self._jobs[0].scorer)
            raise PrefselError(f"score {label}: {where} gave {len(scored)} results; valid: a list with one per job")
        for job, one in zip(self._jobs, scored):
            check_scored(job, origin(job.scorer), part, one)
        seconds = sum(one.counters.get("seconds_model", 0.0) for one in scored)
        span = as_info(Span(self._name, began, entered, left, seconds))
        scored[0].counters["groups_read"] = float(groups.num_rows)
        carried = 0 if is_known_N is None else int(is_known_N.sum())
        if is_known_N is not None and row_M is not None:
            scored = [
                joined(groups, one, job.names, left=(more, is_known_N, row_M))
                for one, job, more in zip(known, self._jobs, scored)
                if one is not None
            ]
        for place in (place for place, o in enumerate(is_open) if o):
            one = scored[place]
            gauges = _add_peak(one, loaded)
            more: dict[str, Any] = {"made_from": made_from, "attempt": attempts[place]}
            more |= {"carried": carried} if carried else {}
            commit_scored(artifacts[place], shard, groups, one, **more, span=span, seconds=time.time() - began)
            self._record(self._jobs[place].label, one.counters, gauges)
        return int(sum(one.counters.get("trunk_tokens", 0.0) for one in scored))

    def _known(self, job: Job, shard: ShardRef, made_from: str) -> Numbers | None:
        """The numbers that completions of a shard have from other shards; None where there are none."""
        artifact = Artifact(self._storage, f"{job.carried}/{shard.source}")
        if not job.carried or not artifact.is_done(shard.shard, made_from):
            return None
        return Numbers.from_table(artifact.read(shard.shard), job.names)


def _known_to_all(known: Sequence[Numbers | None], groups: pa.Table) -> np.ndarray | None:
    """Of every completion of a shard whether all jobs of the pass have its numbers; None where that is none."""
    ids_N, found = completion_ids(groups), [one for one in known if one is not None]
    if len(found) < len(known):
        return None
    is_known_N = np.all([one.places(ids_N) >= 0 for one in found], axis=0)
    return is_known_N if is_known_N.any() else None


def _load(plugins: Sequence[str], jobs: Sequence[Job], storage: Storage) -> Loaded:
    load_plugins(plugins)
    return load(jobs, storage)


def _add_peak(scored: Any, loaded: Loaded) -> dict[str, float]:
    """Count what the device could have done in the shard's model seconds; the shares that follow, for gauges."""
    if loaded.flops_per_s is not None:
        scored.counters["flops_possible"] = loaded.flops_per_s * scored.counters.get("seconds_model", 0.0)
        scored.facts["matmul_flops_per_s"] = loaded.flops_per_s
    found = shares(scored.counters)
    gauges = {"padding_share": found["padding"]} if "padding" in found else {}
    gauges |= {"useful_mfu": found["useful_mfu"]} if "useful_mfu" in found else {}
    return gauges | {name: scored.facts[name] for name in ("token_budget_least",) if name in scored.facts}
