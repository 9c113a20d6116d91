"""Answers of two models to the same prompts beside each other, and what a judge says of every two.

    rewards of both, every answer of ours beside every one of theirs ┐
    a pairwise judge, asked in both orders                           ┴─▶ `Comparison`: advantages from −1 to 1

Advantages are wins minus losses, and not shares of wins: when the models change places they change their sign and
nothing else, in every sum and every draw, so a win rate is 1 minus the other's to the last bit.

Shapes: M rows, an answer of ours beside one of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prefsel.errors import NonFiniteError, UserError
from prefsel.evaluate.bootstrap import Floats
from prefsel.evaluate.intervals import Values
from prefsel.evaluate.judges import PairwiseJudge, Prompt, preferences_of

Lengths: TypeAlias = Mapping[str, Sequence[float]]
"""Prompt → length of each of its answers."""


@dataclass(frozen=True)
class Comparison:
    """Answers of two models beside each other, and what a judge said. Of a shard, or of all: see `merged`."""

    prompts: tuple[str, ...]
    """The prompt of each row, M."""
    advantage_M: Floats
    """1 where ours wins, −1 where theirs does, 0 for a tie; between them where a judge gives preferences."""
    length_difference_M: Floats
    """|ours| − |theirs|, in any unit."""
    num_inconsistent: int | None = None
    """Rows whose verdict turned with the order; None where the judge sees one answer at a time."""
    first_place: float | None = None
    """The preference for whatever stood first, summed over the rows; half of their number where order is nothing."""


def compare_rewards(
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    lengths: tuple[Lengths, Lengths],
) -> Comparison:
    """Every answer of ours beside every one of theirs to the same prompt, by the rewards that a judge gave to each.

    Args:
        ours: Prompt → rewards of its answers, finite.
        theirs: The same prompts → rewards of the baseline's answers; they may be more or fewer.
        lengths: Prompt → lengths of the answers, of ours and of theirs, aligned with the rewards.

    Raises:
        UserError: A prompt is missing on one side or has no answer, or rewards and lengths do not align; names it.
        NonFiniteError: A reward or a length is NaN or infinite; names the prompts.
    """
    _require_same_prompts(ours, theirs)
    _require_finite(rewards=(ours, theirs), lengths=lengths)
    prompts: list[str] = []
    advantages, differences = [], []
    for prompt in sorted(ours):
        own, other = np.asarray(ours[prompt], np.float64), np.asarray(theirs[prompt], np.float64)
        own_length, other_length = (np.asarray(one.get(prompt, ()), np.float64) for one in lengths)
        if own.shape != own_length.shape or other.shape != other_length.shape or not len(own) or not len(other):
            raise UserError(
                f"answers of prompt {prompt!r}: {len(own)} and {len(other)} rewards, {len(own_length)} and "
                f"{len(other_length)} lengths; valid: one length per reward, and an answer on both sides"
            )
        advantages.append(np.sign(own[:, None] - other[None, :]).ravel())
        differences.append((own_length[:, None] - other_length[None, :]).ravel())
        prompts += [prompt] * len(advantages[-1])
    return Comparison(tuple(prompts), _joined(advantages), _joined(differences))


def compare_pairwise(
    judge: PairwiseJudge,
    prompt_ids: Sequence[str],
    prompts: Sequence[Prompt],
    ours: Sequence[str],
    theirs: Sequence[str],
    length_difference_M: npt.ArrayLike,
) -> Comparison:
    """Every answer of ours beside one of theirs, by a judge who sees both: asked in both orders, which are averaged.

    Args:
        judge: It is called twice, with M rows each.
        prompt_ids: Names of the prompts, M; several rows may have the same one.
        prompts: The prompts themselves, M.
        ours: Answers, M.
        theirs: The baseline's, M.
        length_difference_M: |ours| − |theirs|.

    Raises:
        UserError: The judge gives something else than M numbers from 0 to 1.
    """
    difference_M = np.asarray(length_difference_M, np.float64)
    sizes = {len(one) for one in (prompt_ids, prompts, ours, theirs, difference_M)}
    if len(sizes) != 1:
        raise UserError(f"rows to compare: got columns of {sorted(sizes)} rows; valid: equally many")
    ours_first_M = preferences_of(judge, prompts, ours, theirs, prompt_ids)
    theirs_first_M = preferences_of(judge, prompts, theirs, ours, prompt_ids)
    # p(ours | ours first) + 1 − p(theirs | theirs first), halved, in −1 … 1.
    turned_M = np.sign(ours_first_M - 0.5) * np.sign(theirs_first_M - 0.5) > 0
    return Comparison(
        tuple(prompt_ids),
        ours_first_M - theirs_first_M,
        difference_M,
        int(turned_M.sum()),
        float((ours_first_M + theirs_first_M).sum()) / 2,
    )


def merged(parts: Sequence[Comparison]) -> Comparison:
    """The comparisons of shards as one; a prompt stands in one shard only.

    Raises:
        UserError: A prompt stands in several.
    """
    seen: set[str] = set()
    for part in parts:
        if again := sorted(seen & set(part.prompts)):
            raise UserError(f"comparisons: {len(again)} prompts stand in several shards, first: {again[:3]}")
        seen |= set(part.prompts)
    turned = [part.num_inconsistent for part in parts if part.num_inconsistent is not None]
    first = [part.first_place for part in parts if part.first_place is not None]
    return Comparison(
        tuple(prompt for part in parts for prompt in part.prompts),
        _joined([part.advantage_M for part in parts]),
        _joined([part.length_difference_M for part in parts]),
        sum(turned) if turned else None,
        sum(first) if first else None,
    )


def by_prompt(comparison: Comparison) -> Values:
    """The mean advantage of every prompt, prompts by name: what two comparisons, or several seeds, are paired by."""
    return mean_by_prompt(comparison, comparison.advantage_M)


def mean_by_prompt(comparison: Comparison, value_M: Floats) -> Values:
    """The mean of the rows' values for every prompt, prompts by name."""
    prompts, group_M = np.unique(np.array(comparison.prompts, dtype=np.str_), return_inverse=True)
    sums, sizes = np.bincount(group_M, weights=value_M), np.bincount(group_M)
    names = prompts.tolist()
    return Values(names, names, sums / sizes)


def _require_same_prompts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for one, other, who in ((ours, theirs, "the baseline"), (theirs, ours, "the model")):
        if lacking := sorted(one.keys() - other.keys()):
            raise UserError(
                f"answers: {who} has none to {len(lacking)} prompts, first: {lacking[:3]}; valid: both models answer "
                "the same prompts"
            )


def _require_finite(**numbers: tuple[Lengths, Lengths]) -> None:
    for what, sides in numbers.items():
        if bad := sorted({p for side in sides for p, many in side.items() if not np.isfinite(np.asarray(many)).all()}):
            raise NonFiniteError(f"answers: {what} of {len(bad)} prompts are NaN or infinite, first: {bad[:3]}")


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0)
