"""Groups → columns, on Ray Data: one actor pool per model, one shard per call; and tangents.

    shard names ──Ray Data──▶ actor: read groups shard → scorer → commit columns shard ──▶ counts only
    validation pairs, model ──one task──▶ tangents/<name>

The dataset that flows through Ray holds names of shards, not rows: an actor reads its own shard and commits its own
columns, so a lost actor costs the shard it held and nothing else, and no text travels through the object store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from prefsel.config import (
    CausalLogps,
    CrossFit,
    DirectionalLogps,
    GeneratedReward,
    Imported,
    PairGradients,
    Pool,
    PooledScorer,
    PretrainedModel,
    RewardModel,
    Scorer,
    Tangent,
)
from prefsel.errors import PrefselError, TemplateError, UserError
from prefsel.lineage import Lineage, ModelRef
from prefsel.metrics.reader import PAIR_COLUMNS, PairReader
from prefsel.naming import imported_fields, scorer_label
from prefsel.progress import Progress
from prefsel.schema import columns_schema
from prefsel.score.imported import imported_columns
from prefsel.session import is_own
from prefsel.tasks import known_errors, over_shards, unwrap
from prefsel.train.tables import PairSource, Part
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import commit_folder, fetch_folder
from prefsel.workspace.ledger import Artifact, Entry, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage


class ScoreShards:
    """Ray Data actor: loads its model once, then turns shard names into committed columns."""

    def __init__(self, job: Job, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        try:
            self._score: Any = build_score(job, storage)
        except PrefselError as error:
            # An actor that dies in its constructor loses the message: told at the first shard.
            self._score = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score one shard (`batch_size=1`) and return its key."""
        if isinstance(self._score, PrefselError):
            raise self._score
        source, shard, made_from = (str(batch[key][0]) for key in ("source", "shard", "made_from"))
        score_shard(self._score, ShardRef(source, shard, "", 0), made_from, self._storage, self._folder)
        return {"source": [source], "shard": [shard]}


Score = Callable[[ShardRef, pa.Table], Any]
"""(shard, its groups) → a `ScoredShard`."""


def score_shard(score: Score, shard: ShardRef, made_from: str, storage: Storage, folder: str) -> None:
    """Read a groups shard, score it, commit its columns."""
    artifact = Artifact(storage, f"{folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    started = time.monotonic()
    groups = Artifact(storage, f"groups/{shard.source}").read(shard.shard)
    scored = score(shard, groups)
    if folder.startswith(PAIR_COLUMNS):
        pairs = Artifact(storage, f"pairs/{shard.source}").read(shard.shard, ["pair_id"])
        table = pair_columns_table(pairs, scored.columns)
        rows = table.num_rows
    else:
        table = columns_table(groups, scored.columns)
        rows = len(pc.list_flatten(table["completion_ids"]))
    info = {
        "dropped": dict(scored.dropped),
        "counters": dict(scored.counters),
        "facts": dict(getattr(scored, "facts", {})),
        "poisoned": scored.poisoned[:100],
        "padded_because": scored.padded_because,
        "template_error": scored.template_error,
        "completions": rows,
        "seconds": time.monotonic() - started,
    }
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=info)


def _import_shard(item: tuple[ShardRef, str], shared: Any) -> None:
    (shard, made_from), (fields, storage, folder) = item, shared
    score_shard(lambda _, groups: imported_columns(groups, fields), shard, made_from, storage, folder)


def columns_table(groups: pa.Table, columns: Mapping[str, list[list[float | None]]]) -> pa.Table:
    """Columns beside the identifiers they belong to; −0.0 becomes 0.0."""
    ids = [[completion["completion_id"] for completion in row] for row in groups["completions"].to_pylist()]
    values = {name: [[None if v is None else v + 0.0 for v in row] for row in rows] for name, rows in columns.items()}
    arrays = {"prompt_id": groups["prompt_id"], "completion_ids": ids, **values}
    return pa.table(arrays, schema=columns_schema(list(columns)))


