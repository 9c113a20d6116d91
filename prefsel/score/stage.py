"""Groups → completion columns, on Ray Data: one actor pool per model, one shard per call.

    shard names ──Ray Data──▶ actor: read groups shard → scorer → commit columns shard ──▶ counts only

The dataset that flows through Ray holds names of shards, not rows: an actor reads its own shard and commits its own
columns, so a lost actor costs the shard it held and nothing else, and no text travels through the object store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from prefsel.config import CausalLogps, Imported, ModelScorer, Pool, PretrainedModel, RewardModel, Scorer
from prefsel.errors import PrefselError, TemplateError, UserError
from prefsel.lineage import Lineage, ModelRef, scorer_label
from prefsel.progress import Progress
from prefsel.schema import columns_schema
from prefsel.score.imported import imported_columns
from prefsel.session import is_own
from prefsel.tasks import known_errors, over_shards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.recipes import fingerprint
from prefsel.workspace.storage import Storage


class ScoreShards:
    """Ray Data actor: loads its model once, then turns shard names into committed columns."""

    def __init__(self, scorer: ModelScorer, settings: dict[str, Any], storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        try:
            self._scorer: Any = build_scorer(scorer, settings, storage)
        except (
            PrefselError
        ) as error:  # an actor that dies in its constructor loses the message: told at the first shard
            self._scorer = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score one shard (`batch_size=1`) and return its key."""
        if isinstance(self._scorer, PrefselError):
            raise self._scorer
        source, shard, made_from = (str(batch[key][0]) for key in ("source", "shard", "made_from"))
        score_shard(self._scorer.score, ShardRef(source, shard, "", 0), made_from, self._storage, self._folder)
        return {"source": [source], "shard": [shard]}


def score_shard(
    score_groups: Callable[[pa.Table], Any], shard: ShardRef, made_from: str, storage: Storage, folder: str
) -> None:
    """Read a groups shard, score it, commit its columns."""
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    started = time.monotonic()
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    scored = score_groups(groups)
    table = columns_table(groups, scored.columns)
    info = {
        "dropped": dict(scored.dropped),
        "counters": dict(scored.counters),
        "poisoned": scored.poisoned[:100],
        "padded_because": scored.padded_because,
        "template_error": scored.template_error,
        "completions": len(pc.list_flatten(table["completion_ids"])),
        "seconds": time.monotonic() - started,
    }
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=info)


def _import_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (fields, storage, folder) = item, shared
    score_shard(lambda groups: imported_columns(groups, fields), shard, made_from, storage, folder)


def columns_table(groups: pa.Table, columns: Mapping[str, list[list[float | None]]]) -> pa.Table:
    """Columns beside the identifiers they belong to; −0.0 becomes 0.0."""
    ids = [[completion["completion_id"] for completion in row] for row in groups["completions"].to_pylist()]
    values = {name: [[None if v is None else v + 0.0 for v in row] for row in rows] for name, rows in columns.items()}
    arrays = {"prompt_id": groups["prompt_id"], "completion_ids": ids, **values}
    return pa.table(arrays, schema=columns_schema(list(columns)))


def build_scorer(scorer: ModelScorer, settings: dict[str, Any], storage: Storage) -> Any:
    """The scorer of `score/scorers.py` that a configuration entry asks for; loads the model."""
    from prefsel.score import scorers

    settings = dict(settings)
    if settings.pop("made_here"):
        settings["path"] = str(fetch_folder(storage, settings["path"]))
    settings |= {"name": scorer.model, "token_budget": scorer.token_budget}
    if isinstance(scorer, RewardModel):
        return scorers.RewardModelScorer(**settings, heads=scorer.heads)
    return scorers.CausalLogpsScorer(**settings)


def scorer_settings(lineage: Lineage, scorer: CausalLogps | RewardModel, model: ModelRef) -> dict[str, Any]:
    """What an actor needs to load the model of `scorer`."""
    spec = lineage.model_spec(scorer.model)
    more: dict[str, Any] = {"trust_remote_code": False, "gpus_per_replica": 1}
    if isinstance(spec, PretrainedModel):
        more = {key: getattr(spec, key) for key in more}
    more["revision"] = model.revision
    return {"path": model.path, "made_here": model.made_here} | model.settings | more


def score(lineage: Lineage, progress: Progress) -> list[StageReport]:
    """Run every scorer of the configuration over the shards it has not scored yet.

    Raises:
        PrefselError: more completions than `max_poison_fraction` got NaN or infinity from a model.
    """
    return [score_one(lineage, scorer, progress) for scorer in lineage.config.scorers]


