"""How a corpus is made by a model: which prompts are answered, by whom, and how pairs are made of the answers.

    prompts ─▶ groups ─▶ columns of the judges ─▶ pairs ─▶ what is done with every corpus

Prompts are counted in shards by their content, and answers are kept by model and sampling, so that two corpora which
ask one model the same have the same groups; only what is new is generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefsel.config.generation import GenerationOptions


@dataclass(frozen=True)
class SeedPrompts:
    """Prompts of the corpus that was read from files, as a `config.PromptChoice` says."""

    part: str
    count: int | None
    seed: int
    skip: int = 0
    """So many of the drawn ones were used before."""
    later: int = 0
    """So many more the rounds after this one take: what is there is known before the first, whose prompts they are
    not."""
    per_shard: int = 64

    @property
    def name(self) -> str:
        """What its artifact is called."""
        return self.part if not self.skip else f"{self.part}-from-{self.skip}"


@dataclass(frozen=True)
class EvolvedPrompts:
    """Prompts that a policy makes of those of a selection's pairs."""

    seeds: Any
    """The plan of the corpus whose prompts are evolved."""
    selection: str
    evolve: Any
    """The `config.Evolve`."""
    judges: tuple[str, ...]
    """Models that must be able to read what is evolved."""
    per_shard: int = 64

    @property
    def name(self) -> str:
        """What its artifact is called."""
        return f"evolved-{self.selection}"


@dataclass(frozen=True)
class Made:
    """A corpus that a model makes."""

    name: str
    """What reports call the corpus."""
    policy: str
    """The model that answers."""
    prompts: SeedPrompts | EvolvedPrompts
    generation: GenerationOptions
    judges: tuple[str, ...] = ()
    """Labels of the scorers whose rewards label the answers."""
    rewards: tuple[str, ...] = ()
    """The columns that pairs are made by, without `rm_`; the first one decides."""
    pairing: Any = None
    """The `config.Pairing`; None: nothing is made but answers."""
    evaluation: Evaluated | None = None
    """What is measured of the answers; None: nothing."""
    beside: tuple[str, ...] = ()
    """Further models that answer the same prompts."""

    @property
    def answers(self) -> str:
        """What the groups are called: after those who answer."""
        return "+".join((self.policy, *self.beside))


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of a model's answers is made of, besides them."""

    options: Any
    """The `config.Evaluation`."""
    baseline: Any
    """The plan of the answers of the model that it is compared with; None: it is compared with none."""
    used: Any = None
    """What chose and labelled the pairs that the model was trained on: called without arguments, once its own model is
    made, it gives label of a scorer → identity. None: nothing of this run."""
