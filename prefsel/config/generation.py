"""Generations: which model answers which prompts of the corpus, how often, and how its tokens are drawn."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from prefsel.config.lookup import Lookup, require_model, require_single
from prefsel.config.options import Name, Options
from prefsel.config.scorers import Pool


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
    """What generates: the engine of this package, or vLLM through `ray.data.llm` (extra `vllm`), whose numbers are its
    own."""
    pool: Pool = Pool()
    """The actors that generate."""
    token_budget: int | None = Field(None, ge=64)
    """At most this many tokens in the key-value caches of an actor at a time; null means what suits the device."""
    prompts_per_shard: int = Field(64, ge=1)
    """Prompts in a shard, the unit of work and of resume."""

    def recipe_settings(self) -> dict[str, Any]:
        """What of it changes a response by more than rounding; which prompts share a shard does not."""
        return self.model_dump(exclude={"pool", "token_budget", "prompts_per_shard"})


class Generation(GenerationOptions):
    """Answers of a model to prompts of the corpus, as groups with one completion per sample."""

    name: Name
    """Name of the generation."""
    model: str
    """The model that answers: an entry of `models` or of `train`."""
    prompts: PromptChoice = PromptChoice()
    """What it answers."""

    def check(self, config: Lookup) -> None:
        """Refuse a model that cannot answer.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        require_model(config, f"generate.{self.name}.model", self.model, "policy")
        require_single(config, f"generate.{self.name}.model", self.model)
