"""What a scorer's actors are told, and what they load from it: models that turn the groups of a shard into columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config import (
    CausalLogps,
    CrossFit,
    DirectionalLogps,
    GeneratedReward,
    PairGradients,
    PooledScorer,
    PretrainedModel,
    RewardModel,
    Scorer,
)
from prefsel.config.naming import scorer_label
from prefsel.pairs.reader import PairReader
from prefsel.plan.lineage import Lineage, ModelRef
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Job:
    """What an actor needs to build its scorer; pickles small."""

    scorer: PooledScorer
    models: tuple[tuple[int | None, dict[str, Any]], ...]
    """The fold (None: all prompts) and the loading arguments of each model."""
    label: str = ""
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


def loading(lineage: Lineage, name: str, ref: ModelRef) -> dict[str, Any]:
    """What an actor needs to load a model."""
    more: dict[str, Any] = {"trust_remote_code": False, "gpus_per_replica": 1}
    spec = None if name in lineage.trainings else lineage.model_spec(name)
    if isinstance(spec, PretrainedModel):
        more = {key: getattr(spec, key) for key in more}
    more["revision"] = ref.revision
    return {"path": ref.path, "made_here": ref.made_here} | ref.settings | more


def scorer_job(lineage: Lineage, scorer: Scorer) -> Job:
    """What the actors of `scorer` need; an imported one has none."""
    assert isinstance(scorer, PooledScorer)
    tangent = lineage.tangents[scorer.tangent] if isinstance(scorer, DirectionalLogps | PairGradients) else None
    name = tangent.model if tangent else scorer.model  # type: ignore[union-attr]
    aspect = scorer.aspect if isinstance(scorer, RewardModel) else None
    refs = lineage.model_members(name, aspect)
    training = lineage.trainings.get(name)
    cross_fit = training.cross_fit if training else None
    # A derivative is taken in the precision of the gradient it is multiplied with, whatever the model scores in.
    dtype = {"dtype": tangent.dtype} if tangent else {}
    job = Job(
        scorer,
        tuple((member.fold, loading(lineage, name, ref) | dtype) for member, ref in refs.items()),
        label=scorer_label(scorer),
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


# ------------------------------------------------------------------------------------------------------ in an actor

Compute = Callable[[], Sequence[Any]]
Begin = Callable[[ShardRef, pa.Table], Compute]
"""(shard, its groups) → what runs the models on them: one `ScoredShard` per job. Tokenising begins with the first call
and needs no model; the second one does."""


@dataclass(frozen=True)
class Loaded:
    """Models that stand ready."""

    begin: Begin
    flops_per_s: float | None
    """What their device makes of matrix products in their dtype; None where no F_min is counted to hold against it."""


def load(jobs: Sequence[Job], storage: Storage) -> Loaded:
    """Load the models of a job, or of several that share a pass over the shards; then probe the device.

    Raises:
        UserError: a model cannot be loaded.
    """
    from prefsel.score.probes import matmul_flops_per_s

    if len(jobs) > 1:
        begin, engines = _together(jobs, storage)
    else:
        begin, engines = _begin_of(jobs[0], storage)
    for engine in engines:
        _ = getattr(engine, "token_budget", None)  # probed now that all models are in memory
    flops_per_s = matmul_flops_per_s(engines[0].device, engines[0].dtype) if engines else None
    return Loaded(begin, flops_per_s)


Made = tuple[Begin, Sequence[Any]]
"""How a shard is begun, and what has the device and dtype of the models."""


def _begin_of(job: Job, storage: Storage) -> Made:
    """One scorer, as its configuration entry asks."""
    scorer = job.scorer
    if isinstance(scorer, PairGradients):
        return _pair_gradients(job, storage)
    if isinstance(scorer, GeneratedReward):
        return _generated(job, scorer, storage)
    if isinstance(scorer, DirectionalLogps):
        from prefsel.score.influence import DirectionalScorer

        settings = job.loading(storage) | {"tangent_dir": str(fetch_folder(storage, job.tangent))}
        settings |= {"token_budget": scorer.token_budget, "method": scorer.method, "step": scorer.step}
        directional = DirectionalScorer(**settings)
        return _windowed(directional), [one for one in (directional.engine, directional.checker) if one]
    return _assigned(job, storage)


def _windowed(scorer: Any) -> Begin:
    """A scorer that prepares with `begin` and runs its model with `score`."""

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        begun = scorer.begin(groups)
        return lambda: [scorer.score(begun)]

    return begin


def _model_scorer(job: Job, storage: Storage, number: int) -> Any:
    """A causal or a reward scorer of one of the job's models."""
    from prefsel.score.scorers import CausalLogpsScorer, RewardModelScorer

    scorer, settings = job.scorer, job.loading(storage, number)
    if isinstance(scorer, RewardModel):
        name = scorer.aspect or scorer.model
        settings |= {"token_budget": scorer.token_budget, "compile": scorer.compile}
        return RewardModelScorer(**settings, name=name, heads=scorer.heads)
    assert isinstance(scorer, CausalLogps)
    settings |= {"token_budget": scorer.token_budget, "compile": scorer.compile}
    return CausalLogpsScorer(**settings, name=scorer.model, unconditional=scorer.unconditional)


