"""Models that a configuration names: from a directory or a hub, or made on the spot."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prefsel.config.options import Dtype, Name, Options


class PretrainedModel(Options):
    """A model from a directory or a hub."""

    role: ClassVar[str] = "any"
    """It may serve as policy or as reward model: what it is, its own configuration says."""
    is_made_here: ClassVar[bool] = False
    kind: Literal["pretrained"] = "pretrained"
    name: Name
    path: str
    """Local directory, or hub id."""
    revision: str | None = None
    dtype: Dtype = "bf16"
    max_length: int | None = Field(None, ge=8)
    """Longest prompt + response in tokens; default: what the model declares."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a longer one: dropped as `too_long`, cut on the right, or its prompt cut on the left."""
    template: str = "auto"
    """`auto` (the tokenizer's chat template), `plain`, `hh`, or a Jinja template or file."""
    trust_remote_code: bool = False
    """Needs the exact revision."""
    gpus_per_replica: int = Field(1, ge=1)
    """GPUs one copy is spread over."""


class ScratchTokenizer(Options):
    """A tokenizer trained on the corpus text."""

    kind: Literal["bpe", "word"] = "bpe"
    vocab_size: int = Field(2048, ge=64)


class ScratchModel(Options):
    """A small model made on the spot from the `proxy` part of the corpus: for trials without weights at hand."""

    is_made_here: ClassVar[bool] = True
    trust_remote_code: ClassVar[bool] = False
    gpus_per_replica: ClassVar[int] = 1
    name: Name
    hidden_size: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    steps: int = Field(150, ge=1)
    batch_tokens: int = Field(4096, ge=64)
    lr: float = Field(3e-3, gt=0)
    max_length: int = Field(512, ge=8)
    truncation: Literal["drop", "right", "left"] = "drop"
    seed: int = 0
    tokenizer: ScratchTokenizer = ScratchTokenizer()
    dtype: Dtype = "fp32"
    template: str = "auto"


class ScratchPolicy(ScratchModel):
    """A causal language model, tuned on the chosen completions of the `proxy` prompts."""

    role: ClassVar[str] = "policy"
    kind: Literal["scratch_policy"]


class ScratchReward(ScratchModel):
    """A Bradley–Terry reward model, trained on the pairs of the `proxy` prompts."""

    role: ClassVar[str] = "reward"
    kind: Literal["scratch_reward"]
    heads: list[Name] = []
    """One head per aspect named here, each trained on the pairs of that aspect; none named: one head, all pairs."""


Model = Annotated[PretrainedModel | ScratchPolicy | ScratchReward, Field(discriminator="kind")]