def pair_columns_table(pairs: pa.Table, columns: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """Pair-level columns beside the pair_ids; −0.0 becomes 0.0."""
    values = {
        name: pa.array([None if v is None else v + 0.0 for v in row], pa.float64()) for name, row in columns.items()
    }
    return pa.table({"pair_id": pairs["pair_id"], **values})


@dataclass(frozen=True)
class Job:
    """What an actor needs to build its scorer; pickles small."""

    scorer: PooledScorer
    models: tuple[tuple[int | None, dict[str, Any]], ...]
    """The fold (None: all prompts) and the loading arguments of each model."""
    policy: dict[str, Any] | None = None
    """Loading arguments of the policy that generates."""
    cross_fit: CrossFit | None = None
    own_aspect: str | None = None
    tangent: str = ""
    """Folder of the tangent."""
    reader: PairReader | None = None
    reference: str = ""
    is_trained: bool = False
    """Whether the models come from a training: they may have prompts that they must not score."""

    def loading(self, storage: Storage, number: int = 0) -> dict[str, Any]:
        """Loading arguments of one model, on this machine."""
        return local(self.models[number][1], storage)


def local(settings: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """Loading arguments with the path of a model made here as a folder of this machine."""
    settings = dict(settings)
    made_here = settings.pop("made_here")
    return settings | ({"path": str(fetch_folder(storage, settings["path"]))} if made_here else {})


def build_score(job: Job, storage: Storage) -> Score:
    """What turns the groups of a shard into columns, as a configuration entry asks; loads its models."""
    scorer = job.scorer
    if isinstance(scorer, PairGradients):
        return _pair_gradients(job, storage)
    if isinstance(scorer, DirectionalLogps):
        from prefsel.score.influence import DirectionalScorer

        settings = job.loading(storage) | {"tangent_dir": str(fetch_folder(storage, job.tangent))}
        settings |= {"token_budget": scorer.token_budget, "method": scorer.method, "step": scorer.step}
        directional = DirectionalScorer(**settings)
        return lambda shard, groups: directional.score(groups)
    if isinstance(scorer, GeneratedReward):
        return _generated(job, scorer, storage)
    return _assigned(job, storage)


def _assigned(job: Job, storage: Storage) -> Score:
    """One model for all groups, or those of a training, each for the prompts it may score."""
    from prefsel.score.assigned import AssignedScorer, Candidate, trained_on
    from prefsel.score.scorers import CausalLogpsScorer, RewardModelScorer

    scorer, candidates = job.scorer, []
    for number, (fold, _) in enumerate(job.models):
        settings = job.loading(storage, number)
        made: Any
        if isinstance(scorer, RewardModel):
            name = scorer.aspect or scorer.model
            made = RewardModelScorer(**settings, token_budget=scorer.token_budget, name=name, heads=scorer.heads)
        else:
            assert isinstance(scorer, CausalLogps)
            settings |= {"name": scorer.model, "unconditional": scorer.unconditional}
            made = CausalLogpsScorer(**settings, token_budget=scorer.token_budget)
        candidates.append(Candidate(made, fold, trained_on(settings["path"])))
    if not job.is_trained:
        return lambda shard, groups: candidates[0].scorer.score(groups)
    assigned = AssignedScorer(candidates, job.cross_fit, job.own_aspect)

    def score(shard: ShardRef, groups: pa.Table) -> Any:
        pairs = Artifact(storage, f"pairs/{shard.source}").read(shard.shard, ["prompt_id", "aspect"])
        return assigned.score(groups, pairs)

    return score


def _generated(job: Job, scorer: GeneratedReward, storage: Storage) -> Score:
    from prefsel.score.generated import GeneratedRewardScorer
    from prefsel.score.scorers import RewardModelScorer

    assert job.policy is not None
    rewards = RewardModelScorer(**job.loading(storage), token_budget=scorer.token_budget, name=scorer.model)
    sampling = scorer.model_dump(include={"temperature", "top_p", "max_new_tokens", "seed"})
    made = GeneratedRewardScorer(rewards=rewards, head=scorer.head, policy=local(job.policy, storage), **sampling)
    return lambda shard, groups: made.score(groups)


def _pair_gradients(job: Job, storage: Storage) -> Score:
    """Pair gradients of a shard's eligible pairs, with the reference's log-probs read beside them."""
    from prefsel.score.influence import PairGradientScorer

    settings, reader = job.loading(storage), job.reader
    assert reader is not None
    tangent, optimizer = str(fetch_folder(storage, job.tangent)), str(Path(settings["path"]) / "optimizer")
    scorer = PairGradientScorer(**settings, tangent_dir=tangent, optimizer_dir=optimizer)
    names = [f"logps_{job.reference}_{side}" for side in ("chosen", "rejected")]

    def score(shard: ShardRef, groups: pa.Table) -> Any:
        pairs, flat = reader.pairs(shard), reader.flat(shard)
        reference_N2 = np.stack([flat[name].to_numpy(zero_copy_only=False) for name in names], axis=1)
        return scorer.score_pairs(groups, pairs, reference_N2, pc.is_null(flat["dropped"]).to_numpy())

    return score


def scorer_job(lineage: Lineage, scorer: PooledScorer) -> Job:
    """What the actors of `scorer` need."""
    tangent = lineage.tangents[scorer.tangent] if isinstance(scorer, DirectionalLogps | PairGradients) else None
    name = tangent.model if tangent else scorer.model  # type: ignore[attr-defined]
    aspect = scorer.aspect if isinstance(scorer, RewardModel) else None
    refs = lineage.model_members(name, aspect)
    training = lineage.trainings.get(name)
    cross_fit = training.cross_fit if training else None
    # A derivative is taken in the precision of the gradient it is multiplied with, whatever the model scores in.
    dtype = {"dtype": tangent.dtype} if tangent else {}
    job = Job(
        scorer,
        tuple((member.fold, loading(lineage, name, ref) | dtype) for member, ref in refs.items()),
        cross_fit=cross_fit,
        own_aspect=aspect if cross_fit is None else None,
        is_trained=training is not None and tangent is None,
    )
    if isinstance(scorer, GeneratedReward):
        return replace(job, policy=loading(lineage, scorer.policy, lineage.model(scorer.policy)), is_trained=False)
    if tangent is None:
        return job
    reader = lineage.reader_of([lineage.logps_scorer(tangent.reference)], lengths=False)
    return replace(job, tangent=lineage.tangent_path(tangent.name), reader=reader, reference=tangent.reference)


def loading(lineage: Lineage, name: str, ref: ModelRef) -> dict[str, Any]:
    """What an actor needs to load a model."""
    more: dict[str, Any] = {"trust_remote_code": False, "gpus_per_replica": 1}
    spec = None if name in lineage.trainings else lineage.model_spec(name)
    if isinstance(spec, PretrainedModel):
        more = {key: getattr(spec, key) for key in more}
    more["revision"] = ref.revision
    return {"path": ref.path, "made_here": ref.made_here} | ref.settings | more


def score_one(lineage: Lineage, scorer: Scorer, progress: Progress) -> StageReport:
    """Run one scorer; returns counts in completions."""
    started = time.monotonic()
    label, storage = scorer_label(scorer), lineage.storage
    folder = lineage.columns_folder(scorer)
    groups = lineage.catalog.entries(storage, "groups")
    pending, done = pending_shards(lineage, folder, groups)
    if pending:
        items = [(shard, groups[shard.key].content) for shard in pending]
        if isinstance(scorer, Imported):
            with progress.track(f"score {label}", len(items)) as counter:
                shared = (imported_fields(scorer), storage, folder)
                over_shards(_import_shard, items, shared=shared, counter=counter)
        else:
            run_pool(scorer_job(lineage, scorer), label, storage, folder, items, progress)
        _, done = pending_shards(lineage, folder, groups)
    for source in lineage.catalog.sources_of():
        Artifact(storage, f"{folder}/{source}").compact()
    found = report(label, folder, folder.rsplit("@", 1)[1], done, len(pending), started, scorer)
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
    job: Job,
    label: str,
    storage: Storage,
    folder: str,
    items: Sequence[tuple[ShardRef, str]],
    progress: Progress,
) -> None:
    """Stream shards, with the hashes they are made from, through an actor pool."""
    pool = job.scorer.pool
    num_gpus = gpus_per_actor(pool, job.models[0][1])
    size = min(pool.size or fitting_actors(pool, num_gpus), len(items))
    require_cpus(pool, pool.min_size or size)
    strategy = ray.data.ActorPoolStrategy(size=size)
    if pool.min_size:
        strategy = ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size)
    rows = [{"source": shard.source, "shard": shard.shard, "made_from": made_from} for shard, made_from in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ScoreShards,
        fn_constructor_kwargs={"job": job, "storage": storage, "folder": folder},
        batch_size=1,
        compute=strategy,
        num_gpus=num_gpus,
        num_cpus=pool.num_cpus,
    )
    with progress.track(f"score {label}", len(rows)) as counter, known_errors():
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
    facts: dict[str, float] = {}
    for info in infos:
        for name, value in info["counters"].items():
            counters[name] = counters.get(name, 0) + value
        for name, value in info.get("facts", {}).items():
            facts[name] = max(facts.get(name, value), value)
    bounds: dict[str, list[float]] = {}
    for entry in done.values():
        for name, column in entry.columns.items():
            if column["min"] is not None:
                low, high = bounds.get(name, [column["min"], column["max"]])
                bounds[name] = [min(low, column["min"]), max(high, column["max"])]
    return StageReport(
        stage="score",
        name=label,
        unit="pairs" if isinstance(scorer, PairGradients) else "completions",
        rows_in=completions,
        rows_out=completions - sum(dropped.values()),
        dropped=dropped,
        shards=len(done),
        computed_shards=computed,
        seconds=time.monotonic() - started,
        artifact=folder,
        fingerprint=fp,
        details={"kind": scorer.kind, "counters": counters, "range": bounds}
        | ({"facts": facts} if facts else {})
        | ({"padded_because": padded} if padded else {}),
    )


