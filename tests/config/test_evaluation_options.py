"""What an evaluation asks for where the configuration says little."""

from __future__ import annotations

from prefsel.config import GenerationOptions
from prefsel.config.evaluation import Evaluation


def test_a_part_of_the_options_leaves_the_others_as_an_evaluation_has_them() -> None:
    """A single setting must not bring the defaults of rounds: five samples, a nucleus, and repetition left out."""
    found = Evaluation.model_validate({"generation": {"max_new_tokens": 64}}).generation
    assert (found.samples, found.temperature, found.top_p, found.max_repetition) == (1, 1.0, 1.0, None)


def test_answers_are_named_as_those_of_rounds_with_the_same_sampling() -> None:
    asked = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_repetition": 0.5}
    evaluated = Evaluation.model_validate({"generation": asked}).generation
    assert evaluated.recipe_settings() == GenerationOptions.model_validate(asked).recipe_settings()
