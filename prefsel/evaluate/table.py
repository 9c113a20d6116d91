"""All that is measured of a model, in one record that is JSON, and one line of it for people.

answers with rewards of the model ┐
those of the baseline             ├─▶ `evaluation` ─▶ `Evaluation` ─▶ `as_json`, `summary`
KL columns, held-out margins      ┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefsel.errors import UserError
from prefsel.evaluate.bootstrap import NUM_DRAWS, bootstrap_estimate
from prefsel.evaluate.comparison import Comparison, compare_rewards
from prefsel.evaluate.divergence import Divergence
from prefsel.evaluate.diversity import Diversity, diversity
from prefsel.evaluate.intervals import Estimate, Values, difference
from prefsel.evaluate.preference import HeldOut
from prefsel.evaluate.winrate import WinRate, win_rate


@dataclass(frozen=True)
class Answered:
    """What a model answered, and what a judge gave for it."""

    name: str
    texts: Mapping[str, Sequence[str]]
    """prompt_id → its answers, at least one."""
    rewards: Mapping[str, Sequence[float]] | None = None
    """Of every answer, finite; None: no judge saw them one at a time."""
    num_tokens: Mapping[str, Sequence[float]] | None = None
    """Of every answer, by the model's own tokenizer."""


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model after training; intervals are of 95 %, over prompts. None: not measured."""

    model: str
    baseline: str | None
    judge: str | None
    reference: str | None
    """Whom KL is measured to."""
    num_prompts: int
    num_answers: int
    reward: Estimate | None
    """The judge's, a mean over answers."""
    reward_difference: Estimate | None
    """To the baseline's, paired over prompts: each prompt's mean reward minus the baseline's."""
    win_rate: WinRate | None
    """Against the baseline; lengths in characters, as AlpacaEval counts."""
    held_out: HeldOut | None
    kl: Divergence | None
    tokens: Estimate | None
    """Length of the answers."""
    diversity: Diversity
    warnings: tuple[str, ...] = ()


def evaluation(
    model: Answered,
    *,
    baseline: Answered | None = None,
    judge: str | None = None,
    comparison: Comparison | None = None,
    reference: str | None = None,
    kl: Divergence | None = None,
    held_out: HeldOut | None = None,
    warnings: Sequence[str] = (),
    length_ridge: float = 0.0,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
) -> Evaluation:
    """The record of a model.

    Args:
        model: Its answers.
        baseline: Those it is compared with, to the same prompts.
        judge: Who gave the rewards, or the verdicts of `comparison`.
        comparison: Verdicts of a pairwise judge; None: they follow from the rewards, where both have some.
        reference: Whom `kl` is measured to.
        kl: See `prefsel.evaluate.divergence.divergence`.
        held_out: See `prefsel.evaluate.preference.held_out`.
        warnings: What to tell beside the numbers.
        length_ridge: See `prefsel.evaluate.length_control.length_control`.
        seed: Of the draws of the intervals.
        num_draws: Of each interval.

    Raises:
        UserError: There is no answer, numbers do not align with the answers, or the baseline answers other prompts.
    """
    if not model.texts:
        raise UserError(f"evaluation of {model.name!r}: no prompt was answered; valid: at least one")
    if comparison is not None and baseline is None:
        raise UserError(f"evaluation of {model.name!r}: a comparison without its baseline; valid: both or none")
    reward, reward_difference = None, None
    if model.rewards is not None:
        reward = bootstrap_estimate([_by_answer(model, model.rewards, "rewards")], seed=seed, num_draws=num_draws)
    if baseline is not None and model.rewards is not None and baseline.rewards is not None:
        ours, theirs = (_by_prompt(one, one.rewards or {}) for one in (model, baseline))
        if comparison is None:
            comparison = compare_rewards(model.rewards, baseline.rewards, (_lengths(model), _lengths(baseline)))
        reward_difference = bootstrap_estimate([difference(ours, theirs)], seed=seed, num_draws=num_draws)
    tokens = None if model.num_tokens is None else _by_answer(model, model.num_tokens, "numbers of tokens")
    return Evaluation(
        model=model.name,
        baseline=None if baseline is None else baseline.name,
        judge=judge,
        reference=reference,
        num_prompts=len(model.texts),
        num_answers=sum(map(len, model.texts.values())),
        reward=reward,
        reward_difference=reward_difference,
        win_rate=None
        if comparison is None
        else win_rate(comparison, length_ridge=length_ridge, seed=seed, num_draws=num_draws),
        held_out=held_out,
        kl=kl,
        tokens=None if tokens is None else bootstrap_estimate([tokens], seed=seed, num_draws=num_draws),
        diversity=diversity(model.texts, seed=seed, num_draws=num_draws),
        warnings=tuple(warnings),
    )


