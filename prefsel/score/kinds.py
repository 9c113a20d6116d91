"""Every kind of scorer that actors run, and how each is loaded; several jobs may share a pass over the shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config import PooledScorer
from prefsel.errors import PrefselError, UserError
from prefsel.plugins.registry import find
from prefsel.score.contract import Begin, Compute, Loader, Ready
from prefsel.score.job import Job, local
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Loaded:
    """Models that stand ready."""

    begin: Begin
    flops_per_s: float | None
    """What their device makes of matrix products in their dtype; None where no F_min is counted to hold against it."""


def load(jobs: Sequence[Job], storage: Storage) -> Loaded:
    """Load the models of a job, or of several that share a pass over the shards; then probe the device.

    Raises:
        UserError: a model cannot be loaded, or no loader knows this kind of scorer.
    """
    ready = _load_together(jobs, storage) if len(jobs) > 1 else load_one(jobs[0], storage)
    for engine in ready.engines:
        _ = getattr(engine, "token_budget", None)  # probed now that all models are in memory
    first = next(iter(ready.engines), None)
    if first is None:
        return Loaded(ready.begin, None)
    from prefsel.score.probes import matmul_flops_per_s  # and with it torch, which functions of numbers do not need

    return Loaded(ready.begin, matmul_flops_per_s(first.device, first.dtype))


def load_one(job: Job, storage: Storage) -> Ready:
    """Load one scorer, as its kind asks; errors as `load`."""
    ready = loader_of(job.label, job.scorer)(job, storage)
    if not isinstance(ready, Ready):
        who = f"score {job.label}: kind {job.scorer.kind!r}, loaded by {origin(job.scorer)}"
        raise PrefselError(f"{who}: the loader gave a {type(ready).__name__}; valid: a prefsel.score.contract.Ready")
    return ready


def loader_of(label: str, scorer: Any) -> Loader:
    """The loader of a scorer's kind, of this package or from elsewhere.

    Args:
        label: Of the scorer, for the error.
        scorer: Its record.

    Raises:
        UserError: The kind has no loader, or its record lacks what every scorer on actors has.
    """
    kind, record = scorer.kind, type(scorer)
    if not isinstance(scorer, PooledScorer):
        raise UserError(
            f"scorers.{label}: kind {kind!r} runs on actors, and its record {record.__name__} in {record.__module__} "
            "says nothing of them; derive it from PooledScorer"
        )
    if kind in KINDS:
        return KINDS[kind]
    plugin = find("scorers", kind)
    if plugin is None:
        raise UserError(
            f"scorers.{label}: kind {kind!r} has no loader; add one to KINDS in prefsel/score/kinds.py, which has "
            f"{', '.join(KINDS)}"
        )
    found: Loader = plugin.found.load
    return found


def origin(scorer: Any) -> str:
    """Where the loader of a scorer's kind lies, for errors: its module."""
    loader = inspect.unwrap(loader_of(scorer.label, scorer))
    return str(getattr(loader, "__module__", None) or getattr(loader, "func", loader).__module__)


def _windowed(scorer: Any) -> Begin:
    """`Begin` of a scorer that prepares with `begin(groups)` and runs its model with `score(what that gave)`."""

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        begun = scorer.begin(groups)
        return lambda: [scorer.score(begun)]

    return begin


def _load_together(jobs: Sequence[Job], storage: Storage) -> Ready:
    """Causal models that need the same tokens, in one pass."""
    from prefsel.score.multi_model import MultiModelScorer

    together = MultiModelScorer([_causal_scorer(job, storage) for job in jobs])

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        return partial(together.score, together.begin(groups))

    return Ready(begin, together.engines)


def _causal_scorer(job: Job, storage: Storage, number: int = 0) -> Any:
    """Log-probs of one of the job's models."""
    from prefsel.score.scorers import CausalLogpsScorer

    options = job.scorer.model_dump(include={"token_budget", "compile", "unconditional"})
    return CausalLogpsScorer(**job.loading(storage, number), **options, name=job.scorer.model)  # type: ignore[attr-defined]


def _reward_scorer(job: Job, storage: Storage, number: int = 0) -> Any:
    """Rewards of one of the job's models."""
    from prefsel.score.scorers import RewardModelScorer

    options = job.scorer.model_dump(include={"token_budget", "compile", "heads"})
    name = job.scorer.own_aspect or job.scorer.model  # type: ignore[attr-defined]
    return RewardModelScorer(**job.loading(storage, number), **options, name=name)


