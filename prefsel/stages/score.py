"""Groups → columns: which shards are missing, through which pool, and what came of it.

    shard names ──Ray Data──▶ actor: read groups shard → scorer → commit columns shard ──▶ names only

`pool.py` runs it, `actor.py` is what runs, `sharing.py` says who shares a pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefsel.config.lookup import find
from prefsel.errors import PrefselError, invalid
from prefsel.plan.columns import column_names, pair_reader, reference_scorer
from prefsel.plan.models import ModelRef, find_model, find_models
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.score.imported import RATINGS, imported_columns, rating_names
from prefsel.score.job import Job
from prefsel.score.shards import commit_scored
from prefsel.score.summary import report, template_lines
from prefsel.stages.carry import carried_folder, carry_over
from prefsel.stages.pool import run_pool, scoring_work
from prefsel.stages.sharing import shared_passes
from prefsel.stages.tasks import map_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage


@dataclass
class Pending:
    """What is left to do for one column set, and what it took."""

    node: Node
    shards: Sequence[ShardRef]
    done: Mapping[str, Entry]
    """Ledger entries of the shards that are there, by shard key."""
    lacked: int = 0
    """Shards that were not there."""
    carried: int = 0
    """Completions whose numbers come from other shards."""
    seconds: float = 0.0
    shared_with: str = ""
    """Labels of the scorers it shared a pass with."""


def score(plan: Plan, nodes: Sequence[Node], progress: Progress) -> list[StageReport]:
    """Make column sets whose inputs are all there, one after another or in one pass where that saves one.

    Returns:
        A report per node, in their order, counts in completions. Seconds of a shared pass stand in each.
    """
    groups = plan.catalog.entries(plan.storage, "groups")
    pending = {}
    for node in nodes:
        shards, done = _pending_shards(plan, node.path, groups)
        pending[node.name] = Pending(node, shards, done, len(shards))
    for one in pending.values():
        if one.shards and one.node.spec.runs_models:
            started = time.monotonic()
            one.carried = carry_over(plan, one.node, one.shards, groups, progress)
            one.shards = _pending_shards(plan, one.node.path, groups)[0] if one.carried else one.shards
            one.seconds = time.monotonic() - started
    work = [one for one in pending.values() if one.shards]
    for one in work:
        if not one.node.spec.runs_models:
            started = time.monotonic()
            _import_all(plan, one.node, [(shard, groups[shard.key].content) for shard in one.shards], progress)
            one.seconds = time.monotonic() - started
    jobs = [_with_carried(plan, one) for one in work if one.node.spec.runs_models]
    for together in shared_passes(jobs, plan.storage, len(groups), progress):
        for members, shards in split_by_pending([pending[job.label] for job in together]):
            started = time.monotonic()
            labels = [one.node.name for one in members]
            run_pool(
                scoring_work(
                    [job for job in together if job.label in labels], [one.node.path for one in members], plan.storage
                ),
                [(shard, groups[shard.key].content) for shard in shards],
                progress,
                sizes={shard.key: groups[shard.key].bytes for shard in shards},
            )
            for one in members:
                one.seconds += time.monotonic() - started
                one.shared_with = ", ".join(other for other in labels if other != one.node.name) or one.shared_with
    for one in pending.values():
        if one.lacked:
            plan.storage.delete_tree(carried_folder(one.node))
    return [reported(plan, one, groups, progress) for one in pending.values()]


def split_by_pending(pending: Sequence[Pending]) -> list[tuple[list[Pending], list[ShardRef]]]:
    """Shards by who still lacks them: those that all lack in one pass, what a killed run left uneven in others."""
    lacking: dict[str, list[int]] = {}
    refs = {shard.key: shard for one in pending for shard in one.shards}
    for number, one in enumerate(pending):
        for shard in one.shards:
            lacking.setdefault(shard.key, []).append(number)
    found: dict[tuple[int, ...], list[ShardRef]] = {}
    for key, numbers in lacking.items():
        found.setdefault(tuple(numbers), []).append(refs[key])
    return [([pending[number] for number in numbers], shards) for numbers, shards in found.items()]


def reported(plan: Plan, one: Pending, groups: Mapping[str, Entry], progress: Progress) -> StageReport:
    """Compact the ledgers of a column set and tell what is in it."""
    node = one.node
    done = _pending_shards(plan, node.path, groups)[1] if one.lacked else one.done
    for source in plan.catalog.sources_of() if one.lacked else ():
        Artifact(plan.storage, f"{node.path}/{source}").compact()
    require_columns(plan, node, done)
    found = report(node, done, one.lacked, one.seconds)
    if "padded_because" in found.details:
        progress.line(f"score     {node.name}: rows are padded, not packed: {found.details['padded_because']}")
    for line in template_lines(found.details["template"]) if found.details.get("template") else ():
        progress.line(f"score     {node.name}: {line}")
    return replace(found, details=found.details | {"shared_with": one.shared_with}) if one.shared_with else found


def require_columns(plan: Plan, node: Node, done: Mapping[str, Entry]) -> None:
    """Refuse columns of other names than the scorer's record says.

    Raises:
        PrefselError: names the kind, what was made and what the record says.
    """
    record, named = type(node.spec), sorted(column_names(plan, node.spec))
    made = {name for entry in done.values() for name in entry.columns}
    if done and made != set(named):
        raise PrefselError(
            f"score {node.name}: kind {node.spec.kind!r} made the columns {', '.join(sorted(made)) or 'none'}, but "
            f"`columns` of the record {record.__name__} in {record.__module__} says {', '.join(named)}"
        )


def require_imported(plan: Plan) -> None:
    """Refuse an imported number that no completion of the corpus came with, before any model has run.

    One shard of each source is read; all of them only where something is still missing.

    Raises:
        UserError: names the scorer, the field and those that the data have.
    """
    wanted = {field: one for one in plan.scorers if not one.runs_models for field in one.fields.values()}
    sources = plan.catalog.sources_of().values()
    found: set[str] = set()
    for shards in ([some[0] for some in sources], [shard for some in sources for shard in some[1:]]):
        if wanted.keys() <= found:
            return
        found |= {name for names in map_shards(_rating_names, shards, shared=plan.storage) for name in names}
    if missing := [field for field in wanted if field not in found]:
        have = sorted(found) or "none: no completion came with a number"
        raise invalid(f"scorers.{wanted[missing[0]].label}.field", missing[0], have)


def _rating_names(shard: ShardRef, storage: Storage) -> list[str]:
    return rating_names(Artifact(storage, f"groups/{shard.source}").read(shard.shard, [RATINGS]))


def _import_all(plan: Plan, node: Node, items: Sequence[tuple[ShardRef, str]], progress: Progress) -> None:
    """Numbers that came with the data, shard by shard."""
    shared = (node.spec.fields, plan.storage, node.path)
    with progress.track(f"score {node.name}", len(items), commits=True) as counter:
        map_shards(_import_shard, items, shared=shared, counter=counter)


def _import_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (fields, storage, folder) = item, shared
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    attempt, started = artifact.log_attempt(shard.shard), time.monotonic()
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    scored = imported_columns(groups, fields)
    seconds = time.monotonic() - started
    commit_scored(artifact, shard, groups, scored, made_from=made_from, attempt=attempt, seconds=seconds)


def _pending_shards(plan: Plan, folder: str, groups: Mapping[str, Entry]) -> tuple[list[ShardRef], dict[str, Entry]]:
    """Shards still to score, and the ledger entries of those that are done."""
    done: dict[str, Entry] = {}
    for source, shards in plan.catalog.sources_of().items():
        inputs = {shard.shard: groups[shard.key].content for shard in shards}
        entries = Artifact(plan.storage, f"{folder}/{source}").done(inputs)
        done.update({f"{source}/{name}": entry for name, entry in entries.items()})
    return [shard for shard in plan.catalog.shards if shard.key not in done], done


def _with_carried(plan: Plan, one: Pending) -> Job:
    """The job of a column set, with where the numbers lie that some of its completions have already."""
    job = scoring_job(plan, one.node)
    if not one.carried:
        return job
    return replace(job, carried=carried_folder(one.node), names=tuple(column_names(plan, one.node.spec)))


# -------------------------------------------------------------------------------------------------------------- jobs


def loading(ref: ModelRef) -> dict[str, Any]:
    """What an actor needs to load a model."""
    fields = ("path", "made_here", "revision", "trust_remote_code", "gpus_per_replica")
    settings = {key: value for key, value in ref.settings.items() if key != "padded_version"}
    return {name: getattr(ref, name) for name in fields} | settings


def scoring_job(plan: Plan, node: Node) -> Job:
    """What the actors of a scorer need; an imported one has none."""
    scorer, config = node.spec, plan.config
    if not scorer.models(config):
        return Job(scorer, (), label=node.name)
    name = scorer.models(config)[-1]
    # What a model answered is of no training: whoever is named may score it.
    training = find(config.train, name) if plan.made is None else None
    cross_fit = training.cross_fit if training else None
    refs = find_models(plan, name, scorer.own_aspect)
    job = Job(
        scorer,
        tuple((member.fold, loading(ref)) for member, ref in refs.items()),
        label=node.name,
        cross_fit=cross_fit,
        own_aspect=scorer.own_aspect if cross_fit is None else None,
        is_trained=training is not None,
    )
    if scorer.generates_with is not None:
        job = replace(job, policy=loading(find_model(plan, scorer.generates_with)), is_trained=False)
    if scorer.compares_with is not None:
        job = replace(job, beside=loading(find_model(plan, scorer.compares_with)), is_trained=False)
    if scorer.tangent_name is not None:
        tangent = plan.node("tangent", scorer.tangent_name)
        reference: str = tangent.spec.reference
        # A derivative is taken in the precision of the gradient it is multiplied with, whatever the model scores in.
        models = tuple((fold, settings | {"dtype": tangent.spec.dtype}) for fold, settings in job.models)
        reader = pair_reader(plan, [reference_scorer(plan, reference)], lengths=False)
        job = replace(job, models=models, tangent=tangent.path, reader=reader, reference=reference, is_trained=False)
    return job