def as_json(found: Evaluation) -> dict[str, Any]:
    """The record as what JSON holds."""
    plain: dict[str, Any] = _plain(asdict(found))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _lengths(answered: Answered) -> dict[str, list[float]]:
    return {prompt: [float(len(text)) for text in many] for prompt, many in answered.texts.items()}


def _by_answer(answered: Answered, numbers: Mapping[str, Sequence[float]], what: str) -> Values:
    """A number of every answer, answers as items."""
    apart = [prompt for prompt, many in answered.texts.items() if len(numbers.get(prompt, ())) != len(many)]
    if apart or len(numbers) != len(answered.texts):
        more = sorted(numbers.keys() - answered.texts.keys())
        raise UserError(
            f"evaluation of {answered.name!r}: its {what} do not align with its answers for {len(apart) + len(more)} "
            f"prompts, first: {[*apart, *more][:3]}; valid: one number per answer"
        )
    rows = [(prompt, f"{prompt}/{n:06d}", value) for prompt, many in numbers.items() for n, value in enumerate(many)]
    prompts, items, values = zip(*rows)
    return Values(items, prompts, np.array(values, np.float64))


def _by_prompt(answered: Answered, rewards: Mapping[str, Sequence[float]]) -> Values:
    """The mean reward of every prompt, prompts as items."""
    prompts = sorted(rewards)
    return Values(prompts, prompts, np.array([float(np.mean(rewards[prompt])) for prompt in prompts]))


# --------------------------------------------------------------------------------------------------------- for people


def summary(found: Evaluation) -> str:
    """One line: against whom, by how much, how far from the reference, and what its answers are like."""
    parts = []
    if (wins := found.win_rate) is not None:
        parts.append(f"wins {_percent(wins.raw)} against {found.baseline} by {found.judge}")
        at_equal = wins.length_controlled
        parts.append("lengths tell nothing apart" if at_equal is None else f"at equal lengths {_percent(at_equal)}")
        if wins.num_inconsistent is not None:
            turned = wins.num_inconsistent / wins.raw.num_items
            parts.append(f"{100 * turned:.0f} % of its verdicts turn with the order")
    if found.reward_difference is not None:
        parts.append(f"reward {_number(found.reward_difference, '+.3g')}")
    elif found.reward is not None:
        parts.append(f"reward {_number(found.reward, '.3g')} by {found.judge}")
    if found.held_out is not None:
        parts.append(f"held-out accuracy {_percent(found.held_out.accuracy)}")
    if found.kl is not None:
        told = f"KL to {found.reference} {_number(found.kl.per_response, '.3g')} nats an answer"
        parts.append(f"{told}, {found.kl.per_token:.3g} a token")
    parts.append(f"{found.diversity.words.mean:.0f} words")
    if found.diversity.num_empty:
        parts.append(f"{found.diversity.num_empty} of {found.num_answers} answers empty")
    shares = {"distinct-2": found.diversity.distinct[1], "self-similarity": found.diversity.self_similarity}
    parts += [f"{name} {one.mean:.2f}" for name, one in shares.items() if one is not None]
    return f"{found.model}: " + "; ".join([*parts, *found.warnings])


def _percent(one: Estimate) -> str:
    mean, low, high = (None if end is None else 100 * end for end in (one.mean, one.low, one.high))
    return f"{mean:.1f} %" if low is None or high is None else f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def _number(one: Estimate, form: str) -> str:
    mean = f"{one.mean:{form}}"
    return mean if one.low is None or one.high is None else f"{mean} ({one.low:{form}} to {one.high:{form}})"
