"""Shards of questions through vLLM, by `ray.data.llm`: how it is set up, and how a shard stays the unit of commit.

    shard names ─task─▶ requests ─▶ engines (any order) ─▶ one actor: which shards are whole ─task─▶ commit ─▶ names

The engines are loaded once. Answers go from them to the actor that waits for the last one of a shard, and from there,
a whole shard in one row, to the task that commits it: no answer passes the driver, and what is lost with a process is
what was not whole yet. What is asked, and what is done with the answers, are the shards' own (`Questions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
from huggingface_hub import snapshot_download
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefsel.config import GenerationOptions
from prefsel.errors import IntegrityError, UserError, invalid
from prefsel.generate.answered import Said
from prefsel.generate.requests import (
    MAX_NAMED,
    PolicyText,
    Question,
    count_tokens,
    policy_text,
    requests_of,
    responses_of,
)
from prefsel.models.adapters import find_adapter
from prefsel.models.directory import reading
from prefsel.plugins.failures import prepared
from prefsel.stages.pool import fitting_actors, gpus_per_actor, require_cpus
from prefsel.stages.session import is_own, quiet_data
from prefsel.stages.tasks import known_errors
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

ENGINE = "vLLMEngineStage"
"""What Ray calls the part of a processor that runs vLLM."""
BATCH_SIZE = 64
"""Requests that travel together to an engine, and are asked again together when it dies."""
BATCHES_IN_HAND = 16
"""Of an engine: with 64 requests each they fill the 1 024 rows that vLLM runs side by side on a large GPU."""
TASK_CPUS = 0.5
"""CPUs of a task that reads or commits a shard: most of it waits for the workspace."""
SPARE_CPUS = 1
"""CPUs that must be left beside the engines, or nothing would ever be asked."""
GPU_SHARE = 0.9
"""Of a GPU's memory, what vLLM takes; of a part of a GPU that part of it."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What of a model's directory is needed without its weights."""
WHOLE = pa.schema(
    [
        *((name, pa.string()) for name in ("source", "shard", "made_from", "attempt")),
        *((name, pa.list_(pa.int64())) for name in ("question", "sample")),
        ("tokens", pa.list_(pa.list_(pa.int64()))),
    ]
)
"""All answers of one shard in a row."""


class Questions(Protocol):
    """What is asked about shards, and what becomes of the answers; pickles small."""

    def ask(self, source: str, shard: str) -> list[Question]:
        """The questions of a shard; the same whenever it is called."""

    def commit(self, shard: ShardWork, said: Sequence[Said], counters: dict[str, float], policy: PolicyText) -> None:
        """Commit what was said to each of them.

        Args:
            shard: Which one, and what the ledgers are to know of it.
            said: In the order of the questions.
            counters: Tokens that were read and written.
            policy: Who said it.
        """


@dataclass(frozen=True)
class ShardWork:
    """A shard that is worked on."""

    source: str
    shard: str
    made_from: str
    attempt: str
    """Of the first artifact that it is committed to."""


@dataclass(frozen=True)
class VllmWork:
    """Shards that vLLM answers, as `run_pool` takes them."""

    verb: str
    label: str
    questions: Questions
    policy: Mapping[str, Any]
    """Loading arguments of the model."""
    options: GenerationOptions
    folders: tuple[str, ...]
    """What is committed to, each with a folder per source; the one that is committed last comes first."""
    storage: Storage
    silence_s: None = None
    """Its engines watch themselves."""

    def is_done(self, shard: ShardRef, made_from: str) -> bool:
        """Whether all of a shard is committed."""
        return self.has(shard.source, shard.shard, made_from)

    def has(self, source: str, shard: str, made_from: str) -> bool:
        """`is_done` by names."""
        return all(Artifact(self.storage, f"{one}/{source}").is_done(shard, made_from) for one in self.folders)

    def text(self) -> PolicyText:
        """How the policy reads prompts, on this machine."""
        folder = model_folder(self.policy, self.storage, TEXT_FILES)
        return policy_text(folder, *(self.policy[key] for key in ("template", "max_length", "trust_remote_code")))

    def stream(self, items: Sequence[tuple[ShardRef, str]]) -> Iterator[dict[str, Any]]:
        """One pass: source, shard and number of tokens of every shard, when it is committed.

        Raises:
            UserError: The model or the cluster is none that vLLM can serve here.
            IntegrityError: Not all answers came; names prompts without one.
        """
        processor = self.processor(len(items))
        rows = [{"source": shard.source, "shard": shard.shard, "made_from": made_from} for shard, made_from in items]
        quiet_data()
        shards = ray.data.from_items(rows, override_num_blocks=len(rows))
        more: dict[str, Any] = {"fn_kwargs": {"work": self}, "num_cpus": TASK_CPUS}
        answers = processor(shards.flat_map(prepared(_requests), **more))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        whole = answers.map_batches(
            WholeShards,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0,
            # What waits there is lost with its node, so it waits where the driver would be lost as well.
            scheduling_strategy=here,
        )
        waiting = dict(((shard.source, shard.shard), made_from) for shard, made_from in items)
        with known_errors():
            for row in whole.map(prepared(_commit), **more).iter_rows():
                del waiting[row["source"], row["shard"]]
                yield row
        for (source, shard), made_from in waiting.items():
            if not self.has(source, shard, made_from):  # whose prompts are all refused is committed without a request
                ids = [one.prompt_id.hex() for one in self.questions.ask(source, shard)]
                raise IntegrityError(
                    f"{self.verb} {self.label}: not all answers to shard {source}/{shard} came back from vLLM, so "
                    f"none of its {len(ids)} questions is committed, the first to the prompts "
                    f"{', '.join(ids[:MAX_NAMED])}; run again to go on"
                )
            yield {"source": source, "shard": shard, "tokens": 0}

    def processor(self, num_shards: int) -> Any:
        """The processor of `ray.data.llm`, whose engines find the model's folder on the machine they start on.

        Args:
            num_shards: Shards that are left: there are never more engines.
        """
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        path, revision, pool = self.policy["path"], self.policy["revision"], self.options.pool
        if not self.policy["made_here"] and (adapter := find_adapter(path, revision)):
            raise UserError(f"{adapter.name}, which vLLM is not given here; merge it and name the merged model")
        num_gpus = gpus_per_actor(pool, self.policy["gpus_per_replica"])
        most = pool.size or (fitting_actors(pool, num_gpus) if num_gpus else 1)
        engines = (pool.min_size, pool.max_size) if pool.min_size and pool.max_size else (most, most)
        engines = (min(engines[0], num_shards), min(engines[1], num_shards))
        require_cpus(pool, engines[0], spare=SPARE_CPUS)
        folder = model_folder(self.policy, self.storage, TEXT_FILES)
        settings = processor_settings(self.policy, self.options, folder=folder, num_gpus=num_gpus, engines=engines)
        processor = build_processor(
            vLLMEngineProcessorConfig(**settings),
            postprocess=_answer,
            preprocess_map_kwargs={"num_cpus": TASK_CPUS},
            postprocess_map_kwargs={"num_cpus": TASK_CPUS},
        )
        engine = processor.get_stage_by_name(ENGINE)
        # As for every pool, see `pool`: on a Ray of this process a dead engine ends the pass.
        more = {"max_restarts": 0} if is_own() else {}
        # A copy: assigning to a stage makes Ray work out its GPUs anew, without the bundles that it was given.
        processor.stages[ENGINE] = engine.model_copy(
            update={
                "fn": _loading_here(engine.fn, dict(self.policy), self.storage),
                "map_batches_kwargs": engine.map_batches_kwargs | more,
            }
        )
        return processor


def processor_settings(
    policy: Mapping[str, Any],
    options: GenerationOptions,
    *,
    folder: str,
    num_gpus: float,
    engines: tuple[int, int],
) -> dict[str, Any]:
    """Arguments of `vLLMEngineProcessorConfig`.

    Args:
        policy: Loading arguments of the model.
        options: How it answers.
        folder: Where its configuration lies on this machine.
        num_gpus: GPUs that one engine reserves; 0: it runs on CPUs.
        engines: Fewest and most of them.

    Raises:
        UserError: An engine cannot be spread over so many GPUs.
    """
    workers = int(policy["gpus_per_replica"])
    if num_gpus != workers and not (workers == 1 and num_gpus < 1):
        valid = f"{workers}, the model's gpus_per_replica" + (", or a part of one GPU" if workers == 1 else "")
        raise invalid("pool.num_gpus", num_gpus, f"{valid}, for the engine vllm")
    engine = {
        "tensor_parallel_size": workers,
        "dtype": DTYPES[policy["dtype"]],
        "max_model_len": policy["max_length"],
        "trust_remote_code": policy["trust_remote_code"],
        # Pickled weights are never read.
        "load_format": "safetensors",
        # Else vLLM would draw by the model's own generation settings, which are told and not applied.
        "generation_config": "vllm",
        # Prompts come as tokens, and tokens are what is wanted back.
        "skip_tokenizer_init": True,
        # The samples of a prompt read it once.
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if 0 < num_gpus < 1:
        engine["gpu_memory_utilization"] = GPU_SHARE * num_gpus
    # The actor itself takes a CPU of the first bundle.
    bundles = [{"CPU": max(1.0, options.pool.num_cpus), "GPU": num_gpus / workers}]
    bundles += [{"CPU": 0.0, "GPU": num_gpus / workers}] * (workers - 1)
    return {
        "model_source": folder,
        "engine_kwargs": engine,
        "concurrency": engines,
        "batch_size": BATCH_SIZE,
        "max_concurrent_batches": BATCHES_IN_HAND,
        **dict.fromkeys(("chat_template_stage", "tokenize_stage", "detokenize_stage"), False),
        "log_engine_metrics": False,
        # On one machine: the actor fetches the model's folder there.
        "placement_group_config": {"bundles": bundles, "strategy": "STRICT_PACK"},
    }


def model_folder(policy: Mapping[str, Any], storage: Storage, patterns: Sequence[str]) -> str:
    """The directory of a model on this machine; a hub's is that of the commit it was identified by.

    Args:
        policy: Loading arguments of the model.
        storage: The workspace.
        patterns: Of the names of the files that are needed.
    """
    path = policy["path"]
    if policy["made_here"]:
        return str(fetch_folder(storage, path, patterns))
    if Path(path).is_dir():
        return str(path)
    with reading(f"model {path}: cannot be had"):
        return str(snapshot_download(path, revision=policy["revision"], allow_patterns=list(patterns)))


def _loading_here(base: type, policy: Mapping[str, Any], storage: Storage) -> type:
    """Ray's engine actor, of a model whose folder it finds on its own machine."""

    class LoadingHere(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["model"] = model_folder(policy, storage, (*TEXT_FILES, "*.safetensors"))
            with reading(f"model {policy['path']}: vLLM cannot load it"):
                super().__init__(*args, **options)

    return LoadingHere


class WholeShards:
    """Ray Data actor, the only one of its pass: keeps answers until all of their shard are there."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._open: dict[tuple[str, ...], dict[tuple[int, int], list[int]]] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Take answers, in any order; returns the shards that they complete, in the schema `WHOLE`."""
        complete = []
        for row in batch.to_pylist():
            key = tuple(row[name] for name in ("source", "shard", "made_from", "attempt"))
            answers = self._open.setdefault(key, {})
            answers[row["question"], row["sample"]] = row["tokens"]
            if len(answers) == row["num_requests"]:
                questions, samples = zip(*answers)
                complete.append([*key, questions, samples, list(self._open.pop(key).values())])
        return pa.Table.from_pylist([dict(zip(WHOLE.names, one)) for one in complete], schema=WHOLE)


def _requests(row: dict[str, Any], work: VllmWork) -> list[dict[str, Any]]:
    """The requests of a shard; one without any is committed at once."""
    source, shard, made_from = (str(row[key]) for key in ("source", "shard", "made_from"))
    if work.has(source, shard, made_from):
        return []
    attempt = Artifact(work.storage, f"{work.folders[0]}/{source}").log_attempt(shard)
    policy, questions = work.text(), work.questions.ask(source, shard)
    found = requests_of(questions, policy.read(questions, work.options), work.options, policy.stops)
    known = {"source": source, "shard": shard, "made_from": made_from, "attempt": attempt, "num_requests": len(found)}
    if not found:
        _commit(known | {"question": [], "sample": [], "tokens": []}, work)
    return [known | one for one in found]


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of what Ray's stage returns for a request."""
    kept = ("source", "shard", "made_from", "attempt", "num_requests", "question", "sample")
    return {name: row[name] for name in kept} | {"tokens": [int(token) for token in row["generated_tokens"]]}


def _commit(row: dict[str, Any], work: VllmWork) -> dict[str, Any]:
    """Commit a shard of which all answers are there."""
    shard = ShardWork(*(str(row[key]) for key in ("source", "shard", "made_from", "attempt")))
    policy, questions = work.text(), work.questions.ask(shard.source, shard.shard)
    prompts = policy.read(questions, work.options)
    answers = dict(zip(zip(row["question"], row["sample"]), row["tokens"]))
    said = responses_of(questions, prompts, answers, work.options, policy)
    counters = count_tokens(prompts, said)
    if not work.has(shard.source, shard.shard, shard.made_from):
        work.questions.commit(shard, said, counters, policy)
    return {"source": shard.source, "shard": shard.shard, "tokens": int(counters["decoded_tokens"])}
