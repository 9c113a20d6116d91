"""What records ask the configuration that they stand in: which models, references and trainings there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from prefsel.errors import UserError, invalid


class Lookup(Protocol):
    """The lists of a configuration that its records name each other in (`run.Config`)."""

    @property
    def sources(self) -> Sequence[Any]:
        """Parts of the corpus."""

    @property
    def exclude_prompts(self) -> Sequence[str]:
        """Files of prompts that must not be trained on."""

    @property
    def split(self) -> Any:
        """What is kept out of selection."""

    @property
    def models(self) -> Sequence[Any]:
        """Models that are not trained here, or made on the spot."""

    @property
    def scorers(self) -> Sequence[Any]:
        """What makes columns."""

    @property
    def tangents(self) -> Sequence[Any]:
        """Directions of derivatives."""

    @property
    def metrics(self) -> Sequence[Any]:
        """Pair scores."""

    @property
    def selections(self) -> Sequence[Any]:
        """Subsets."""

    @property
    def train(self) -> Sequence[Any]:
        """Trainings, whose names are models' names too."""

    @property
    def round_models(self) -> Sequence[str]:
        """Names of the models that rounds of self-play may train."""


def find(records: Sequence[Any], name: str | None) -> Any:
    """The record called `name`, or None."""
    return next((record for record in records if record.name == name), None)


def require_model(config: Lookup, field: str, name: str, role: Literal["policy", "reward"]) -> None:
    """Refuse a name that is no model, or one that cannot have this role.

    Raises:
        UserError: names the field and the models that can.
    """
    fitting = [spec.name for spec in (*config.models, *config.train) if spec.role in (role, "any")]
    if name not in fitting:
        raise invalid(field, name, fitting or f"none: no {role} in `models` or `train`")


def require_reference(config: Lookup, field: str, name: str) -> None:
    """Refuse a reference whose log-probs no scorer stores.

    Raises:
        UserError: names the field and the models whose log-probs are stored.
    """
    stored = [scorer.reference_model for scorer in config.scorers if scorer.reference_model]
    if name not in stored:
        raise invalid(field, name, stored or "none: `scorers` has no causal_logps, whose log-probs are the reference")


def require_single(config: Lookup, field: str, name: str) -> None:
    """Refuse a training that is several models where one is loaded.

    Raises:
        UserError: names the field.
    """
    training = find(config.train, name)
    if training is not None and len(training.trained_models) > 1:
        raise invalid(field, name, "a single model: this training is one per fold or aspect")


def require_validation(config: Lookup, field: str) -> None:
    """Refuse a use of validation pairs where none are set aside.

    Raises:
        UserError: says how to set some aside.
    """
    if not config.split.validation and not any(source.role == "validation" for source in config.sources):
        raise UserError(f"{field}: needs validation pairs; set split.validation, or give a source the role validation")


def require_untrained(config: Lookup, field: str, name: str) -> None:
    """Refuse a start from weights that have seen labels of what is to be scored.

    Raises:
        UserError: names the field and what the weights were trained on.
    """
    while (training := find(config.train, name)) is not None:
        if training.selection != "validation":
            raise UserError(
                f"{field}: got {name!r}, which was trained on {training.selection!r}; its weights remember the "
                "labels of prompts that this training is to leave out; valid: a model that is not trained here"
            )
        name = training.model
