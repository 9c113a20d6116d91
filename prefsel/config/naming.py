"""What a configuration calls things: labels of scorers, members of trainings, columns. It reads the records only."""

from __future__ import annotations

from dataclasses import dataclass

from prefsel.config import (
    CausalLogps,
    Config,
    DirectionalLogps,
    GeneratedReward,
    Imported,
    PairGradients,
    RewardModel,
    Scorer,
    Selection,
    Tangent,
    Training,
    TrainReward,
)

SUFFIXES = ("_chosen", "_rejected", "_max", "_min", "_mean", "_var")
"""What a flat column adds to the name of a completion column."""


@dataclass(frozen=True)
class Member:
    """One model of a training: its only one, that of an aspect, that of a fold."""

    training: str
    aspect: str | None = None
    fold: int | None = None
    """The fold it is not trained on, and whose prompts it scores."""

    @property
    def label(self) -> str:
        """What its folder is called after."""
        name = self.training if self.aspect is None else f"{self.training}-{self.aspect}"
        return name if self.fold is None else f"{name}.{self.fold}"


def members(spec: Training) -> list[Member]:
    """Every model that a training makes."""
    aspects: list[str | None] = [*spec.aspects] if isinstance(spec, TrainReward) else []
    folds: list[int | None] = [*range(spec.cross_fit.folds)] if spec.cross_fit else [None]
    return [Member(spec.name, aspect, fold) for aspect in aspects or [None] for fold in folds]


def expanded(config: Config) -> list[Scorer]:
    """The scorers, a reward training with aspects standing as one scorer for each."""
    aspects = {spec.name: spec.aspects for spec in config.train if isinstance(spec, TrainReward)}
    found: list[Scorer] = []
    for scorer in config.scorers:
        if isinstance(scorer, RewardModel) and scorer.aspect is None and aspects.get(scorer.model):
            found += [scorer.model_copy(update={"aspect": aspect}) for aspect in aspects[scorer.model]]
        else:
            found.append(scorer)
    return found


def selection_names(selection: Selection) -> list[str]:
    """A selection and its controls."""
    return [selection.name, *(f"{selection.name}-{control}" for control in selection.controls)]


def scorer_label(scorer: Scorer) -> str:
    """What a scorer's column set is called after: its model, its tangent, or its own name."""
    if isinstance(scorer, Imported):
        return scorer.name
    if isinstance(scorer, DirectionalLogps):
        return f"dlogps-{scorer.tangent}"
    if isinstance(scorer, PairGradients):
        return f"gamma-{scorer.tangent}"
    if isinstance(scorer, GeneratedReward):
        return f"{scorer.model}-generated"
    if isinstance(scorer, RewardModel):
        return f"{scorer.model}-{scorer.aspect}" if scorer.aspect else scorer.model
    return f"{scorer.model}-uncond" if scorer.unconditional else scorer.model


def scorer_models(scorer: Scorer, tangents: dict[str, Tangent]) -> list[str]:
    """The models a scorer runs."""
    if isinstance(scorer, Imported):
        return []
    if isinstance(scorer, DirectionalLogps | PairGradients):
        tangent = tangents.get(scorer.tangent)
        return [tangent.model] if tangent else []
    return [scorer.policy, scorer.model] if isinstance(scorer, GeneratedReward) else [scorer.model]


def own_columns(scorer: Scorer, tangents: dict[str, Tangent], heads: list[str]) -> list[str]:
    """Columns a scorer makes; `heads` are those of a reward model that is not one of a training's aspects."""
    if isinstance(scorer, Imported):
        return list(imported_fields(scorer))
    if isinstance(scorer, CausalLogps):
        suffix = "_uncond" if scorer.unconditional else ""
        return [f"logps_{scorer.model}{suffix}", f"num_tokens_{scorer.model}{suffix}"]
    if isinstance(scorer, GeneratedReward):
        return [f"rm_{scorer.head or scorer.model}_generated"]
    if isinstance(scorer, RewardModel):
        if scorer.aspect:
            return [f"rm_{scorer.aspect}"]
        return [f"rm_{head}" for head in heads] if len(heads) > 1 else [f"rm_{scorer.model}"]
    directions = tangents[scorer.tangent].directions if scorer.tangent in tangents else [scorer.tangent]
    if isinstance(scorer, DirectionalLogps):
        return [f"dlogps_{direction}" for direction in directions]
    return [f"gamma_{what}_{direction}" for direction in directions for what in ("dot", "norm")]


def imported_fields(scorer: Imported) -> dict[str, str]:
    """Column → what the number is called in the data."""
    fields = scorer.field if isinstance(scorer.field, list) else [scorer.field]
    if scorer.as_ == "rm":
        return {f"rm_{scorer.name}": fields[0]}
    return {f"ratings_{field}": field for field in fields}


def stem(flat_name: str) -> str:
    """The completion column a flat column is read from."""
    return next((flat_name[: -len(suffix)] for suffix in SUFFIXES if flat_name.endswith(suffix)), flat_name)
