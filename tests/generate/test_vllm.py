"""The engine vLLM through the real `ray.data.llm`: with a stand-in for vLLM on CPUs, and with vLLM where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tiny_models import bpe_tokenizer, tiny_causal

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
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return folder


def configured(home: Path, **generations: dict[str, Any]) -> dict[str, Any]:
    shared = {"model": "policy", "max_repetition": None, "prompts_per_shard": 1, "pool": {"size": 1}}
    return {
        "name": "answers",
        "ray": {"num_cpus": 2, "object_store_gib": 0.25},
        "sources": [{"name": "asked", "paths": [str(home / "prompts.jsonl")], "role": "prompts"}],
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
