"""Evaluation: what the models of a run answer to prompts that nothing was trained on, and what judges say of it."""

from __future__ import annotations

from pydantic import Field

from prefsel.config.generation import GenerationOptions, PromptChoice
from prefsel.config.lookup import Lookup, require_model, require_single
from prefsel.config.options import Options
from prefsel.config.scorers import Scorer
from prefsel.errors import invalid


class Evaluation(Options):
    """Every trained policy, rounds of self-play included, and what it is compared with answer the same prompts."""

    prompts: PromptChoice = PromptChoice(part="holdout", count=256)
    """The prompts."""
    generation: GenerationOptions = GenerationOptions(samples=1, temperature=1.0, top_p=1.0)
    """How they are answered. Temperature 1 without a nucleus samples the model itself, which the divergence from the
    reference is defined on."""
    judges: list[Scorer] = []
    """What the answers are judged by: scorers with a reward. One that nothing was selected by shows whether the others
    were only pleased."""
    baseline: str | None = None
    """The model that every other one is compared with; null means the model that the training started from."""
    models: list[str] | None = None
    """The models that are evaluated; null means every policy that is trained, except those that others of the run
    train on or score with."""
    divergence: bool = True
    """Measure the divergence from the baseline, per token, on each model's own answers: two more passes over them."""
    resamples: int = Field(2000, ge=100)
    """Resamples of the prompts that intervals are read from."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the intervals."""

    def check(self, config: Lookup) -> None:
        """Refuse an evaluation that this configuration cannot make.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        for name in (*(self.models or ()), *([self.baseline] if self.baseline else ())):
            if name not in config.round_models:
                require_model(config, "evaluate.models", name, "policy")
                require_single(config, "evaluate.models", name)
        self.generation.check_engine("evaluate.generation")
        for judge in self.judges:
            judge.check(config)
        if self.divergence and (self.generation.temperature, self.generation.top_p) != (1.0, 1.0):
            got = f"temperature {self.generation.temperature:g}, top_p {self.generation.top_p:g}"
            raise invalid("evaluate.generation", got, "temperature 1 and top_p 1, or divergence: false")
