"""Prompts → groups: a pool of policies answers shards of prompts, which are committed as groups and quarantine."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefsel.config import GenerationOptions
from prefsel.errors import UserError
from prefsel.generate.answered import Answered, Said, answered
from prefsel.generate.join import join_answers
from prefsel.generate.requests import PolicyText, Question
from prefsel.plan.made import Made
from prefsel.plan.models import find_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plugins.failures import naming_plugins
from prefsel.plugins.registry import loaded
from prefsel.progress import Progress
from prefsel.schema import RESPONSES, has_rest
from prefsel.stages.policy import load_policy
from prefsel.stages.pool import PoolWork, Work, run_pool
from prefsel.stages.score import loading
from prefsel.stages.tasks import map_shards
from prefsel.stages.vllm import ShardWork, VllmWork
from prefsel.workspace.catalog import ShardRef, required_entries
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage


class AnswerShards:
    """Ray Data actor: loads the policy once, then turns shards of prompts into committed groups."""

    def __init__(
        self,
        *,
        policy: Mapping[str, Any],
        label: str,
        options: GenerationOptions,
        storage: Storage,
        prompts: str,
        plugins: Sequence[str] = (),
    ) -> None:
        """Begin to load, and return at once: what fails is told at the first shard.

        Args:
            policy: Loading arguments of the model.
            label: Its name, for the quarantine.
            options: How it answers.
            storage: The workspace.
            prompts: Folder of the prompts.
            plugins: Modules to load before the policy.
        """
        self._storage, self._prompts, self._label = storage, prompts, label
        self._turn = threading.Lock()
        self._loaded = load_policy(policy, options, storage, plugins)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer one shard (`batch_size=1`); returns its key and its new tokens, when it is committed."""
        source, shard, made_from = (str(batch[key][0]) for key in ("source", "shard", "made_from"))
        with naming_plugins():
            tokens = self.answer(source, shard, made_from)
        return {"source": [source], "shard": [shard], "tokens": [tokens]}

    def answer(self, source: str, shard: str, made_from: str) -> int:
        """Read a shard of prompts, answer it, commit what cannot be used and then the groups.

        Returns:
            New tokens; 0 where it was there already.
        """
        groups = Artifact(self._storage, f"groups/{source}")
        if groups.is_done(shard, made_from):
            return 0
        attempt, started = groups.log_attempt(shard), time.monotonic()
        prompts = Artifact(self._storage, self._prompts).read(shard)
        policy = self._loaded.result()
        with self._turn:
            answered = policy.answer(prompts, label=self._label)
        told = {"seconds": time.monotonic() - started, "slow_because": policy.generator.slow_because}
        ignored = policy.generator.ignored_generation_settings
        commit_answered(self._storage, ShardWork(source, shard, made_from, attempt), answered, told, ignored)
        return int(answered.counters.get("decoded_tokens", 0))


@dataclass(frozen=True)
class PromptQuestions:
    """Shards of prompts as questions to vLLM, of which they make what `AnswerShards` does."""

    label: str
    """Name of the policy, for the quarantine."""
    options: GenerationOptions
    storage: Storage
    prompts: str
    """Folder of the prompts."""

    def ask(self, source: str, shard: str) -> list[Question]:
        """Every prompt, for all samples."""
        rows = Artifact(self.storage, self.prompts).read(shard).to_pylist()
        return [Question(row["prompt_id"], row["prompt"], range(self.options.samples)) for row in rows]

    def commit(self, shard: ShardWork, said: Sequence[Said], counters: dict[str, float], policy: PolicyText) -> None:
        """As groups and quarantine."""
        prompts = Artifact(self.storage, self.prompts).read(shard.shard)
        found = answered(prompts, said, self.options, label=self.label, spent=counters)
        commit_answered(self.storage, shard, found, {"slow_because": ""}, policy.ignored)


