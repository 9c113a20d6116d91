"""The engine vLLM through the real `ray.data.llm`: with a stand-in for vLLM on CPUs, and with vLLM where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_models import bpe_tokenizer, tiny_causal

from prefsel.config import GenerationOptions
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.generate.requests import seed_of
from prefsel.plan.check import check_names
from prefsel.plan.nodes import make_plan
from prefsel.stages.generate import PromptQuestions
from prefsel.stages.vllm import TEXT_FILES, VllmWork, WholeShards, model_folder, processor_settings
from prefsel.workspace.folders import commit_folder
from prefsel.workspace.storage import Storage

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
PROMPTS = ["Tell a story.", "What is a dog?", "Once upon a time", "Sing", "the " * 200]
SAMPLED = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 5}
GREEDY = {"samples": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with generation settings of its own, and five prompts, one of them too long for it."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = bpe_tokenizer()
    model = tiny_causal(vocab_size=len(tokenizer), max_position_embeddings=128)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = [{"prompt": text, "chosen": "good", "rejected": "bad"} for text in PROMPTS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(home: Path, **generations: dict[str, Any]) -> dict[str, Any]:
    shared = {"model": "policy", "max_repetition": None, "prompts_per_shard": 1, "pool": {"size": 1}}
    return {
        "name": "answers",
        "ray": {"num_cpus": 2, "object_store_gib": 0.25},
        "sources": [{"name": "asked", "paths": [str(home / "pairs.jsonl")]}],
        "models": [
            {"kind": "pretrained", "name": "policy", "path": str(home / "policy"), "dtype": "fp32", "max_length": 128}
        ],
        "generate": [shared | {"name": name} | options for name, options in generations.items()],
    }


def generate(home: Path, table: dict[str, Any], workspace: str, *, path: Path | None = STAND_IN, **more: str) -> str:
    """Run the command in a process of its own, which finds vLLM at `path`; returns what it told, and its exit code."""
    (home / "c.yaml").write_text(yaml.safe_dump(table))
    folders = [str(REPOSITORY), *([str(path)] if path else [])]
    known = {"PYTHONPATH": os.pathsep.join(folders), "VLLM_STAND_IN_LOG": str(home / f"{workspace}.log")}
    done = subprocess.run(
        [sys.executable, "-c", "from prefsel.cli import main; main()", "generate", "c.yaml", "--workspace", workspace],
        env=os.environ | known | more,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.stdout}{done.stderr}exit {done.returncode}"


def answers(home: Path, workspace: str, samples: int) -> dict[bytes, list[tuple[Any, ...]]]:
    """Prompt → sample, text, why it ended and number of tokens, of the generation with so many samples."""
    found: dict[bytes, list[tuple[Any, ...]]] = {}
    for file in sorted((home / workspace / "groups").glob("policy@*/*.parquet")):
        for row in pq.read_table(file).to_pylist():
            texts = [one["messages"][0]["content"] for one in row["completions"]]
            said = [(r["sample"], t, r["stop"], r["num_tokens"]) for t, r in zip(texts, row["responses"])]
            found.setdefault(row["prompt_id"], []).extend(said)
    assert all(len(said) <= samples for said in found.values())
    return found


def logged(home: Path, workspace: str, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home / f"{workspace}.log").read_text().splitlines()]
    return [line[kind] for line in lines if kind in line]


# ----------------------------------------------------------------------------------------------------- what is set up

POLICY = {
    **{"path": "hub/model", "made_here": False, "revision": "a" * 40, "trust_remote_code": True},
    **{"gpus_per_replica": 2, "dtype": "bf16", "max_length": 4096, "template": "auto", "truncation": "drop"},
}
OPTIONS = GenerationOptions.model_validate({"engine": "vllm", "pool": {"num_cpus": 3}})


def settings(num_gpus: float, **policy: Any) -> dict[str, Any]:
    return processor_settings(POLICY | policy, OPTIONS, folder="here", num_gpus=num_gpus, engines=(1, 4))


def test_the_processor_is_told_all_that_changes_an_answer() -> None:
    from ray.data.llm import vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(**settings(2))
    assert config.model_source == "here"
    assert config.concurrency == (1, 4)
    assert config.batch_size * config.max_concurrent_batches == 1024
    # Prompts are tokens already, and what comes back is decoded where it is committed.
    assert not config.chat_template_stage
    assert not config.tokenize_stage
    assert not config.detokenize_stage
    assert not config.prepare_multimodal_stage
    assert not config.should_continue_on_error
    assert not config.log_engine_metrics
    assert config.engine_kwargs == {
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "trust_remote_code": True,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "task_type": "generate",  # which Ray adds
    }
    assert config.placement_group_config is not None
    assert config.placement_group_config["strategy"] == "STRICT_PACK"
    assert config.placement_group_config["bundles"] == [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 0.0, "GPU": 1.0}]


def test_a_part_of_a_gpu_takes_a_part_of_its_memory() -> None:
    found = settings(0.5, gpus_per_replica=1)
    assert found["placement_group_config"]["bundles"] == [{"CPU": 3.0, "GPU": 0.5}]
    assert found["engine_kwargs"]["gpu_memory_utilization"] == 0.45
    assert "gpu_memory_utilization" not in settings(1, gpus_per_replica=1)["engine_kwargs"]


@pytest.mark.parametrize(("num_gpus", "workers"), [(1, 2), (0, 2), (2, 1), (0.5, 2)])
def test_gpus_that_an_engine_cannot_be_spread_over_are_refused(num_gpus: float, workers: int) -> None:
    with pytest.raises(UserError, match=rf"pool.num_gpus: got {num_gpus}.*{workers}, the model's gpus_per_replica"):
        settings(num_gpus, gpus_per_replica=workers)


def test_the_folder_of_a_model_of_the_workspace_is_found_where_the_engine_is(home: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commit_folder(storage, {"": home / "policy"}, "models/policy@1", info={})
    policy = POLICY | {"made_here": True, "path": "models/policy@1"}
    assert model_folder(policy, storage, TEXT_FILES) == str(tmp_path / "models/policy@1")
    assert model_folder(POLICY | {"path": str(home / "policy")}, storage, TEXT_FILES) == str(home / "policy")


def test_a_shard_is_whole_when_its_last_answer_is_there() -> None:
    def batch(*answers: tuple[str, int, int]) -> pa.Table:
        known = {"source": "s", "made_from": "m", "attempt": "a", "num_requests": 2}
        rows = [known | {"shard": name, "question": q, "sample": n, "tokens": [q, n]} for name, q, n in answers]
        return pa.Table.from_pylist(rows)

    shards = WholeShards()
    assert shards(batch(("one", 1, 0), ("two", 0, 0))).num_rows == 0
    assert shards(batch(("one", 1, 0))).num_rows == 0  # a batch that came twice completes nothing
    (found,) = shards(batch(("three", 0, 1), ("one", 0, 4))).to_pylist()
    assert (found["shard"], found["question"], found["sample"]) == ("one", [1, 0], [0, 4])
    assert found["tokens"] == [[1, 0], [0, 4]]
    assert [one["shard"] for one in shards(batch(("two", 5, 0), ("three", 1, 1))).to_pylist()] == ["two", "three"]


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("where", ["generate.five", "selfplay.arm.generation", "evaluate.generation"])
def test_without_vllm_a_configuration_is_refused_before_anything_runs(home: Path, where: str, tmp_path: Path) -> None:
    table = configured(home)
    vllm: dict[str, Any] = {"engine": "vllm", "samples": 2}
    if where == "generate.five":
        table["generate"] = [{"name": "five", "model": "policy", **vllm}]
    elif where == "selfplay.arm.generation":
        judges = [{"kind": "reward_model", "model": "policy"}]
        table["selfplay"] = [{"name": "arm", "policy": "policy", "judges": judges, "generation": vllm}]
    else:
        table["evaluate"] = {"models": ["policy"], "generation": vllm, "divergence": False}
    plan = make_plan(parse_config(table), Storage(str(tmp_path)))
    with pytest.raises(UserError) as error:
        check_names(plan)
    assert str(error.value) == f"{where}.engine: 'vllm' needs the extra: pip install 'prefsel[vllm]'"


def test_a_budget_that_vllm_would_not_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"generate.five.token_budget: got 64; valid: null: vLLM sizes its caches"):
        GenerationOptions(engine="vllm", token_budget=64).check_engine("generate.five")
    GenerationOptions(engine="vllm").check_engine("generate.five")


# ------------------------------------------------------------------------------------------------ Ray's own processor


@pytest.mark.usefixtures("local_ray")
def test_an_engine_reserves_what_the_pool_says_and_finds_its_model_itself(home: Path, tmp_path: Path) -> None:
    policy = POLICY | {"path": str(home / "policy"), "gpus_per_replica": 1, "trust_remote_code": False}
    questions = PromptQuestions("policy", OPTIONS, Storage(str(tmp_path)), "prompts")
    options = GenerationOptions(engine="vllm")
    work = VllmWork("generate", "policy", questions, policy, options, ("groups",), Storage(str(tmp_path)))
    processor = work.processor(num_shards=7)
    assert processor.list_stage_names() == ["vLLMEngineStage"]
    stage = processor.get_stage_by_name("vLLMEngineStage")
    assert stage.map_batches_kwargs["num_cpus"] == 1
    assert "num_gpus" not in stage.map_batches_kwargs  # there are none here
    assert stage.map_batches_kwargs["max_restarts"] == 0
    assert stage.fn.__name__ == "LoadingHere"
    assert stage.fn.__mro__[1].__name__ == "vLLMEngineStageUDF"
    assert stage.fn_constructor_kwargs["engine_kwargs"]["distributed_executor_backend"] == "uni"


@pytest.fixture(scope="module")
def greedy(home: Path) -> str:
    """Greedy answers of the engine of this package, in the workspace `plain`."""
    return generate(home, configured(home, greedy=GREEDY), "plain")


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(home: Path, greedy: str) -> None:
    assert greedy.endswith("exit 0"), greedy
    told = generate(home, configured(home, greedy=GREEDY | {"engine": "vllm"}), "greedy")
    assert told.endswith("exit 0"), told
    expected = answers(home, "plain", 1)
    assert len(expected) == len(PROMPTS) - 1
    assert answers(home, "greedy", 1) == expected
    told_settings = "the model's own generation settings are not applied: repetition_penalty 1.5"
    assert told_settings in told


@pytest.fixture(scope="module")
def sampled(home: Path) -> str:
    return generate(home, configured(home, sampled=SAMPLED | {"engine": "vllm"}), "sampled")


@pytest.mark.slow
def test_every_response_is_asked_for_with_its_own_seed(home: Path, sampled: str) -> None:
    assert sampled.endswith("exit 0"), sampled
    asked, ids = logged(home, "sampled", "request"), list(answers(home, "sampled", 3))
    assert len(ids) == 4
    assert {one["seed"] for one in asked} == {seed_of(5, one, sample) for one in ids for sample in range(3)}
    assert len(asked) == 12
    tokenizer = bpe_tokenizer()
    assert all(tokenizer.eos_token_id in one["stop_token_ids"] for one in asked)
    (engine,) = logged(home, "sampled", "engine")
    assert (engine["model"], engine["dtype"], engine["max_model_len"]) == (str(home / "policy"), "float32", 128)


@pytest.mark.slow
def test_an_engine_that_dies_costs_only_what_was_not_committed(home: Path, sampled: str) -> None:
    """The stand-in draws by the seeds alone, so that what a second engine answers is what the first would have."""
    (home / "mark").touch()
    table = configured(home, sampled=SAMPLED | {"engine": "vllm"})
    told = generate(home, table, "dies", VLLM_STAND_IN_DIES=str(home / "mark"))
    assert told.endswith("exit 0"), told
    assert "an actor died" in told
    assert len(logged(home, "dies", "engine")) == 2
    assert answers(home, "dies", 3) == answers(home, "sampled", 3)
    before = len(logged(home, "dies", "request"))
    assert generate(home, table, "dies").endswith("exit 0")
    assert len(logged(home, "dies", "request")) == before


@pytest.mark.slow
def test_an_answer_that_is_cut_short_is_no_answer(home: Path) -> None:
    table = configured(home, sampled=SAMPLED | {"engine": "vllm"})
    told = generate(home, table, "short", VLLM_STAND_IN_LOSES="12")
    assert told.endswith("exit 1"), told
    assert "ended for no reason: sample 0 of prompt" in told
    assert "Traceback" not in told


# ------------------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.slow
def test_vllm_itself_answers_greedily_as_transformers(home: Path, greedy: str) -> None:
    pytest.importorskip("vllm")
    told = generate(home, configured(home, greedy=GREEDY | {"engine": "vllm"}), "vllm", path=None)
    assert told.endswith("exit 0"), told
    assert answers(home, "vllm", 1) == answers(home, "plain", 1)