# -------------------------------------------------------------------------------------------------------- tangents


def make_tangent(lineage: Lineage, name: str, progress: Progress) -> StageReport:
    """The mean validation gradient of a model, preconditioned where asked; one task, one folder.

    Raises:
        UserError: no validation pair, a stratum without one, or a model without the optimizer's state it needs.
    """
    started = time.monotonic()
    spec, path = lineage.tangents[name], lineage.tangent_path(name)
    if (done := load_summary(lineage.storage, path)) is not None:
        return done
    eligible = load_summary(lineage.storage, lineage.eligible_folder)
    assert eligible is not None, "eligibility is complete before tangents are made"
    if not eligible.dropped.get("validation"):
        hint = "set split.validation, or give a source the role validation"
        raise UserError(f"tangents.{name}: no pair is in the part 'validation'; {hint}")
    reader = lineage.reader_of([lineage.logps_scorer(spec.reference)], lengths=False)
    part = Part(reader, tuple(lineage.catalog.shards), "validation")
    settings = loading(lineage, spec.model, lineage.model(spec.model))
    pairs = PairSource(part, reference=spec.reference)
    gpus = gpus_per_actor(Pool(), settings)
    task = ray.remote(num_gpus=gpus)(_make_tangent)
    with progress.track(f"tangent {name}", 1, "tangents") as counter:
        facts = unwrap(task.remote(lineage.storage, spec, settings, pairs, path))
        counter.advance()
    report = StageReport(
        stage="tangent",
        name=name,
        unit="pairs",
        rows_in=facts["rows_in"],
        rows_out=facts["num_pairs"],
        dropped=facts["dropped"],
        shards=1,
        computed_shards=1,
        seconds=time.monotonic() - started,
        artifact=path,
        fingerprint=path.rsplit("@", 1)[1],
        details=facts,
    )
    save_summary(lineage.storage, report)
    return report


def _make_tangent(
    storage: Storage, spec: Tangent, settings: dict[str, Any], pairs: PairSource, path: str
) -> dict[str, Any]:
    """Read the validation pairs, compute, commit."""
    from prefsel.score.validation import make_tangent

    table, dropped = pairs.table()
    if table is None:
        raise UserError(f"tangents.{spec.name}: no validation pair has log-probs of {spec.reference!r}")
    with tempfile.TemporaryDirectory() as folder:
        facts = make_tangent(spec, local(settings, storage), table, Path(folder))
        facts["rows_in"] = table.num_rows + sum(dropped.values())
        facts["dropped"] = facts["dropped"] | dropped
        commit_folder(storage, {"": Path(folder)}, path, facts)
    return facts
