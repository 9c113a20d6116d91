"""What comes back from the stand-in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CompletionOutput:
    token_ids: list[int]
    text: str = ""
    logprobs: None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt: str | None = None
    prompt_logprobs: None = None
    metrics: None = None
    finished: bool = True


class PoolingRequestOutput:
    pass
