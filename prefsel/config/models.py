"""Models that a configuration names: from a directory or a hub, or made on the spot."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from prefsel.config.options import Dtype, Name, Options, default_kind

DEFAULT_MODEL: Final = "pretrained"
"""What an entry of `models` without a `kind` is."""


class PretrainedModel(Options):
    """A model from a directory or a hub."""

    role: ClassVar[str] = "any"
    """It may serve as policy or as reward model: what it is, its own configuration says."""
    is_made_here: ClassVar[bool] = False
    kind: Literal["pretrained"] = "pretrained"
    """A model that exists already."""
    name: Name
    """Name of the model, by which scorers, tangents and trainings mean it. It also names the columns, for example
    `logps_<name>`."""
    path: str
    """Directory with `config.json`, safetensors weights and a tokenizer, or the id of a model on the Hugging Face hub.
    Pickled weights are never read. An adapter of peft (`adapter_config.json`) is merged into its base model in memory;
    the tokenizer is its own where it has one, else the base's."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null means the hub's main branch. The commit it stands for when the run starts
    is what every worker loads. Of an adapter, `<its own>+<base>@<the base's>` also says where its base lies; either
    revision may be empty."""
    dtype: Dtype = "bf16"
    """Number format of the weights and activations while scoring. `bf16` is what most weights are published in."""
    max_length: int | None = Field(None, ge=8)
    """Longest prompt and response together, in tokens; null means what the model declares."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over `max_length`: `drop` leaves it out as `too_long`, `right` cuts its end, `left`
    cuts the beginning of its prompt. Each completion is cut for itself."""
    template: str = "auto"
    """How messages become text: `auto` is the tokenizer's chat template, `plain` joins the contents, `hh` writes
    `Human:` and `Assistant:` turns; or a Jinja template, inline or as the path of a file."""
    trust_remote_code: bool = False
    """Run the code that a model ships, wherever it is read: configuration, tokenizer, weights, and what is trained from
    it. A hub id needs `revision` as the 40 hex digits of a commit, so that the code cannot change unnoticed."""
    gpus_per_replica: int = Field(1, ge=1)
    """GPUs that one copy of the model is spread over while scoring; without GPUs it has no effect."""


class ScratchTokenizer(Options):
    """A tokenizer trained on the corpus text."""

    kind: Literal["bpe", "word"] = "bpe"
    """`bpe` learns byte pairs; `word` makes one token per word, for generated corpora of few words."""
    vocab_size: int = Field(2048, ge=64)
    """Largest number of tokens; 2 048 keeps the head of a small model small."""


class ScratchModel(Options):
    """A small model made on the spot from the `proxy` part of the corpus: for trials without weights at hand."""

    is_made_here: ClassVar[bool] = True
    trust_remote_code: ClassVar[bool] = False
    gpus_per_replica: ClassVar[int] = 1
    name: Name
    """Name of the model, as of a pretrained one."""
    hidden_size: int = Field(64, ge=8)
    """Width of the model; a multiple of twice `num_heads`. The defaults make a model small enough to be trained on one
    core."""
    num_layers: int = Field(2, ge=1)
    """Decoder layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    steps: int = Field(150, ge=1)
    """Optimizer steps of the training on the spot."""
    batch_tokens: int = Field(4096, ge=64)
    """At most this many tokens per step, padding included."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW: 5 % linear warm-up, then a cosine to 0. The default suits models this small. Its
    weight decay, 0.01, is on every weight, norms included."""
    max_length: int = Field(512, ge=8)
    """Longest prompt and response together, in tokens, in training and in scoring."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over `max_length` while scoring: dropped as `too_long`, cut at its end (`right`), or
    its prompt cut at the beginning (`left`)."""
    seed: int = 0
    """Decides the initial weights and the order of the batches."""
    tokenizer: ScratchTokenizer = ScratchTokenizer()
    """The tokenizer that is trained on the same texts."""
    dtype: Dtype = "fp32"
    """Number format while scoring; training is always in fp32."""
    template: str = "auto"
    """How messages become text, as of a pretrained model; the tokenizer made here has a chat template for `auto`."""


class ScratchPolicy(ScratchModel):
    """A causal language model, tuned on the chosen completions of the `proxy` prompts."""

    role: ClassVar[str] = "policy"
    kind: Literal["scratch_policy"]
    """A small policy made from the corpus."""


class ScratchReward(ScratchModel):
    """A Bradley–Terry reward model, trained on the pairs of the `proxy` prompts."""

    role: ClassVar[str] = "reward"
    kind: Literal["scratch_reward"]
    """A small reward model made from the corpus."""
    heads: list[Name] = []
    """Aspects that get an output of their own, each trained on the pairs of that aspect and scored as `rm_<aspect>`.
    Empty: one output, trained on all pairs."""


Model = Annotated[
    PretrainedModel | ScratchPolicy | ScratchReward, Field(discriminator="kind"), default_kind(DEFAULT_MODEL)
]
"""An entry of `models`."""
