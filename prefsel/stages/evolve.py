"""The best prompts of a corpus → new prompts: a policy rewrites them; what it wrote is checked against all there are.

    kept pairs ─▶ pool: answers, shard by shard ─▶ candidates ─▶ which of them were seen, or must stay unseen ─▶ prompts

Texts stay where they are: ids and hashes of the candidates travel to the corpus, and those that are met come back.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.config import GenerationOptions
from prefsel.errors import UserError
from prefsel.generate.answered import Said
from prefsel.generate.requests import PolicyText, Question
from prefsel.models.writer import as_they_came
from prefsel.plan.generated import prompts_before
from prefsel.plan.made import EvolvedPrompts
from prefsel.plan.models import find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plugins.failures import naming_plugins
from prefsel.plugins.registry import loaded
from prefsel.progress import Progress
from prefsel.score.job import local
from prefsel.select.eligible import Rules, base_codes, prompt_ids
from prefsel.selfplay.evolve import Evolved, Excluded, first_of_each, text_key
from prefsel.selfplay.shard import (
    answers_table,
    chosen_prompts,
    new_prompts,
    prompts_table,
    rewrite,
    rewriting_options,
    rewritings,
)
from prefsel.selfplay.strategies import Strategy
from prefsel.stages.policy import load_policy
from prefsel.stages.pool import PoolWork, Work, run_pool
from prefsel.stages.prompts import commit_prompts, prompts_report
from prefsel.stages.score import loading
from prefsel.stages.tasks import map_shards
from prefsel.stages.vllm import ShardWork, VllmWork
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact, Entry
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.storage import Storage


def _answers(node: Node) -> str:
    """Folder of what the policy wrote, beside that of the prompts."""
    return node.path.replace("prompts/", "rewritten/", 1)


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


def evolve_prompts(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Make new prompts of the prompts that a selection kept, all of which its policy is asked to rewrite.

    Raises:
        UserError: no new prompt is left; says why.
    """
    started = time.monotonic()
    spec: EvolvedPrompts = node.spec
    storage, path = plan.storage, node.path
    if (done := load_summary(storage, path)) is not None:
        return done
    shards = _rewrite_all(plan, node, progress)
    checks = Checks(storage, _answers(node), _strategies(node), spec.evolve.length_factor, _judges(plan, spec))
    found = map_shards(_candidates, shards, shared=checks)
    met = _met(plan, [one for many in found for one in many if isinstance(one, Evolved)])
    checked = map_shards(_checked, shards, shared=(checks, met))
    ways = [[one for one in many if isinstance(one, Evolved)] for many in checked]
    first = {(one.prompt_id, one.parent, one.strategy) for one in first_of_each(one for many in ways for one in many)}
    dropped = Counter(one for many in checked for one in many if isinstance(one, str))
    rows_in = sum(map(len, checked))
    dropped["seen_prompt"] += rows_in - sum(dropped.values()) - len(first)
    items = [(shard, [one for one in many if _key(one) in first]) for shard, many in zip(shards, ways)]
    work = [item for item in items if item[1]]
    shared = (storage, path, checks.answers, spec.per_shard)
    entries = [one for many in map_shards(_commit, work, shared=shared) for one in many]
    report = prompts_report(node, entries, rows_in, dict(+dropped), time.monotonic() - started)
    if not report.rows_out:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.dropped.items()))
        raise UserError(f"prompts {node.name}: no new prompt is left of {rows_in:,} rewritten ones ({lost})")
    save_summary(storage, report)
    return report


def _strategies(node: Node) -> tuple[Strategy, ...]:
    """What is asked, word by word as the prompts are named by it: workers have other files, and files change."""
    return tuple(Strategy.model_validate(one) for one in node.recipe["settings"]["strategies"])


def _key(one: Evolved) -> tuple[bytes, bytes, str]:
    return one.prompt_id, one.parent, one.strategy


def _rewrite_all(plan: Plan, node: Node, progress: Progress) -> list[ShardRef]:
    """Have the policy rewrite what was chosen; returns the shards that have something chosen."""
    spec, made, storage = node.spec, plan.made, plan.storage
    assert made is not None, "prompts are evolved for a corpus that is made"
    selection = spec.seeds.node("selection", spec.selection).path
    (source,) = spec.seeds.catalog.sources
    chosen = Artifact(storage, f"{selection}/{source.name}").entries()
    shards = [shard for shard in spec.seeds.catalog.shards if chosen[shard.shard].rows]
    folder = _answers(node)
    inputs = {shard.shard: chosen[shard.shard].content for shard in shards}
    known = Artifact(storage, f"{folder}/{source.name}").done(inputs)
    items = [(shard, inputs[shard.shard]) for shard in shards if shard.shard not in known]
    if items:
        work = _rewriting_work(plan, node, folder, selection)
        run_pool(work, items, progress, sizes={shard.key: chosen[shard.shard].rows for shard, _ in items})
    return shards


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
        "strategies": _strategies(node),
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