def _together(jobs: Sequence[Job], storage: Storage) -> Made:
    from prefsel.score.multi_model import TogetherScorer

    together = TogetherScorer([_model_scorer(job, storage, 0) for job in jobs])

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        return partial(together.score, together.begin(groups))

    return begin, together.engines


def _assigned(job: Job, storage: Storage) -> Made:
    """One model for all groups, or those of a training, each for the prompts it may score."""
    from prefsel.score.cross_fit_scoring import AssignedScorer, Candidate, trained_on

    candidates = []
    for number, (fold, _) in enumerate(job.models):
        seen = trained_on(job.loading(storage, number)["path"])
        candidates.append(Candidate(_model_scorer(job, storage, number), fold, seen))
    engines = [candidate.scorer.engine for candidate in candidates]
    if not job.is_trained:
        return _windowed(candidates[0].scorer), engines
    assigned = AssignedScorer(candidates, job.cross_fit, job.own_aspect)

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        pairs = Artifact(storage, f"pairs/{shard.source}").read(shard.shard, ["prompt_id", "aspect"])
        compute = assigned.begin(groups, pairs)
        return lambda: [compute()]

    return begin, engines


def _generated(job: Job, scorer: GeneratedReward, storage: Storage) -> Made:
    from prefsel.score.generated import GeneratedRewardScorer
    from prefsel.score.scorers import RewardModelScorer

    assert job.policy is not None
    rewards = RewardModelScorer(
        **job.loading(storage), token_budget=scorer.token_budget, compile=scorer.compile, name=scorer.model
    )
    sampling = scorer.model_dump(include={"temperature", "top_p", "max_new_tokens", "seed"})
    made = GeneratedRewardScorer(rewards=rewards, head=scorer.head, policy=local(job.policy, storage), **sampling)
    return lambda shard, groups: lambda: [made.score(groups)], []


def _pair_gradients(job: Job, storage: Storage) -> Made:
    """Pair gradients of a shard's eligible pairs, with the reference's log-probs read beside them."""
    from prefsel.score.influence import PairGradientScorer

    settings, reader = job.loading(storage), job.reader
    assert reader is not None
    tangent, optimizer = str(fetch_folder(storage, job.tangent)), str(Path(settings["path"]) / "optimizer")
    scorer = PairGradientScorer(**settings, tangent_dir=tangent, optimizer_dir=optimizer)
    names = [f"logps_{job.reference}_{side}" for side in ("chosen", "rejected")]

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        pairs, flat = reader.pairs(shard), reader.flat(shard)
        reference_N2 = np.stack([flat[name].to_numpy(zero_copy_only=False) for name in names], axis=1)
        wanted = pc.is_null(flat["dropped"]).to_numpy()
        return lambda: [scorer.score_pairs(groups, pairs, reference_N2, wanted)]

    return begin, [scorer]
