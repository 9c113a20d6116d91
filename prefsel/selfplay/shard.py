"""A shard of answered prompts → what a policy makes of the best of them: one answer per prompt and strategy.

The answers are kept as they came; which of them are new prompts is decided when all are there (`evolve`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config.evolve import Evolve
from prefsel.config.generation import GenerationOptions
from prefsel.generate.answered import Refusal, Said
from prefsel.generate.shard import PolicyAnswers
from prefsel.ingest.window_tables import messages_array
from prefsel.models.writer import as_they_came
from prefsel.schema import ID, has_rest, prompts_schema
from prefsel.selfplay.evolve import Evolved, Excluded, evolved_prompt
from prefsel.selfplay.strategies import Messages, Strategy, strategy_prompt, user_turn

NOT_ASKED = "not_asked"
"""`stop` of a prompt that the policy was not asked to rewrite; its `answer` is the reason."""


def rewriting_options(generation: GenerationOptions, evolve: Evolve) -> GenerationOptions:
    """How a policy that answers so is asked to rewrite."""
    sampling = evolve.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    return generation.model_copy(update=sampling | {"samples": 1, "drop_cut": True})


class Rewriting(NamedTuple):
    """A prompt that one strategy is to rewrite."""

    place: int
    """Of the prompt in its table."""
    strategy: str
    number: int
    """Of the strategy, which is the sample of the prompt that its answer is."""
    messages: Messages | None
    """What the policy is asked; None: there is no turn of a user to rewrite."""


def rewritings(prompts: pa.Table, strategies: Sequence[Strategy]) -> list[Rewriting]:
    """What a policy is asked about prompts: each by every strategy, one strategy after the other.

    Args:
        prompts: With the column `prompt`.
        strategies: In order.
    """
    old = [as_they_came(one) for one in prompts["prompt"].to_pylist()]
    return [
        Rewriting(
            place, strategy.name, number, None if user_turn(prompt) is None else strategy_prompt(strategy, prompt)
        )
        for number, strategy in enumerate(strategies)
        for place, prompt in enumerate(old)
    ]


def rewrite(policy: PolicyAnswers, prompts: pa.Table, strategies: Sequence[Strategy]) -> pa.Table:
    """Ask for a rewritten form of every prompt by every strategy.

    Args:
        policy: What is asked.
        prompts: With the columns `prompt_id` and `prompt`.
        strategies: In order.

    Returns:
        As `answers_table`.
    """
    keys = [int.from_bytes(one[:8], "big") for one in prompts["prompt_id"].to_pylist()]
    asked = rewritings(prompts, strategies)
    said: list[Said] = []
    for number in range(len(strategies)):
        able = [one for one in asked if one.number == number and one.messages is not None]
        messages = [one.messages for one in able if one.messages is not None]
        said += policy.ask(messages, [keys[one.place] for one in able], samples=1, first_sample=number)
    return answers_table(prompts, asked, said)


def answers_table(prompts: pa.Table, asked: Sequence[Rewriting], said: Sequence[Said]) -> pa.Table:
    """The answers beside what was asked.

    Args:
        prompts: With the columns `prompt_id` and `prompt`.
        asked: As `rewritings` returns them.
        said: To each of them that has messages, in their order.

    Returns:
        `parent_id`, `prompt` (the old one), `strategy`, `answer` and `stop`, a row per prompt and strategy.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("place", "strategy", "answer", "stop")}
    answers = iter(said)
    for one in asked:
        found = Refusal("no_user_turn", "") if one.messages is None else next(answers)
        answer, stop = (found.reason, NOT_ASKED) if isinstance(found, Refusal) else (found[0].text, found[0].stop)
        for name, value in zip(columns, (one.place, one.strategy, answer, stop)):
            columns[name].append(value)
    taken = prompts.select(["prompt_id", "prompt"]).take(pa.array(columns.pop("place"), pa.int64()))
    named = taken.rename_columns(["parent_id", "prompt"])
    for name, values in columns.items():
        named = named.append_column(name, pa.array(values, pa.string()))
    return named


def new_prompts(
    answers: pa.Table,
    strategies: Sequence[Strategy],
    *,
    length_factor: float | None,
    excluded: Excluded,
    seen: Collection[bytes],
    fits: Callable[[Messages], bool],
) -> Iterator[Evolved | str]:
    """What `evolved_prompt` makes of every answer, in order; answers that were cut are none (`cut_off`).

    Args:
        answers: As `rewrite` returns them.
        strategies: Those that were asked.
        length_factor: As for `evolved_prompt`.
        excluded: As for `evolved_prompt`.
        seen: prompt_ids that there were before.
        fits: As for `evolved_prompt`.
    """
    by_name = {one.name: one for one in strategies}
    for row in answers.to_pylist():
        if row["stop"] == NOT_ASKED:
            yield row["answer"]
        elif row["stop"] != "end":
            yield "cut_off" if row["stop"] == "length" else row["stop"]
        else:
            yield evolved_prompt(
                as_they_came(row["prompt"]),
                by_name[row["strategy"]],
                row["answer"],
                length_factor=length_factor,
                excluded=excluded,
                is_seen=seen.__contains__,
                fits=fits,
            )


def prompts_table(evolved: Sequence[Evolved], answers: pa.Table) -> pa.Table:
    """New prompts as a shard of prompts, with their parents and strategies.

    Args:
        evolved: The prompts.
        answers: The table they were made of, which says whether messages hold more than role and content.
    """
    schema = prompts_schema(has_rest=has_rest(answers))
    columns = {
        "prompt_id": pa.array([one.prompt_id for one in evolved], ID),
        "prompt": messages_array([one.messages for one in evolved], has_rest(answers)),
        "parent_id": pa.array([one.parent for one in evolved], ID),
        "strategy": pa.array([one.strategy for one in evolved], pa.string()),
    }
    return pa.table(columns, schema=schema)


def chosen_prompts(groups: pa.Table, kept: pa.Table) -> pa.Table:
    """The prompts of kept pairs, each once, in the order of the groups.

    Args:
        groups: A shard of groups, with `prompt_id` and `prompt`.
        kept: What a selection kept of its pairs, with `prompt_id`.
    """
    return groups.filter(pc.is_in(groups["prompt_id"], value_set=pc.unique(kept["prompt_id"])))