def commit_answered(
    storage: Storage, shard: ShardWork, answered: Answered, told: dict[str, Any], ignored: Mapping[str, Any]
) -> None:
    """Commit what cannot be used of a shard, and then its groups.

    Args:
        storage: The workspace.
        shard: Which one.
        answered: What became of its prompts.
        told: What else its ledger says.
        ignored: The model's own generation settings that were not applied.
    """
    groups, quarantine = (Artifact(storage, f"{kind}/{shard.source}") for kind in ("groups", "quarantine"))
    attempt = quarantine.log_attempt(shard.shard)
    quarantine.commit(shard.shard, answered.quarantine, made_from=shard.made_from, attempt=attempt)
    info = {"asked": answered.asked, "dropped": answered.dropped, "examples": answered.examples}
    info |= {"counters": answered.counters, **told}
    info |= {"ignored_settings": {name: repr(value) for name, value in ignored.items()}}
    info |= {"has_rest": True} if has_rest(answered.groups) else {}
    groups.commit(shard.shard, answered.groups, made_from=shard.made_from, attempt=shard.attempt, info=info)


def answering_work(plan: Plan, node: Node, prompts: str) -> Work:
    """How the engine that the configuration names answers shards of prompts.

    Args:
        plan: Where the model is found.
        node: The groups.
        prompts: Folder of the prompts.
    """
    options, policy = node.spec.generation, loading(find_model(plan, node.name))
    said = {"label": node.name, "options": options, "storage": plan.storage, "prompts": prompts}
    known: dict[str, Any] = {"verb": "generate", "label": node.name, "folders": ("groups",), "storage": plan.storage}
    if options.engine == "vllm":
        return VllmWork(questions=PromptQuestions(**said), policy=policy, options=options, **known)
    return PoolWork(
        actor=AnswerShards,
        arguments={"policy": policy, "plugins": loaded(), **said},
        pool=options.pool,
        gpus_per_replica=policy["gpus_per_replica"],
        **known,
    )


