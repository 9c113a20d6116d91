"""A stand-in for vLLM on a CPU: the classes that Ray's engine stage calls, over transformers, one request at a time.

It says nothing of vLLM's numbers. It shows that what is handed to `ray.data.llm` arrives as vLLM's own arguments, and
that what comes back, in an order of its own, becomes groups. Arguments of the real classes that are not used here are
refused, so that nothing is handed over unseen.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm import outputs


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    detokenize: bool
    structured_outputs: None = None


@dataclass
class AsyncEngineArgs:
    model: str
    runner: str
    dtype: str
    max_model_len: int
    load_format: str
    generation_config: str
    skip_tokenizer_init: bool
    enable_prefix_caching: bool
    tensor_parallel_size: int
    trust_remote_code: bool
    distributed_executor_backend: str
    disable_log_stats: bool
    enable_log_requests: bool

    def create_engine_config(self) -> Any:
        limits = {"max_num_seqs": 64, "pipeline_parallel_size": 1}
        return SimpleNamespace(scheduler_config=SimpleNamespace(**limits), parallel_config=SimpleNamespace(**limits))


class AsyncLLMEngine:
    def __init__(self, args: AsyncEngineArgs) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        self.answered = 0
        self.log("engine", asdict(args))

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs, stat_loggers: Any) -> AsyncLLMEngine:
        assert stat_loggers is None
        return cls(args)

    def log(self, kind: str, what: Any) -> None:
        with open(os.environ["VLLM_STAND_IN_LOG"], "a") as file:
            file.write(json.dumps({kind: what}) + "\n")

    async def generate(
        self, request_id: str, prompt: dict[str, Any], sampling_params: SamplingParams, lora_request: None
    ) -> AsyncIterator[outputs.RequestOutput]:
        assert lora_request is None
        asked = {"prompt": prompt["prompt_token_ids"], **asdict(sampling_params)}
        self.log("request", asked)
        await asyncio.sleep((sampling_params.seed % 7) / 100)  # the order in which they end is none that was asked
        drawn = self.draw(prompt["prompt_token_ids"], sampling_params)
        self.answered += 1
        mark = Path(os.environ.get("VLLM_STAND_IN_DIES", ""))
        if mark.is_file() and self.answered == 5:
            mark.unlink()
            os._exit(1)
        if os.environ.get("VLLM_STAND_IN_LOSES") == str(sampling_params.max_tokens):
            drawn = drawn[:1]
        yield outputs.RequestOutput(prompt["prompt_token_ids"], [outputs.CompletionOutput(drawn)])

    @torch.inference_mode()
    def draw(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Token by token, without a cache; the nucleus is left out (`top_p` 1)."""
        assert params.top_p == 1
        random = torch.Generator().manual_seed(params.seed)
        tokens: list[int] = []
        while len(tokens) < params.max_tokens and not (tokens and tokens[-1] in params.stop_token_ids):
            logits = self.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double()
            if params.temperature:
                chances = (logits / params.temperature).softmax(-1)
                tokens.append(int(torch.multinomial(chances, 1, generator=random)))
            else:
                tokens.append(int(logits.argmax()))
        return tokens

    def shutdown(self) -> None:
        pass