def score_one(lineage: Lineage, scorer: Scorer, progress: Progress) -> StageReport:
    """Run one scorer; returns counts in completions."""
    started = time.monotonic()
    made_of = lineage.columns_recipe(scorer)
    label, storage = scorer_label(scorer), lineage.storage
    folder = f"columns/{label}@{fingerprint(made_of)}"
    groups = lineage.catalog.entries(storage, "groups")
    pending, done = pending_shards(lineage, folder, groups)
    if pending:
        items = [(shard, groups[shard.key].content) for shard in pending]
        if isinstance(scorer, Imported):
            with progress.track(f"score {label}", len(items)) as counter:
                over_shards(
                    _import_shard, items, shared=(lineage.imported_fields(scorer), storage, folder), counter=counter
                )
        else:
            settings = scorer_settings(lineage, scorer, lineage.model(scorer.model))
            run_pool(scorer, settings, storage, folder, items, progress)
        _, done = pending_shards(lineage, folder, groups)
    for source in lineage.catalog.sources_of():
        Artifact(storage, f"{folder}/{source}").compact()
    found = report(label, folder, fingerprint(made_of), done, len(pending), started, scorer)
    if "padded_because" in found.details:
        progress.line(f"score     {label}: rows are padded, not packed: {found.details['padded_because']}")
    return found


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


def run_pool(
    scorer: ModelScorer,
    settings: dict[str, Any],
    storage: Storage,
    folder: str,
    items: Sequence[tuple[ShardRef, str]],
    progress: Progress,
) -> None:
    """Stream shards, with the hashes they are made from, through an actor pool."""
    pool = scorer.pool
    num_gpus = gpus_per_actor(pool, settings)
    size = min(pool.size or fitting_actors(pool, num_gpus), len(items))
    require_cpus(pool, pool.min_size or size)
    strategy = ray.data.ActorPoolStrategy(size=size)
    if pool.min_size:
        strategy = ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size)
    rows = [{"source": shard.source, "shard": shard.shard, "made_from": made_from} for shard, made_from in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ScoreShards,
        fn_constructor_kwargs={"scorer": scorer, "settings": settings, "storage": storage, "folder": folder},
        batch_size=1,
        compute=strategy,
        num_gpus=num_gpus,
        num_cpus=pool.num_cpus,
    )
    with progress.track(f"score {scorer.model}", len(rows)) as counter, known_errors():
        for _ in dataset.iter_rows():
            counter.advance()


def gpus_per_actor(pool: Pool, settings: Mapping[str, Any]) -> float:
    """GPUs an actor reserves.

    Raises:
        UserError: the pool asks for GPUs that the cluster does not have.
    """
    have = ray.cluster_resources().get("GPU", 0)
    wanted = pool.num_gpus
    if wanted is None:
        wanted = settings["gpus_per_replica"] if have else 0
    if wanted > have and is_own():
        raise UserError(f"scorers.pool.num_gpus: got {wanted:g}, but this cluster has {have:g} GPUs")
    return wanted


def require_cpus(pool: Pool, size: int) -> None:
    """Refuse a pool that a Ray of this process can never hold; a cluster may grow.

    Raises:
        UserError: names what is asked and what there is.
    """
    have = ray.cluster_resources().get("CPU", 0)
    if is_own() and size * pool.num_cpus > have:
        raise UserError(f"scorers.pool.num_cpus: {size} x {pool.num_cpus:g} CPUs asked, this Ray has {have:g}")


def fitting_actors(pool: Pool, num_gpus: float) -> int:
    """As many actors as the cluster holds, at least one."""
    resources = ray.cluster_resources()
    by_cpu = max(1, int(resources.get("CPU", 1) / pool.num_cpus))
    by_gpu = int(resources.get("GPU", 0) / num_gpus) if num_gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))


def report(
    label: str, folder: str, fp: str, done: Mapping[str, Entry], computed: int, started: float, scorer: Scorer
) -> StageReport:
    """The stage's counts in completions, with the engine's counters added up."""
    infos = [entry.info for entry in done.values()]
    dropped = merge_counts(info["dropped"] for info in infos)
    completions = sum(info["completions"] for info in infos)
    poisoned = dropped.get("poisoned", 0)
    allowed = 0.0 if isinstance(scorer, Imported) else scorer.max_poison_fraction
    if poisoned > allowed * completions:
        first = next(info["poisoned"][:3] for info in infos if info["poisoned"])
        raise PrefselError(
            f"score {label}: the model gave NaN or infinity for {poisoned:,} of {completions:,} completions, "
            f"first {first}; max_poison_fraction is {allowed:g}"
        )
    if 2 * (refused := dropped.get("template_error", 0)) > completions:
        first = next(info["template_error"] for info in infos if info["template_error"])
        raise TemplateError(
            f"score {label}: {refused:,} of {completions:,} completions do not fit the template: {first}"
        )
    padded = next((info["padded_because"] for info in infos if info["padded_because"]), "")
    counters: dict[str, float] = {}
    for info in infos:
        for name, value in info["counters"].items():
            counters[name] = counters.get(name, 0) + value
    bounds: dict[str, list[float]] = {}
    for entry in done.values():
        for name, column in entry.columns.items():
            if column["min"] is not None:
                low, high = bounds.get(name, [column["min"], column["max"]])
                bounds[name] = [min(low, column["min"]), max(high, column["max"])]
    return StageReport(
        stage="score",
        name=label,
        unit="completions",
        rows_in=completions,
        rows_out=completions - sum(dropped.values()),
        dropped=dropped,
        shards=len(done),
        computed_shards=computed,
        seconds=time.monotonic() - started,
        artifact=folder,
        fingerprint=fp,
        details={"counters": counters, "range": bounds} | ({"padded_because": padded} if padded else {}),
    )