@dataclass(frozen=True)
class Checks:
    """What an answer is held against; pickles small."""

    storage: Storage
    answers: str
    """Folder of the answers, without the source."""
    strategies: tuple[Strategy, ...]
    length_factor: float | None
    judges: tuple[dict[str, Any], ...]
    """Loading arguments of the models that must be able to read a new prompt."""


@dataclass(frozen=True)
class Met:
    """Candidates that were met in the corpus."""

    seen: frozenset[bytes]
    """prompt_ids of any prompt there is."""
    excluded: Excluded
    """Of those that must stay unseen."""


def _judges(plan: Plan, spec: EvolvedPrompts) -> tuple[dict[str, Any], ...]:
    return tuple(loading(find_model(plan, name)) for name in spec.judges)


def _candidates(shard: ShardRef, checks: Checks) -> list[Evolved | str]:
    """The new prompts of a shard, whether or not they were seen."""
    return _checked(shard, (checks, Met(frozenset(), Excluded(frozenset(), frozenset()))))


def _checked(shard: ShardRef, shared: tuple[Checks, Met]) -> list[Evolved | str]:
    """The new prompts of a shard, or why there are none, in the order of its answers."""
    from prefsel.models.chat import Encoder
    from prefsel.models.loading import load_tokenizer

    checks, met = shared
    encoders = []
    for settings in checks.judges:
        found = local(settings, checks.storage)
        more = {key: found[key] for key in ("revision", "trust_remote_code")}
        encoders.append(Encoder(load_tokenizer(found["path"], **more), found["template"], found["max_length"]))

    def fits(messages: Sequence[Mapping[str, Any]]) -> bool:
        prompt, answer = messages[:-1], messages[-1:]
        return all(one.encode_groups([(prompt, [answer])], strict=False)[0].status == ["ok"] for one in encoders)

    answers = Artifact(checks.storage, f"{checks.answers}/{shard.source}").read(shard.shard)
    return list(
        new_prompts(
            answers,
            checks.strategies,
            length_factor=checks.length_factor,
            excluded=met.excluded,
            seen=met.seen,
            fits=fits,
        )
    )


def _met(plan: Plan, candidates: Sequence[Evolved]) -> Met:
    """Which candidates stand in the corpus, in an earlier round, or say what must stay unseen."""
    root, storage = plan.root, plan.storage
    catalog = root.catalog
    excluded, held_out = (prompt_ids(storage, catalog, role) for role in ("exclude", "holdout"))
    ids = frozenset(one.prompt_id for one in candidates)
    texts = frozenset(text_key(one.messages) for one in candidates)
    shared = (storage, Rules(root.config.split, excluded, held_out), ids, texts)
    hidden = [
        ShardRef(source.name, shard, source.role, 0)
        for source in catalog.sources
        if source.role == "exclude"
        for file in source.files
        for shard in file.shards
    ]
    found = map_shards(_met_in, [*catalog.prompt_shards, *hidden], shared=shared)
    seen = {one for ids, _, _ in found for one in ids}
    for folder in prompts_before(plan):
        artifact = Artifact(storage, folder)
        for shard in artifact.entries():
            seen |= ids.intersection(artifact.read(shard, ["prompt_id"])["prompt_id"].to_pylist())
    return Met(
        frozenset(seen),
        Excluded({one for _, ids, _ in found for one in ids}, {one for _, _, texts in found for one in texts}),
    )


def _met_in(shard: ShardRef, shared: Any) -> tuple[set[bytes], set[bytes], set[bytes]]:
    """Candidates that a shard of the corpus has: their ids, and ids and texts of those that must stay unseen."""
    storage, rules, ids, texts = shared
    table = Artifact(storage, f"groups/{shard.source}").read(shard.shard, ["prompt_id", "prompt"])
    seen = ids.intersection(table["prompt_id"].to_pylist())
    is_hidden_N = np.full(table.num_rows, True)
    if shard.role != "exclude":
        is_hidden_N = base_codes(table, shard, rules) >= 0
    hidden = table.filter(is_hidden_N)
    hidden_ids = ids.intersection(hidden["prompt_id"].to_pylist())
    keys = {text_key(as_they_came(one)) for one in hidden["prompt"].to_pylist()}
    return seen, hidden_ids, keys & texts


def _commit(item: tuple[ShardRef, list[Evolved]], shared: Any) -> list[Entry]:
    (shard, evolved), (storage, path, answers, per_shard) = item, shared
    table = Artifact(storage, f"{answers}/{shard.source}").read(shard.shard)
    return commit_prompts(storage, path, prompts_table(evolved, table), per_shard)
