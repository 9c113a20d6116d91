"""Self-play: rounds in which a policy answers prompts, judges label its answers, and the best pairs train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from prefsel.config.evolve import Evolve
from prefsel.config.generation import GenerationOptions, PromptChoice
from prefsel.config.lookup import Lookup, require_model, require_reference, require_single
from prefsel.config.losses import loss_named
from prefsel.config.options import Name, Options
from prefsel.config.pairing import BestWorst, Pairing
from prefsel.config.scorers import Scorer
from prefsel.config.training import DpoOptions, Placement
from prefsel.errors import invalid


class RoundMetric(Options):
    """What the pairs of a round are scored by. `rm`, `policy` and `reference`, where the metric has them and they are
    not given, are the judge, the policy of the round and its reference; `$rm`, `$policy` and `$reference` stand for
    them inside lists."""

    metric: str = "alignment_potential"
    """Which method scores the pairs, as in `metrics`."""
    params: dict[str, Any] = {}
    """The parameters of that method."""


class RoundTraining(DpoOptions, Placement):
    """How the policy of a round is trained: the options of a training, whose pairs, model and reference the round
    gives."""


class EarlyStop(Options):
    """When no further round is begun; the rewards are those of the answers that `evaluate` asks for."""

    judge: str
    """The reward that decides, by the name of its column without `rm_`: of a judge of `evaluate`."""
    min_gain: float = Field(0.0, allow_inf_nan=False)
    """The rounds end after one in which the mean reward rose by no more than this over the model before."""


class SelfPlay(Options):
    """Rounds of one policy: answer prompts, judge, pair, select, train, and again with what was trained."""

    name: Name
    """Name of the rounds: their models are called `<name>-1`, `<name>-2` and so on."""
    policy: str
    """The model that begins: an entry of `models` or of `train`."""
    rounds: int = Field(1, ge=1)
    """How many."""
    prompts: PromptChoice = PromptChoice()
    """The prompts of a round. With `count` every round draws that many new ones; without, each round answers all."""
    generation: GenerationOptions = GenerationOptions()
    """How they are answered."""
    evolve: Evolve | None = None
    """Make new prompts of the best ones first, and learn from the answers to those; null learns from the answers to the
    prompts themselves."""
    beside: list[str] = []
    """Further models that answer the same prompts, whose answers stand beside the policy's: a weaker one for pairs
    `by_generator`, or others to learn from."""
    judges: list[Scorer] = []
    """What labels the answers: scorers with a reward, run on generated answers only. Pairs `by_generator` need none."""
    judge: str | None = None
    """The reward that decides, by the name of its column without `rm_`; null means the only one. Pairs by `confidence`
    go by all rewards, and this is the one that the metric reads; null means the first."""
    pairs: Pairing = BestWorst()
    """How pairs are made of the answers to a prompt."""
    metric: RoundMetric = RoundMetric()
    """What pairs are selected by."""
    ratio: float | None = Field(None, gt=0, le=1)
    """Share of a round's pairs that is trained on, the best by the metric; null means 0.4 where `count` is null too."""
    count: int | None = Field(None, ge=1)
    """Or so many of them."""
    train: RoundTraining | None = None
    """How a round trains; null makes the pairs of a single round and trains nothing."""
    start: Literal["first", "previous"] = "first"
    """Where the weights of a round start: from the policy that began (`first`), or from the model of the round before
    (`previous`). OPEN: no source says."""
    reference: Literal["first", "previous"] = "first"
    """What the loss measures against: the policy that began, or the model that answered."""
    mixed_with: str | None = None
    """A selection of the corpus whose pairs every round is trained on besides its own, for example all that the policy
    was trained on before. Null trains on the round's own alone."""
    stop: EarlyStop | None = None
    """When to end before the last round; null goes on to the end."""

    @model_validator(mode="after")
    def _fits(self) -> SelfPlay:
        if self.ratio is not None and self.count is not None:
            raise ValueError(f"ratio, count: got {self.ratio} and {self.count}; give one of them")
        if self.train is None and self.rounds > 1:
            raise ValueError(
                f"rounds: got {self.rounds} without `train`; valid: 1, as every further round needs a model"
            )
        if not self.judges and self.pairs.kind != "by_generator":
            raise ValueError(f"judges: got none with pairs {self.pairs.kind!r}; only pairs by_generator need no judge")
        if not self.beside and self.generation.samples < 2:
            raise ValueError(f"generation.samples: got {self.generation.samples}; a pair needs at least 2")
        if not self.beside and self.generation.temperature == 0:
            raise ValueError("generation.temperature: got 0, at which all samples are equal; valid: above 0")
        if self.train is None and (self.mixed_with or self.stop):
            raise ValueError("mixed_with, stop: only used where a round trains")
        return self

    @property
    def budget(self) -> dict[str, Any]:
        """The budget as a rule takes it."""
        return {"count": self.count} if self.count is not None else {"ratio": 0.4 if self.ratio is None else self.ratio}

    def model_of(self, number: int) -> str:
        """The model that answers in a round, counted from 1: of the round before, or the one that began."""
        return self.policy if number == 1 else self.trained_in(number - 1)

    def trained_in(self, number: int) -> str:
        """What the model of a round is called."""
        return f"{self.name}-{number}"

    def reference_of(self, number: int) -> str | None:
        """The reference of a round's training; None where its loss has none."""
        if self.train is None or not loss_named(self.train.loss).uses_reference:
            return None
        return self.policy if self.reference == "first" else self.model_of(number)

    def reward(self, columns: Sequence[str]) -> str:
        """The reward that decides, by its name without `rm_`.

        Args:
            columns: What the judges make.

        Raises:
            UserError: there is none of the name that `judge` gives, or none is given and there are several.
        """
        names = [one.removeprefix("rm_") for one in columns]
        if self.judge is None and len(names) == 1:
            return names[0]
        if self.judge not in names:
            raise invalid(f"selfplay.{self.name}.judge", self.judge, names)
        return self.judge

    def check(self, config: Lookup) -> None:
        """Refuse rounds that cannot be played in this configuration.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        field = f"selfplay.{self.name}"
        if self.prompts.part in ("exclude", "holdout"):
            raise invalid(f"{field}.prompts.part", self.prompts.part, "train: rounds train on what they answer")
        require_model(config, f"{field}.policy", self.policy, "policy")
        require_single(config, f"{field}.policy", self.policy)
        self.generation.check_engine(f"{field}.generation")
        for judge in self.judges:
            judge.check_unseen(config)
            if judge.tangent_name or judge.generates_with or not judge.runs_models or judge.reference_model:
                raise invalid(
                    f"{field}.judges", judge.kind, "scorers that give an answer a reward, such as reward_model"
                )
            for model in judge.models(config):
                require_single(config, f"{field}.judges", model)
        for name in self.beside:
            require_model(config, f"{field}.beside", name, "policy")
            require_single(config, f"{field}.beside", name)
        if self.pairs.kind == "by_generator":
            valid = ["$policy", *self.beside]
            for side in ("strong", "weak"):
                if (name := getattr(self.pairs, side)) not in valid:
                    raise invalid(f"{field}.pairs.{side}", name, valid)
            if {self.pairs.strong, self.pairs.weak} == {"$policy", self.policy}:
                # Of one model's answers any two would be a pair, in an order that nothing decided.
                other = f"another model than {self.policy!r}, which `$policy` is in the first round"
                raise invalid(f"{field}.pairs", f"strong {self.pairs.strong!r}, weak {self.pairs.weak!r}", other)
        if self.mixed_with is not None:
            valid = [name for selection in config.selections for name in selection.names]
            if self.mixed_with not in valid:
                raise invalid(f"{field}.mixed_with", self.mixed_with, valid or "none: `selections` is empty")
            if reference := self.reference_of(1):
                require_reference(config, f"{field}.mixed_with", reference)
                if self.reference == "previous" and self.rounds > 1:
                    valid_reference = "first: the corpus has no log-probs of the models that rounds train"
                    raise invalid(f"{field}.reference", "previous", valid_reference)
