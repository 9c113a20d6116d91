"""Generations: which model answers which prompts of the corpus, how often, and how its tokens are drawn."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from pydantic import Field

from prefsel.config.lookup import Lookup, require_model, require_single
from prefsel.config.options import Name, Options
from prefsel.config.scorers import Pool
from prefsel.errors import UserError, invalid


class PromptChoice(Options):
    """Which prompts of the corpus are answered, each once however often it stands there."""

    part: Literal["train", "validation", "holdout", "exclude"] = "train"
    """Of which part: `train` is what may be selected from, and the prompts of sources with the role `prompts`;
    `holdout` and `validation` are what `split` and the sources of these roles set aside; `exclude` are those of
    `exclude_prompts` and of sources of this role, such as the questions of a benchmark: answered, never trained on."""
    count: int | None = Field(None, ge=1)
    """How many, drawn without replacement by a hash of the prompt_id; null means all of the part. The driver holds the
    ids of what is drawn."""
    seed: int = 0
    """Another seed draws other prompts."""


class GenerationOptions(Options):
    """How a model answers prompts. The random numbers of a response follow from the seed, the prompt and the number of
    the sample, so neither shards nor other samples change it."""

    samples: int = Field(5, ge=1, le=1024)
    """Responses to every prompt."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits before sampling; 0 takes the likeliest token, and then all samples are equal."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus: tokens are drawn from the likeliest ones that make up this probability; 1 keeps all."""
    max_new_tokens: int = Field(1024, ge=1)
    """A response that has not ended after so many tokens is cut."""
    seed: int = Field(0, ge=0, lt=2**53)
    """Of all random numbers."""
    drop_cut: bool = False
    """Leave out responses that were cut at `max_new_tokens`, as `cut_off`."""
    max_repetition: float | None = Field(0.5, gt=0, le=1)
    """Leave out responses of which more than this share is repeated runs of four words, as `repetitive`; null keeps
    them."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: the engine of this package, or vLLM through `ray.data.llm` (extra `vllm`). Both are given the
    same tokens and draw with the same settings, but vLLM's numbers are its own: another version, another batch or
    another GPU may answer otherwise, so that a shard which is made again need not be the same byte by byte."""
    pool: Pool = Pool()
    """The actors that generate."""
    token_budget: int | None = Field(None, ge=64)
    """At most this many tokens in the key-value caches of an actor at a time; null means what suits the device. Not for
    vLLM, which sizes its caches itself."""
    prompts_per_shard: int = Field(64, ge=1)
    """Prompts in a shard, the unit of work and of resume."""

    def recipe_settings(self) -> dict[str, Any]:
        """What of it changes a response by more than rounding; which prompts share a shard, or who asks, does not."""
        asked_by = type(self).model_fields.keys() - GenerationOptions.model_fields.keys()
        return self.model_dump(exclude={"pool", "token_budget", "prompts_per_shard", *asked_by})

    def check_engine(self, field: str) -> None:
        """Refuse an engine that is not installed, or a setting that it would not honour.

        Args:
            field: Where these options stand.

        Raises:
            UserError: says what to install, or names the setting.
        """
        if self.engine != "vllm":
            return
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"{field}.engine: 'vllm' needs the extra: pip install 'prefsel[vllm]'")
        if self.token_budget is not None:
            raise invalid(f"{field}.token_budget", self.token_budget, "null: vLLM sizes its caches by the GPU")
        if self.pool.silence_s is not None:
            raise invalid(f"{field}.pool.silence_s", self.pool.silence_s, "null: vLLM watches its own engines")


class Generation(GenerationOptions):
    """Answers of a model to prompts of the corpus, as groups with one completion per sample."""

    name: Name
    """Name of the generation."""
    model: str
    """The model that answers: an entry of `models` or of `train`."""
    prompts: PromptChoice = PromptChoice()
    """What it answers."""

    def check(self, config: Lookup) -> None:
        """Refuse a model that cannot answer, or an engine that is not there.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        require_model(config, f"generate.{self.name}.model", self.model, "policy")
        require_single(config, f"generate.{self.name}.model", self.model)
        self.check_engine(f"generate.{self.name}")
