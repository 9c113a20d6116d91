"""Evaluation: what the models of a run answer to prompts that nothing was trained on, and what judges say of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefsel.config.generation import GenerationOptions, PromptChoice
from prefsel.config.lookup import Lookup, require_model, require_single, require_validation
from prefsel.config.options import Name, Options
from prefsel.config.scorers import Scorer
from prefsel.errors import UserError, invalid


class PairwiseFunction(Options):
    """A judge that sees two answers at a time: a function of the user's, asked in both orders."""

    name: Name
    """What reports call it."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:function`, importable on every machine of the run. It is called with a list of prompts, one of
    the answers shown first and one of those shown second, and returns as many numbers from 0 to 1: 1 where the first
    answer is better. What it said is kept, so that it is asked once."""


class EvaluatedAnswers(GenerationOptions):
    """How the models of an evaluation answer: as they are, so that what went wrong with one is judged too."""

    samples: int = Field(1, ge=1, le=1024)
    """Responses to every prompt."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits before sampling. 1, without a nucleus, samples the model itself, which the divergence is
    defined on; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: tokens are drawn from the likeliest ones that make up this probability; 1 keeps all."""
    max_repetition: float | None = Field(None, gt=0, le=1)
    """Leave out responses of which more than this share is repeated runs of four words. A model that fell into
    repetition would then be judged by its other answers alone; null keeps them."""


class Evaluation(Options):
    """Every trained policy, rounds of self-play included, and what it is compared with answer the same prompts."""

    prompts: PromptChoice = PromptChoice(part="holdout", count=256)
    """The prompts."""
    generation: EvaluatedAnswers = EvaluatedAnswers()
    """How they are answered."""
    judges: list[Scorer] = []
    """What the answers are judged by: scorers with a reward, such as `reward_model` or `function`. One that nothing was
    selected by shows whether the others were only pleased."""
    pairwise: list[PairwiseFunction] = []
    """Judges that compare a model's answer with the baseline's to the same prompt."""
    baseline: str | None = None
    """The model that every other one is compared with, an entry of `models` or of `train`; null means the model that
    the training, or the rounds, started from."""
    models: list[str] | None = None
    """The models that are evaluated; null means every policy that is trained, except those that others of the run
    train on or score with."""
    divergence: bool = True
    """Measure the divergence from the baseline, per token, on each model's own answers: two more passes over them. The
    two must have the same tokens."""
    resamples: int = Field(2000, ge=100)
    """Resamples of the prompts that the intervals, of 95 %, are read from."""

    def check(self, config: Lookup) -> None:
        """Refuse an evaluation that this configuration cannot make.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        for name in self.models or ():
            if name not in config.round_models:
                require_model(config, "evaluate.models", name, "policy")
                require_single(config, "evaluate.models", name)
        self.generation.check_engine("evaluate.generation")
        if self.baseline is not None:
            require_model(config, "evaluate.baseline", self.baseline, "policy")
            require_single(config, "evaluate.baseline", self.baseline)
        self._check_prompts(config)
        self._check_judges(config)
        if self.divergence and (self.generation.temperature, self.generation.top_p) != (1.0, 1.0):
            got = f"temperature {self.generation.temperature:g}, top_p {self.generation.top_p:g}"
            raise invalid("evaluate.generation", got, "temperature 1 and top_p 1, or divergence: false")

    def _check_prompts(self, config: Lookup) -> None:
        """Prompts of a part that is set aside."""
        part, field = self.prompts.part, "evaluate.prompts.part"
        if part == "exclude" and not config.exclude_prompts and not any(s.role == "exclude" for s in config.sources):
            raise UserError(f"{field}: no prompt is excluded; give exclude_prompts, or a source the role exclude")
        if part == "validation":
            require_validation(config, field)
        if part == "holdout" and not config.split.holdout and not any(s.role == "holdout" for s in config.sources):
            raise UserError(f"{field}: nothing is held out; set split.holdout, or give a source the role holdout")

    def _check_judges(self, config: Lookup) -> None:
        """Judges that give generated answers a reward, under names that differ."""
        for judge in self.judges:
            if (
                not judge.runs_models
                or judge.kind in ("causal_logps", "generated_reward")
                or judge.unit != "completions"
            ):
                valid = "reward_model, function, or a kind of your own that makes rewards of any answer"
                raise invalid("evaluate.judges.kind", judge.kind, valid)
            judge.check_unseen(config)
        names = [
            *(one.label for judge in self.judges for one in judge.expanded(config)),
            *(p.name for p in self.pairwise),
        ]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"evaluate.judges: the name {twice[0]!r} stands twice; names must differ")
