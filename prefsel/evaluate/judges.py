"""Judges: who says what an answer is worth, or which of two is better.

    a reward model that scored the answers                   ColumnJudge     its column is read, nobody is asked
    the world's gold reward   `gold_judge`   ┐
    a function of the user's  `load_judge`   ┴┬─▶            RewardJudge     one answer → a reward, larger is better
                                              └─▶            PairwiseJudge   two answers in an order → a preference

What a judge gives is checked before it is counted, and named by prompt where it is no number.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.plugins.registry import code_hash, code_parts
from prefsel.world.gold import gold

Floats: TypeAlias = npt.NDArray[np.float64]
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A single user message as text, or messages with `role` and `content`."""
Kind: TypeAlias = Literal["reward", "pairwise"]
PARAMETERS = {"reward": ("prompts", "answers"), "pairwise": ("prompts", "answers_a", "answers_b")}
FIRST_NAMED = 5


@dataclass(frozen=True)
class ColumnJudge:
    """A reward model that has scored the answers: its numbers lie in a column, and `checked` reads them."""

    name: str
    identity: str
    """As `RewardJudge`: the fingerprint of the column."""


@dataclass(frozen=True)
class RewardJudge:
    """One who sees an answer at a time."""

    name: str
    """For people."""
    identity: str
    """What decides its numbers: a scorer's fingerprint, or the hash of a function's source file. Part of recipes."""
    rewards: Callable[[Sequence[Prompt], Sequence[str]], Any]
    """(N prompts, N answers) → N finite numbers, larger is better."""


@dataclass(frozen=True)
class PairwiseJudge:
    """One who sees two answers, in an order; both orders are asked."""

    name: str
    identity: str
    """As `RewardJudge`."""
    preferences: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Any]
    """(N prompts, N answers shown first, N shown second) → N numbers from 0 to 1: 1 where the first is better."""


Judge: TypeAlias = ColumnJudge | RewardJudge | PairwiseJudge


def gold_judge() -> RewardJudge:
    """The gold reward of the generated world, from the words of the last user message and the answer."""
    return RewardJudge(
        "gold", "world gold 1", lambda prompts, answers: [gold(question_of(p), a) for p, a in zip(prompts, answers)]
    )


def load_judge(path: str, kind: Kind) -> RewardJudge | PairwiseJudge:
    """A function of the user's as a judge.

    Args:
        path: `package.module:function`, importable here and wherever it is called.
        kind: `reward`, a function (prompts, answers) → rewards; or `pairwise`, a function (prompts, answers_a,
            answers_b) → preferences for a, from 0 to 1, where a is shown first.

    Raises:
        UserError: It cannot be imported, is no function that takes so many lists, or lies in no file.
    """
    if kind not in PARAMETERS:
        raise invalid("judge kind", kind, PARAMETERS)
    module_name, colon, function_name = path.partition(":")
    if not colon or not function_name or not module_name:
        raise invalid("judge", path, "package.module:function")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, SyntaxError, AttributeError) as error:
        raise UserError(
            f"judge {path!r}: it cannot be imported: {error}; it must be importable here and on every worker: install "
            "it, or set PYTHONPATH (for a Ray job, `py_modules` or `working_dir` of its runtime environment)"
        ) from error
    names = PARAMETERS[kind]
    try:
        inspect.signature(found).bind(*names)
    except TypeError as error:
        raise UserError(
            f"judge {path!r}: a {kind} judge is called with {len(names)} lists ({', '.join(names)}), and it is not "
            f"made for that: {error}"
        ) from error
    identity = code_hash([sys.modules[module_name], *code_parts(found)], f"judge {path!r}")
    return RewardJudge(path, identity, found) if kind == "reward" else PairwiseJudge(path, identity, found)


# ------------------------------------------------------------------------------------------------------ what it says


def rewards_of(judge: RewardJudge, prompts: Sequence[Prompt], answers: Sequence[str], names: Sequence[str]) -> Floats:
    """The rewards of N answers, float64.

    Args:
        judge: It is called once.
        prompts: The prompt of each answer.
        answers: Texts.
        names: What errors call the prompts: their ids.

    Raises:
        UserError: It gives something else than N numbers.
        NonFiniteError: One of them is NaN or infinite; names the prompts.
    """
    return checked(judge.name, "rewards", judge.rewards(prompts, answers), names)


def preferences_of(
    judge: PairwiseJudge,
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    names: Sequence[str],
) -> Floats:
    """The preferences for the answers that are shown first, N from 0 to 1.

    Args:
        judge: It is called once.
        prompts: The prompt of each row.
        first: The answers shown first.
        second: The answers shown second.
        names: What errors call the prompts: their ids.

    Raises:
        UserError: It gives something else than N numbers from 0 to 1; names the prompts.
        NonFiniteError: One of them is NaN or infinite; names the prompts.
    """
    found_N = checked(judge.name, "preferences", judge.preferences(prompts, first, second), names)
    outside = np.flatnonzero((found_N < 0) | (found_N > 1))
    if len(outside):
        raise UserError(
            f"judge {judge.name!r}: {len(outside)} preferences lie outside 0 to 1, first {found_N[outside[0]]:g} for "
            f"prompt {names[outside[0]]}; valid: 1 where the first answer is better, 0 where the second is"
        )
    return found_N


def checked(judge: str, what: str, given: Any, names: Sequence[str]) -> Floats:
    """Numbers of a judge, float64 and finite, one per name.

    Args:
        judge: What errors call it.
        what: What errors call its numbers, such as "rewards".
        given: What it gave.
        names: What errors call the rows: ids of their prompts.

    Raises:
        UserError: They are no numbers, or not as many.
        NonFiniteError: One is NaN or infinite.
    """
    try:
        found_N = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"judge {judge!r}: its {what} are no numbers: {error}; valid: {len(names)} numbers") from error
    if found_N.shape != (len(names),):
        shape = "one number" if found_N.ndim == 0 else " × ".join(map(str, found_N.shape))
        raise UserError(f"judge {judge!r}: it gave {shape} {what}; valid: {len(names)}, one per row it was given")
    bad = np.flatnonzero(~np.isfinite(found_N))
    if len(bad):
        shown = [names[row] for row in bad[:FIRST_NAMED]]
        raise NonFiniteError(f"judge {judge!r}: {len(bad)} {what} are NaN or infinite, first for prompts {shown}")
    return found_N


def question_of(prompt: Prompt) -> str:
    """The text of the last user message.

    Raises:
        UserError: There is none.
    """
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    if not asked or not isinstance(asked[-1], str):
        raise UserError(f"prompt: no user message with a text among the roles {[one['role'] for one in prompt]}")
    return asked[-1]


# --------------------------------------------------------------------------------------------------- independence


def judged_before(judge: Judge, used: Mapping[str, str]) -> str:
    """A warning where a judge measures what it helped to make: a model trained on its own preferences pleases it.

    Args:
        judge: Of the evaluation.
        used: What chose or labelled the pairs that the model was trained on: name → identity.

    Returns:
        One sentence that names them; empty where the judge is none of them.
    """
    same = sorted(name for name, identity in used.items() if identity == judge.identity)
    if not same:
        return ""
    return (
        f"judge {judge.name!r} also chose what the model was trained on ({', '.join(same)}): its rewards rise with "
        "whatever it is wrong about, so judge with another model as well"
    )
