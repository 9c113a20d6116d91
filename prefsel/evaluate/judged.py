"""Answers of a model beside those of its baseline, with what was computed of each: what records and tables are made of.

answers and columns, shard by shard ─▶ `Answers` ─▶ `compared`: prompts that both answered
                                                 ─▶ `judged`: an `Evaluation` by each judge, and a row per prompt
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import UserError
from prefsel.evaluate.comparison import Comparison, by_prompt, compare_rewards
from prefsel.evaluate.divergence import Divergence, divergence
from prefsel.evaluate.preference import HeldOut
from prefsel.evaluate.table import Answered, Evaluation, evaluation

Numbers = Mapping[str, Sequence[float | None]]
"""prompt_id → a number of each of its answers; None where there is none."""


@dataclass(frozen=True)
class Answers:
    """What a model answered, by prompt_id, with the columns of its answers. It holds the texts of an evaluation."""

    model: str
    texts: Mapping[str, Sequence[str]]
    num_tokens: Mapping[str, Sequence[float]]
    """By the model's own tokenizer."""
    columns: Mapping[str, Numbers]
    """Column → its numbers."""
    shards: Mapping[str, str]
    """prompt_id → the shard that holds it."""

    def of(self, prompts: Sequence[str]) -> Answers:
        """The answers to some of the prompts."""

        def taken(values: Mapping[str, Any]) -> dict[str, Any]:
            return {prompt: values[prompt] for prompt in prompts}

        columns = {name: taken(numbers) for name, numbers in self.columns.items()}
        return Answers(self.model, taken(self.texts), taken(self.num_tokens), columns, taken(self.shards))

    def with_reward(self, column: str) -> Answered:
        """The answers that a judge gave a reward, with it."""
        numbers = self.columns[column]
        places = {p: [n for n, one in enumerate(many) if one is not None] for p, many in numbers.items()}
        kept = {prompt: found for prompt, found in places.items() if found}

        def taken(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
            return {prompt: [values[prompt][place] for place in found] for prompt, found in kept.items()}

        return Answered(self.model, taken(self.texts), taken(numbers), taken(self.num_tokens))


def joined(model: str, parts: Sequence[Answers]) -> Answers:
    """The answers of several shards as one; a prompt stands in one shard only."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return Answers(
        model,
        {prompt: texts for part in parts for prompt, texts in part.texts.items()},
        {prompt: counts for part in parts for prompt, counts in part.num_tokens.items()},
        {name: {p: values for part in parts for p, values in part.columns[name].items()} for name in names},
        {prompt: shard for part in parts for prompt, shard in part.shards.items()},
    )


def compared(ours: Answers, theirs: Answers | None) -> tuple[Answers, Answers | None]:
    """The answers to the prompts that both models answered, in the order of their names.

    Raises:
        UserError: There is no such prompt.
    """
    if theirs is None:
        return ours.of(sorted(ours.texts)), None
    both = sorted(ours.texts.keys() & theirs.texts.keys())
    if not both:
        raise UserError(
            f"evaluate {ours.model}: no prompt has an answer of it ({len(ours.texts)} have) and of its baseline "
            f"{theirs.model} ({len(theirs.texts)} have); what was left out of their answers says why"
        )
    return ours.of(both), theirs.of(both)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a model."""

    overall: Evaluation
    """Without any judge."""
    judges: Mapping[str, Evaluation]
    """Judge → what it says."""
    prompts: pa.Table
    """A row per prompt."""


def measured(
    ours: Answers,
    theirs: Answers | None,
    *,
    judges: Sequence[str],
    verdicts: Mapping[str, Comparison],
    held_out: HeldOut | None,
    warnings: Mapping[str, str],
    num_draws: int,
) -> Measured:
    """The records of a model and its row of every prompt.

    Args:
        ours: Its answers, as `compared` gives them.
        theirs: Those of its baseline, to the same prompts.
        judges: Names of the rewards: their columns are called `rm_<judge>`.
        verdicts: Pairwise judge → what it said.
        held_out: Of its margins.
        warnings: Judge → what to tell beside its numbers.
        num_draws: Of each interval.

    Raises:
        UserError: A judge gave no answer a reward, or none that can be compared.
    """
    kl, reference = _divergence(ours, num_draws), None if theirs is None else theirs.model
    common: dict[str, Any] = {"reference": reference if kl else None, "kl": kl, "held_out": held_out}
    plain = Answered(ours.model, ours.texts, None, ours.num_tokens)
    beside = None if theirs is None else Answered(theirs.model, theirs.texts, None, theirs.num_tokens)
    overall = evaluation(plain, baseline=beside, num_draws=num_draws, **common)
    columns, records = _prompt_columns(ours), {}
    for judge in judges:
        own, other, lost = _rewarded(judge, ours, theirs)
        told = [*([warnings[judge]] if judge in warnings else []), *lost]
        records[judge] = evaluation(own, baseline=other, judge=judge, num_draws=num_draws, warnings=told, **common)
        columns |= _reward_columns(judge, own, other, list(ours.texts))
    for judge, comparison in verdicts.items():
        records[judge] = evaluation(
            plain, baseline=beside, judge=judge, comparison=comparison, num_draws=num_draws, **common
        )
        columns[f"win_{judge}"] = _wins(comparison, list(ours.texts))
    return Measured(overall, records, pa.table(columns))


def _divergence(ours: Answers, num_draws: int) -> Divergence | None:
    """KL to the baseline over the answers that have it; None where it was not measured."""
    names = [f"{what}_{ours.model}" for what in ("kl", "log_ratio", "kl_tokens")]
    if not set(names) <= ours.columns.keys():
        return None
    rows = [
        (prompt, *numbers)
        for prompt in ours.texts
        for numbers in zip(*(ours.columns[name][prompt] for name in names))
        if None not in numbers
    ]
    prompts, *sums = zip(*rows) if rows else ((), (), (), ())
    return divergence(prompts, *sums, num_draws=num_draws)


def _rewarded(judge: str, ours: Answers, theirs: Answers | None) -> tuple[Answered, Answered | None, list[str]]:
    """The answers of both that a judge gave a reward, to the prompts of which both have some; and what was lost."""
    column = f"rm_{judge}"
    own = ours.with_reward(column)
    other = None if theirs is None else theirs.with_reward(column)
    for one, answers in ((own, ours), (other, theirs)):
        if one is not None and answers is not None and not one.texts:
            raise UserError(
                f"evaluate.judges: {judge!r} gave none of the {_size(answers.texts)} answers of {answers.model!r} a "
                "reward; what its columns leave out says why (`too_long`: it needs a larger max_length, or truncation)"
            )
    told = _unjudged(judge, own, ours, "its")
    if other is not None and theirs is not None:
        told += _unjudged(judge, other, theirs, f"{theirs.model}'s")
        both = own.texts.keys() & other.texts.keys()
        if not both:
            raise UserError(
                f"evaluate.judges: {judge!r} gave answers of both {ours.model!r} and {other.name!r} a reward for no "
                "prompt; what its columns leave out says why"
            )
        if apart := len(own.texts.keys() ^ other.texts.keys()):
            told.append(f"judge {judge!r} leaves out {apart} prompts, of which it read the answers of one model alone")
        own, other = _with_equal_rewards(_only(own, both), _only(other, both))
    return own, other, told


def _with_equal_rewards(own: Answered, other: Answered) -> tuple[Answered, Answered]:
    """Both with one reward for one text: the mean of what the judge gave it wherever it stands.

    A reward moves in its last digits with what else is computed beside it, and two models that say the same would win
    and lose against each other by that.
    """
    averaged = []
    for prompt in own.texts:
        given = defaultdict[str, list[float]](list)
        for answered in (own, other):
            for text, reward in zip(answered.texts[prompt], (answered.rewards or {})[prompt]):
                given[text].append(reward)
        averaged.append({text: math.fsum(many) / len(many) for text, many in given.items()})
    means = dict(zip(own.texts, averaged))
    ours, theirs = (
        replace(one, rewards={prompt: [means[prompt][text] for text in many] for prompt, many in one.texts.items()})
        for one in (own, other)
    )
    return ours, theirs


def _unjudged(judge: str, judged: Answered, answers: Answers, whose: str) -> list[str]:
    """What to tell where a judge gave some answers no reward."""
    lost = _size(answers.texts) - _size(judged.texts)
    return [f"judge {judge!r} says nothing of {lost} of {whose} {_size(answers.texts)} answers"] if lost else []


def _only(answered: Answered, prompts: Any) -> Answered:
    kept = [prompt for prompt in answered.texts if prompt in prompts]
    rewards, tokens = answered.rewards or {}, answered.num_tokens or {}
    return Answered(
        answered.name,
        {prompt: answered.texts[prompt] for prompt in kept},
        {prompt: rewards[prompt] for prompt in kept},
        {prompt: tokens[prompt] for prompt in kept},
    )


def _size(texts: Mapping[str, Sequence[str]]) -> int:
    return sum(map(len, texts.values()))


# ------------------------------------------------------------------------------------------------------- per prompt


def _prompt_columns(ours: Answers) -> dict[str, Any]:
    """What is known of every prompt without a judge: its shard, answers, mean tokens, mean divergence."""
    prompts = list(ours.texts)
    columns: dict[str, Any] = {
        "prompt_id": pa.array(prompts, pa.string()),
        "shard": pa.array([ours.shards[prompt] for prompt in prompts], pa.string()),
        "num_answers": pa.array([len(ours.texts[prompt]) for prompt in prompts], pa.int32()),
        "num_tokens": _means(ours.num_tokens, prompts),
    }
    name = f"kl_{ours.model}"
    return columns | ({"kl": _means(ours.columns[name], prompts)} if name in ours.columns else {})


def _reward_columns(judge: str, own: Answered, other: Answered | None, prompts: Sequence[str]) -> dict[str, Any]:
    found = {f"reward_{judge}": _means(own.rewards or {}, prompts)}
    if other is not None:
        lengths = tuple(
            {prompt: [float(len(text)) for text in many] for prompt, many in one.texts.items()} for one in (own, other)
        )
        found[f"baseline_reward_{judge}"] = _means(other.rewards or {}, prompts)
        comparison = compare_rewards(own.rewards or {}, other.rewards or {}, (lengths[0], lengths[1]))
        found[f"win_{judge}"] = _wins(comparison, prompts)
    return found


def _wins(comparison: Comparison, prompts: Sequence[str]) -> pa.Array:
    """The share of wins of every prompt, ties as halves; null where the judge compared none of its answers."""
    advantages = by_prompt(comparison)
    share = dict(zip(advantages.items, ((1 + advantages.value_N) / 2).tolist()))
    return pa.array([share.get(prompt) for prompt in prompts], pa.float64())


def _means(numbers: Numbers, prompts: Sequence[str]) -> pa.Array:
    """The mean of every prompt's numbers; null where it has none."""
    known = ([one for one in numbers.get(prompt, ()) if one is not None] for prompt in prompts)
    return pa.array([float(np.mean(many)) if many else None for many in known], pa.float64())
