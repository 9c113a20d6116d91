"""Adapters for rows that hold one prompt and K completions: pairs come from ratings, rewards or pairwise labels."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from itertools import combinations
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.aspects import OVERALL, by_aspects, margin_of
from prefsel.ingest.example import (
    Completion,
    Example,
    Format,
    Preference,
    completion_of,
    difference,
    distinct,
    field,
    field_name,
    list_field,
    mine,
    number,
    prompt_of,
)
from prefsel.ingest.fields import parsed_number
from prefsel.ingest.messages import Messages
from prefsel.ingest.row_error import RowError, wrong_type
from prefsel.ingest.surroundings import PROMPTS, with_surroundings

ANSWERS = ("completions", "responses", "generations")
"""What fields call the answers to one prompt."""
REWARDS = ("rewards", "scores", "ratings", "rating")
"""What fields call their numbers."""
FINE_GRAINED, SCORE = "fine_grained", "score"

OVERALL_MAX = 10.0
"""UltraFeedback rates from 1 to 10; some of its rows say 85 for 8.5, and nobody knows which."""


def _adapt_ultrafeedback(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`instruction`; `completions` of `{response, annotations: {aspect: {Rating}}, overall_score, fine-grained_score}`.

    Every two completions with different ratings are a pair, equal ratings a tie. By default one aspect per prompt
    labels its pairs, chosen by a hash of the prompt among the aspects that at least two completions are rated on:
    mining every aspect from the same texts would put them into the training data of every aspect's proxy model.
    A rating that is missing, "N/A" or not a number is absent: no pair comes from it. All ratings stay with the
    completion. The labels `overall` and `mean` belong to no aspect.
    """
    prompt = _prompt(value, options, "instruction", "prompt")
    rows = list_field(value, "completions")
    aspects = [_aspects(row, f"completions[{k}]") for k, row in enumerate(rows)]
    kept, _ = distinct(
        [
            Completion(completion_of(field(row, "response"), f"completions[{k}].response"), _scores(row) | ratings)
            for k, (row, ratings) in enumerate(zip(rows, aspects))
        ]
    )
    names = {name for ratings in aspects for name in ratings}
    preferences, ties = by_aspects(prompt, kept, names, options)
    return Example(prompt, kept, preferences, ties, absent=sum(map(_num_off_scale, rows)))