def generate(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Answer the prompts of a corpus, as far as they are not answered by this model with this sampling.

    Raises:
        UserError: no response at all can be used; says why.
    """
    made: Made = node.spec
    if made.beside and node.name == made.answers:
        return join(plan, node, progress)
    started = time.monotonic()
    prompts = plan.node("prompts", made.prompts.name).path
    summary = load_summary(plan.storage, prompts)
    assert summary is not None, "prompts are chosen before they are answered"
    inputs = {name: content for name, content in summary.details["shards"]}
    source = node.path.removeprefix("groups/")
    artifact = Artifact(plan.storage, node.path)
    before = artifact.done(inputs)
    pending = {name: made_from for name, made_from in inputs.items() if name not in before}
    if pending:
        work = answering_work(plan, node, prompts)
        items = [(ShardRef(source, name, "", number), pending[name]) for number, name in enumerate(pending)]
        sizes = dict.fromkeys((shard.key for shard, _ in items), 1)
        run_pool(work, items, progress, sizes=sizes)
    seconds, done = time.monotonic() - started, artifact.done(inputs)
    report = answered_report(node, [done[name] for name in inputs], len(pending), seconds)
    if pending and made.generation.engine == "vllm":  # whose requests overlap: none has seconds of its own
        tokens = sum(done[name].info["counters"]["decoded_tokens"] for name in pending)
        report = replace(report, details=report.details | {"tokens_per_s": tokens / seconds})
    for line in notes(report):
        progress.line(f"generate  {node.name}: {line}")
    if not report.rows_out:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        first = "".join(f"\n  {reason}: {one}" for reason, one in report.details["examples"].items())
        raise UserError(f"generate {node.name}: none of {report.rows_in:,} responses can be used ({lost}){first}")
    artifact.compact()
    return report


def join(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Put the answers of several models to the same prompts into the same groups."""
    started = time.monotonic()
    made: Made = node.spec
    storage = plan.storage
    folders = [plan.node("groups", name).path for name in (made.policy, *made.beside)]
    summary = load_summary(storage, plan.node("prompts", made.prompts.name).path)
    assert summary is not None, "prompts are chosen before they are answered"
    names = [name for name, _ in summary.details["shards"]]
    known = [required_entries(storage, folder, names) for folder in folders]
    inputs = {name: hash_hex(*(entries[name].content for entries in known)) for name in names}
    artifact = Artifact(storage, node.path)
    done = artifact.done(inputs)
    pending = [(name, made_from) for name, made_from in inputs.items() if name not in done]
    with progress.track(f"join {node.name}", len(pending), commits=True) as counter:
        map_shards(_join_shard, pending, shared=(storage, folders, node.path), counter=counter)
    entries = artifact.done(inputs)
    doubles = sum(entry.info["dropped"]["duplicate_response"] for entry in entries.values())
    asked = sum(entry.info["asked"] for entry in entries.values())
    artifact.compact()
    return StageReport(
        stage="generate",
        name=node.name,
        unit="responses",
        rows_in=asked,
        rows_out=asked - doubles,
        dropped={"duplicate_response": doubles} if doubles else {},
        shards=len(names),
        computed_shards=len(pending),
        seconds=time.monotonic() - started,
        artifact=node.path,
        details={"corpus": made.name, "joined": [made.policy, *made.beside], "examples": {}},
    )


def _join_shard(item: tuple[str, str], shared: Any) -> None:
    (name, made_from), (storage, folders, path) = item, shared
    artifact = Artifact(storage, path)
    attempt = artifact.log_attempt(name)
    joined, doubles = join_answers([Artifact(storage, folder).read(name) for folder in folders])
    info: dict[str, Any] = {"asked": sum(map(len, joined[RESPONSES].to_pylist())) + doubles}
    info |= {"dropped": {"duplicate_response": doubles}} | ({"has_rest": True} if has_rest(joined) else {})
    artifact.commit(name, joined, made_from=made_from, attempt=attempt, info=info)


def answered_report(node: Node, entries: Sequence[Entry], computed: int, seconds: float) -> StageReport:
    """What became of the responses that the prompts of a corpus were asked for."""
    infos = [entry.info for entry in entries]
    counters: dict[str, float] = {}
    for info in infos:
        for name, value in info["counters"].items():
            counters[name] = counters.get(name, 0.0) + value
    examples: dict[str, str] = {}
    for info in infos:
        examples = {**info["examples"], **examples}
    dropped = merge_counts(info["dropped"] for info in infos)
    asked = sum(info["asked"] for info in infos)
    model_seconds = counters.get("seconds_model", 0.0)
    return StageReport(
        stage="generate",
        name=node.name,
        unit="responses",
        rows_in=asked,
        rows_out=asked - sum(dropped.values()),
        dropped=dropped,
        shards=len(entries),
        computed_shards=computed,
        seconds=seconds,
        artifact=node.path,
        details={
            "corpus": node.spec.name,
            "prompts": int(counters.get("prompts", 0)),
            "groups": sum(entry.rows for entry in entries),
            "counters": counters,
            "tokens_per_s": counters.get("decoded_tokens", 0.0) / model_seconds if model_seconds else None,
            "examples": examples,
            "slow_because": next((info["slow_because"] for info in infos if info["slow_because"]), ""),
            "ignored_settings": next((info["ignored_settings"] for info in infos if info["ignored_settings"]), {}),
            "generation": node.spec.generation.model_dump(mode="json"),
        },
    )


def notes(report: StageReport) -> list[str]:
    """What a user should know of a generation besides its counts; nothing where nothing was generated."""
    if not report.computed_shards:
        return []
    details, lines = report.details, []
    if details["slow_because"]:
        lines.append(f"prompts are not shared and batches not continuous: {details['slow_because']}")
    if details["ignored_settings"]:
        told = ", ".join(f"{name} {value}" for name, value in details["ignored_settings"].items())
        lines.append(f"the model's own generation settings are not applied: {told}")
    if details["tokens_per_s"]:
        lines.append(f"{details['counters']['decoded_tokens']:,.0f} tokens, {details['tokens_per_s']:,.0f} a second")
    return lines
