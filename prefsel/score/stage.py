"""Groups → columns: which shards are missing, through which pool, and what came of it.

    shard names ──Ray Data──▶ actor: read groups shard → scorer → commit columns shard ──▶ names only

`pool.py` runs it, `actor.py` is what runs, `job.py` what an actor loads, `sharing.py` who shares a pass, `tangents.py`
the one thing here that is made by a task of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefsel.config import Imported, Scorer
from prefsel.errors import invalid
from prefsel.lineage import Lineage
from prefsel.naming import imported_fields, scorer_label
from prefsel.progress import Progress
from prefsel.score.imported import RATINGS, imported_columns, rating_names
from prefsel.score.job import scorer_job
from prefsel.score.pool import run_pool
from prefsel.score.shards import commit_scored
from prefsel.score.sharing import shared_passes
from prefsel.score.summary import report
from prefsel.tasks import over_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage


def score_one(lineage: Lineage, scorer: Scorer, progress: Progress) -> StageReport:
    """Run one scorer; returns counts in completions."""
    return score_together(lineage, [scorer], progress)[0]


def score_together(lineage: Lineage, scorers: Sequence[Scorer], progress: Progress) -> list[StageReport]:
    """Run scorers whose inputs are all there, one after another or in one pass where that saves one.

    Returns:
        A report per scorer, in their order, counts in completions. Seconds of a shared pass stand in each.
    """
    groups = lineage.catalog.entries(lineage.storage, "groups")
    folders = {scorer_label(scorer): lineage.columns_folder(scorer) for scorer in scorers}
    pending = {label: pending_shards(lineage, folder, groups)[0] for label, folder in folders.items()}
    seconds = dict.fromkeys(folders, 0.0)
    shared: dict[str, str] = {}
    jobs = []
    for scorer in scorers:
        label = scorer_label(scorer)
        if pending[label] and isinstance(scorer, Imported):
            started = time.monotonic()
            import_all(lineage, scorer, [(shard, groups[shard.key].content) for shard in pending[label]], progress)
            seconds[label] += time.monotonic() - started
        elif pending[label]:
            jobs.append(scorer_job(lineage, scorer))
    for together in shared_passes(jobs, lineage.storage, len(groups), progress):
        labels = [job.label for job in together]
        for members, shards in split_by_pending(labels, pending):
            started = time.monotonic()
            run_pool(
                [job for job in together if job.label in members],
                [folders[label] for label in members],
                lineage.storage,
                [(shard, groups[shard.key].content) for shard in shards],
                progress,
                sizes={shard.key: groups[shard.key].bytes for shard in shards},
            )
            for label in members:
                seconds[label] += time.monotonic() - started
                shared[label] = ", ".join(other for other in members if other != label) or shared.get(label, "")
    return [
        reported(lineage, scorer, groups, len(pending[label]), seconds[label], shared.get(label, ""), progress)
        for scorer in scorers
        for label in [scorer_label(scorer)]
    ]


def split_by_pending(
    labels: Sequence[str], pending: Mapping[str, Sequence[ShardRef]]
) -> list[tuple[list[str], list[ShardRef]]]:
    """Shards by who still lacks them: those that all lack in one pass, what a killed run left uneven in others."""
    lacking: dict[str, list[str]] = {}
    refs = {shard.key: shard for label in labels for shard in pending[label]}
    for label in labels:
        for shard in pending[label]:
            lacking.setdefault(shard.key, []).append(label)
    found: dict[tuple[str, ...], list[ShardRef]] = {}
    for key, members in lacking.items():
        found.setdefault(tuple(members), []).append(refs[key])
    return [(list(members), shards) for members, shards in found.items()]


def reported(
    lineage: Lineage,
    scorer: Scorer,
    groups: Mapping[str, Entry],
    computed: int,
    seconds: float,
    shared_with: str,
    progress: Progress,
) -> StageReport:
    """Compact the ledgers of a column set and tell what is in it."""
    label, folder = scorer_label(scorer), lineage.columns_folder(scorer)
    _, done = pending_shards(lineage, folder, groups)
    for source in lineage.catalog.sources_of():
        Artifact(lineage.storage, f"{folder}/{source}").compact()
    found = report(label, folder, done, computed, seconds, scorer)
    if "padded_because" in found.details:
        progress.line(f"score     {label}: rows are padded, not packed: {found.details['padded_because']}")
    return replace(found, details=found.details | {"shared_with": shared_with}) if shared_with else found


def require_imported(lineage: Lineage) -> None:
    """Refuse an imported number that no completion of the corpus came with, before any model has run.

    One shard of each source is read; all of them only where something is still missing.

    Raises:
        UserError: names the scorer, the field and those that the data have.
    """
    imported = [scorer for scorer in lineage.scorers if isinstance(scorer, Imported)]
    wanted = {field: scorer for scorer in imported for field in imported_fields(scorer).values()}
    sources = lineage.catalog.sources_of().values()
    found: set[str] = set()
    for shards in ([some[0] for some in sources], [shard for some in sources for shard in some[1:]]):
        if wanted.keys() <= found:
            return
        found |= {name for names in over_shards(_rating_names, shards, shared=lineage.storage) for name in names}
    if missing := [field for field in wanted if field not in found]:
        have = sorted(found) or "none: no completion came with a number"
        raise invalid(f"scorers.{wanted[missing[0]].name}.field", missing[0], have)


def _rating_names(shard: ShardRef, storage: Storage) -> list[str]:
    return rating_names(Artifact(storage, f"groups/{shard.source}").read(shard.shard, [RATINGS]))


def import_all(lineage: Lineage, scorer: Imported, items: Sequence[tuple[ShardRef, str]], progress: Progress) -> None:
    """Numbers that came with the data, shard by shard."""
    shared = (imported_fields(scorer), lineage.storage, lineage.columns_folder(scorer))
    with progress.track(f"score {scorer_label(scorer)}", len(items), commits=True) as counter:
        over_shards(_import_shard, items, shared=shared, counter=counter)


def _import_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (fields, storage, folder) = item, shared
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    attempt, started = artifact.log_attempt(shard.shard), time.monotonic()
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    scored = imported_columns(groups, fields)
    seconds = time.monotonic() - started
    commit_scored(artifact, shard, groups, scored, made_from=made_from, attempt=attempt, seconds=seconds)


def pending_shards(
    lineage: Lineage, folder: str, groups: Mapping[str, Entry]
) -> tuple[list[ShardRef], dict[str, Entry]]:
    """Shards still to score, and the ledger entries of those that are done."""
    done: dict[str, Entry] = {}
    for source, shards in lineage.catalog.sources_of().items():
        inputs = {shard.shard: groups[shard.key].content for shard in shards}
        entries = Artifact(lineage.storage, f"{folder}/{source}").done(inputs)
        done.update({f"{source}/{name}": entry for name, entry in entries.items()})
    return [shard for shard in lineage.catalog.shards if shard.key not in done], done