def _cross_fitted(make: Callable[[Job, Storage, int], Any], job: Job, storage: Storage) -> Ready:
    """One model for all groups, or those of a training, each for the prompts that it may score."""
    from prefsel.score.cross_fit_scoring import CrossFitScorer, FoldModel, trained_on

    candidates = []
    for number, (fold, _) in enumerate(job.models):
        seen = trained_on(job.loading(storage, number)["path"])
        candidates.append(FoldModel(make(job, storage, number), fold, seen))
    engines = [candidate.scorer.engine for candidate in candidates]
    if not job.is_trained:
        return Ready(_windowed(candidates[0].scorer), engines)
    assigned = CrossFitScorer(candidates, job.cross_fit, job.own_aspect)

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        pairs = Artifact(storage, shard.pairs_path).read(shard.shard, ["prompt_id", "aspect"])
        compute = assigned.begin(groups, pairs)
        return lambda: [compute()]

    return Ready(begin, engines)


def generated_reward(job: Job, storage: Storage) -> Ready:
    """Rewards of what a policy answers itself."""
    from prefsel.score.generated import GeneratedRewardScorer
    from prefsel.score.scorers import RewardModelScorer

    assert job.policy is not None, "a job of this kind names the policy"
    options = job.scorer.model_dump(include={"token_budget", "compile"})
    rewards = RewardModelScorer(**job.loading(storage), **options, name=job.scorer.model)  # type: ignore[attr-defined]
    sampling = job.scorer.model_dump(include={"head", "name", "temperature", "top_p", "max_new_tokens", "seed"})
    made = GeneratedRewardScorer(rewards=rewards, policy=local(job.policy, storage), **sampling)
    return Ready(lambda shard, groups: lambda: [made.score(groups)], [])


def directional_logps(job: Job, storage: Storage) -> Ready:
    """Derivatives of log-probs along a tangent."""
    from prefsel.score.influence import DirectionalScorer

    options = job.scorer.model_dump(include={"token_budget", "method", "step"})
    scorer = DirectionalScorer(**job.loading(storage), **options, tangent_dir=str(fetch_folder(storage, job.tangent)))
    return Ready(_windowed(scorer), [one for one in (scorer.engine, scorer.checker) if one])


def pair_gradients(job: Job, storage: Storage) -> Ready:
    """Pair gradients of a shard's eligible pairs, with the reference's log-probs read beside them."""
    from prefsel.score.influence import PairGradientScorer

    settings, reader = job.loading(storage), job.reader
    assert reader is not None, "a job of this kind has a reader"
    tangent, optimizer = str(fetch_folder(storage, job.tangent)), str(Path(settings["path"]) / "optimizer")
    scorer = PairGradientScorer(**settings, tangent_dir=tangent, optimizer_dir=optimizer)
    names = [f"logps_{job.reference}_{side}" for side in ("chosen", "rejected")]

    def begin(shard: ShardRef, groups: pa.Table) -> Compute:
        pairs, flat = reader.pairs(shard), reader.flat(shard)
        reference_N2 = np.stack([flat[name].to_numpy(zero_copy_only=False) for name in names], axis=1)
        wanted = pc.is_null(flat["dropped"]).to_numpy()
        return lambda: [scorer.score_pairs(groups, pairs, reference_N2, wanted)]

    return Ready(begin, [scorer])


def divergence(job: Job, storage: Storage) -> Ready:
    """KL of a model to another one, both loaded here."""
    from prefsel.score.divergence import DivergenceScorer

    assert job.beside is not None, "a job of this kind names the other model"
    options = job.scorer.model_dump(include={"token_budget"})
    name = job.scorer.model  # type: ignore[attr-defined]
    scorer = DivergenceScorer(**job.loading(storage), **options, name=name, reference=local(job.beside, storage))
    return Ready(_windowed(scorer), [scorer.engine])


def function(job: Job, storage: Storage) -> Ready:
    """Rewards of a function of the user's."""
    from prefsel.score.function import FunctionScorer

    scorer = FunctionScorer(job.scorer.name, job.scorer.function)  # type: ignore[attr-defined]
    return Ready(lambda shard, groups: lambda: [scorer.score(groups)])


KINDS: Final[Mapping[str, Loader]] = {
    "causal_logps": partial(_cross_fitted, _causal_scorer),
    "reward_model": partial(_cross_fitted, _reward_scorer),
    "generated_reward": generated_reward,
    "function": function,
    "divergence": divergence,
    "directional_logps": directional_logps,
    "pair_gradients": pair_gradients,
}
"""`kind` of a record in `config/scorers.py` → how its job is loaded in an actor."""