def _adapt_ranked(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`question` or `prompt`, K `completions`, and `preference`: one label per two completions, 1v2 1v3 … 1vK 2v3 ….

    1: the first is better, 2: the second is, 0: a tie. Two completions of the same text are a tie whatever the label.
    """
    prompt = _prompt(value, options, "question", "prompt")
    kept, index = distinct(_completions(value))
    labels = list_field(value, "preference")
    duels = list(combinations(index, 2))
    if len(labels) != len(duels):
        raise RowError(
            "wrong_type", f"preference: got {len(labels)} labels; {len(index)} completions need {len(duels)}"
        )
    preferences = []
    for told, (first, second) in zip(labels, duels):
        label = parsed_number(told)
        if label not in (0, 1, 2):
            raise RowError("wrong_type", f"preference: got {told!r}; valid: 0, 1, 2")
        if label != 0 and first != second:
            chosen, rejected = (first, second) if label == 1 else (second, first)
            preferences.append(Preference(chosen, rejected, None, None))
    return Example(prompt, kept, preferences, len(duels) - len(preferences))


def _adapt_scored(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """A prompt, K answers under one of `ANSWERS`, and K numbers under one of `REWARDS`.

    A null reward is absent. With `pairs: best_worst` the first highest is chosen over the first lowest; with `all`
    every two completions of different reward are a pair. The rewards stay with the completions as rating `score`.
    """
    prompt = _prompt(value, options, *PROMPTS, "input")
    completions = _completions(value)
    rewards = list_field(value, *REWARDS)
    if len(rewards) != len(completions):
        raise RowError("wrong_type", f"rewards: got {len(rewards)} numbers for {len(completions)} completions")
    kept, _ = distinct(
        [
            Completion(one.messages, {} if reward is None else {SCORE: reward})
            for one, reward in zip(completions, [_reward(found, f"rewards[{k}]") for k, found in enumerate(rewards)])
        ]
    )
    if options.pairs == "all":
        return Example(prompt, kept, *mine(len(kept), None, margin_of([row.ratings for row in kept], SCORE)))
    rated = [(row.ratings[SCORE], k) for k, row in enumerate(kept) if SCORE in row.ratings]
    if len(rated) < 2:
        return Example(prompt, kept, [])
    (high, best), (low, worst) = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if high == low:
        return Example(prompt, kept, [], ties=1)
    return Example(prompt, kept, [Preference(best, worst, None, difference(high, low))])


def _reward(found: object, name: str) -> float | None:
    if isinstance(found, bool) or not isinstance(found, int | float | str | Decimal | None):
        raise wrong_type(name, found, "a number")
    return _rating(found, name)


def _adapt_sorted(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`chosen` and `rejected` as lists of the right and the wrong answers to one prompt.

    Every right one is preferred to every wrong one, or with `pairs: best_worst` the first to the first.
    """
    prompt = _prompt(value, options, *PROMPTS)
    found = [field(value, name) for name in ("chosen", "rejected")]
    good, bad = (one if isinstance(one, list) else [one] for one in found)
    kept, index = distinct([Completion(completion_of(one, "chosen or rejected"), {}) for one in (*good, *bad)])
    first, second = (list(dict.fromkeys(part)) for part in (index[: len(good)], index[len(good) :]))
    if both := set(first) & set(second):
        text = kept[min(both)].messages[0]["content"]
        raise RowError("identical_completions", f"chosen and rejected: both hold the answer {text!r:.60}")
    if options.pairs == "best_worst":
        first, second = first[:1], second[:1]
    return Example(prompt, kept, [Preference(a, b, None, None) for a in first for b in second])


def _prompt(value: Mapping[str, Any], options: FormatOptions, *names: str) -> Messages:
    """The first of the fields `names`, with what stands beside it."""
    name = field_name(value, *names)
    return with_surroundings(value, prompt_of(value[name], name), options, used=(name,))


def _completions(value: Mapping[str, Any]) -> list[Completion]:
    rows = list_field(value, *ANSWERS)
    return [Completion(completion_of(row, f"completions[{k}]"), {}) for k, row in enumerate(rows)]


def _aspects(row: object, name: str) -> dict[str, float]:
    """The ratings of one completion by aspect, those that are numbers."""
    if not isinstance(row, dict):
        raise wrong_type(name, row, "an object with response and annotations")
    annotations = row.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, dict):
        raise wrong_type(f"{name}.annotations", annotations, "an object of aspects")
    found = {}
    for aspect, annotation in annotations.items():
        rating = _rating(annotation.get("Rating") if isinstance(annotation, dict) else annotation, f"{name}.{aspect}")
        if rating is not None:
            found[aspect] = rating
    return found


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The overall scores of one completion, those that are on the scale."""
    fields = {OVERALL: "overall_score", FINE_GRAINED: "fine-grained_score"}
    scores = {key: _rating(row.get(name), name) for key, name in fields.items()}
    return {key: score for key, score in scores.items() if score is not None and score <= OVERALL_MAX}


def _num_off_scale(row: Mapping[str, Any]) -> int:
    scores = (_rating(row.get(name), name) for name in ("overall_score", "fine-grained_score"))
    return sum(score is not None and score > OVERALL_MAX for score in scores)


def _rating(found: object, name: str) -> float | None:
    """A rating given as a number or as text; None for "N/A", null and everything else that is no number."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        return number(found, name)
    return parsed_number(found)


# ------------------------------------------------------------------------------------------------ what rows look like


def _several(value: Mapping[str, Any]) -> list[Any]:
    found: Any = next((value[name] for name in ANSWERS if value.get(name)), None)
    return found if isinstance(found, list) else []


def _is_ranked(value: Mapping[str, Any]) -> bool:
    return bool(_several(value)) and isinstance(value.get("preference"), list)


def _is_scored(value: Mapping[str, Any]) -> bool:
    return bool(_several(value)) and any(isinstance(value.get(name), list) for name in REWARDS)


def _is_sorted(value: Mapping[str, Any]) -> bool:
    """Whether a side is a list of texts, and the other one too, or a text."""
    sides = [value.get(name) for name in ("chosen", "rejected")]
    lists = [one for one in sides if isinstance(one, list)]
    are_texts = all(isinstance(text, str) for one in lists for text in one)
    return bool(lists) and are_texts and all(isinstance(one, str | list) and one for one in sides)


def _is_annotated(value: Mapping[str, Any]) -> bool:
    found = value.get("completions")
    if not isinstance(found, list) or not all(isinstance(one, Mapping) and "response" in one for one in found):
        return False
    return any(one.get("annotations") is not None for one in found)


FORMATS = (
    Format("ranked", _adapt_ranked, _is_ranked),
    Format("scored", _adapt_scored, _is_scored),
    Format("ultrafeedback", _adapt_ultrafeedback, _is_annotated),
    Format("sorted", _adapt_sorted, _is_sorted, ("prompt", "chosen", "rejected")),
)
"""In the order in which they are tried."""
