"""Prompts of a selection's pairs → what a policy makes of them, shard by shard, kept beside the new prompts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefsel.config import GenerationOptions
from prefsel.generate.answered import Said
from prefsel.generate.requests import PolicyText, Question
from prefsel.plan.models import find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plugins.failures import naming_plugins
from prefsel.plugins.registry import loaded
from prefsel.progress import Progress
from prefsel.selfplay.shard import (
    answers_table,
    chosen_prompts,
    rewrite,
    rewriting_options,
    rewritings,
)
from prefsel.selfplay.strategies import Strategy
from prefsel.stages.policy import load_policy
from prefsel.stages.pool import PoolWork, Work, run_pool
from prefsel.stages.score import loading
from prefsel.stages.vllm import ShardWork, VllmWork
from prefsel.workspace.catalog import ShardRef, required_entries
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


class RewriteShards:
    """Ray Data actor: loads the policy once, then has it rewrite the chosen prompts of shards of groups."""

    def __init__(
        self,
        *,
        policy: Mapping[str, Any],
        options: GenerationOptions,
        strategies: Sequence[Strategy],
        storage: Storage,
        selection: str,
        folder: str,
        plugins: Sequence[str] = (),
    ) -> None:
        """Begin to load, and return at once: what fails is told at the first shard.

        Args:
            policy: Loading arguments of the model.
            options: How it is asked.
            strategies: What it is asked for.
            storage: The workspace.
            selection: Folder of the selection whose pairs' prompts are rewritten, without the source.
            folder: Where its answers go, without the source.
            plugins: Modules to load before the policy.
        """
        self._storage, self._strategies, self._selection, self._folder = storage, strategies, selection, folder
        self._turn = threading.Lock()
        self._loaded = load_policy(policy, options, storage, plugins)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the chosen prompts of one shard (`batch_size=1`); returns its key and its new tokens."""
        source, shard, made_from = (str(batch[key][0]) for key in ("source", "shard", "made_from"))
        answers = Artifact(self._storage, f"{self._folder}/{source}")
        tokens = 0
        if not answers.is_done(shard, made_from):
            attempt = answers.log_attempt(shard)
            chosen = _chosen(self._storage, self._selection, source, shard)
            with naming_plugins():
                policy = self._loaded.result()
                with self._turn:
                    before = policy.generator.counters["decoded_tokens"]
                    table = rewrite(policy, chosen, self._strategies)
                    tokens = int(policy.generator.counters["decoded_tokens"] - before)
            answers.commit(shard, table, made_from=made_from, attempt=attempt, info={"tokens": tokens})
        return {"source": [source], "shard": [shard], "tokens": [tokens]}


def rewrite_all(plan: Plan, node: Node, progress: Progress) -> list[ShardRef]:
    """Have the policy rewrite what was chosen; returns the shards that have something chosen."""
    spec, made, storage = node.spec, plan.made, plan.storage
    assert made is not None, "prompts are evolved for a corpus that is made"
    selection = spec.seeds.node("selection", spec.selection).path
    (source,) = spec.seeds.catalog.sources
    seeds = spec.seeds.catalog.shards
    chosen = required_entries(storage, f"{selection}/{source.name}", [shard.shard for shard in seeds])
    shards = [shard for shard in seeds if chosen[shard.shard].rows]
    folder = answers_folder(node)
    inputs = {shard.shard: chosen[shard.shard].content for shard in shards}
    known = Artifact(storage, f"{folder}/{source.name}").done(inputs)
    items = [(shard, inputs[shard.shard]) for shard in shards if shard.shard not in known]
    if items:
        work = _rewriting_work(plan, node, folder, selection)
        run_pool(work, items, progress, sizes={shard.key: chosen[shard.shard].rows for shard, _ in items})
    return shards


def answers_folder(node: Node) -> str:
    """Folder of what the policy wrote, beside that of the prompts."""
    return node.path.replace("prompts/", "rewritten/", 1)


def strategies_of(node: Node) -> tuple[Strategy, ...]:
    """What is asked, word by word as the prompts are named by it: workers have other files, and files change."""
    return tuple(Strategy.model_validate(one) for one in node.recipe["settings"]["strategies"])


@dataclass(frozen=True)
class RewritingQuestions:
    """The chosen prompts of shards of groups as questions to vLLM, of which they make what `RewriteShards` does."""

    strategies: tuple[Strategy, ...]
    storage: Storage
    selection: str
    folder: str

    def ask(self, source: str, shard: str) -> list[Question]:
        """Every chosen prompt by every strategy, whose number is that of the sample."""
        prompts = _chosen(self.storage, self.selection, source, shard)
        ids = prompts["prompt_id"].to_pylist()
        return [
            Question(ids[one.place], one.messages, range(one.number, one.number + 1))
            for one in rewritings(prompts, self.strategies)
            if one.messages is not None
        ]

    def commit(self, shard: ShardWork, said: Sequence[Said], counters: dict[str, float], policy: PolicyText) -> None:
        """As a table of answers."""
        prompts = _chosen(self.storage, self.selection, shard.source, shard.shard)
        table = answers_table(prompts, rewritings(prompts, self.strategies), said)
        answers = Artifact(self.storage, f"{self.folder}/{shard.source}")
        info = {"tokens": int(counters["decoded_tokens"])}
        answers.commit(shard.shard, table, made_from=shard.made_from, attempt=shard.attempt, info=info)


def _chosen(storage: Storage, selection: str, source: str, shard: str) -> pa.Table:
    groups = Artifact(storage, f"groups/{source}").read(shard, ["prompt_id", "prompt"])
    return chosen_prompts(groups, Artifact(storage, f"{selection}/{source}").read(shard, ["prompt_id"]))


def _rewriting_work(plan: Plan, node: Node, folder: str, selection: str) -> Work:
    """How the engine that the configuration names rewrites what was chosen."""
    spec, made, storage = node.spec, plan.made, plan.storage
    assert made is not None, "prompts are evolved for a corpus that is made"
    policy = loading(find_model(plan, made.policy))
    options = rewriting_options(made.generation, spec.evolve)
    said: dict[str, Any] = {
        "strategies": strategies_of(node),
        "storage": storage,
        "selection": selection,
        "folder": folder,
    }
    known: dict[str, Any] = {"verb": "evolve", "label": made.policy, "folders": (folder,), "storage": storage}
    if options.engine == "vllm":
        return VllmWork(questions=RewritingQuestions(**said), policy=policy, options=options, **known)
    return PoolWork(
        actor=RewriteShards,
        arguments={"policy": policy, "options": options, "plugins": loaded(), **said},
        pool=options.pool,
        gpus_per_replica=policy["gpus_per_replica"],
        **known,
    )
