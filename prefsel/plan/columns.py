"""Which scorer makes which column, and readers of pairs with the columns that somebody needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from prefsel.config.columns import completion_column, maker_of
from prefsel.config.lookup import find
from prefsel.errors import UserError
from prefsel.pairs.reader import PairReader
from prefsel.plan.models import head_names
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plan.scores import metric_columns
from prefsel.rules import rule_scores

KEYS = ("pair_id", "prompt_id", "aspect", "source")
"""Flat columns that no scorer makes."""


def carried_names(plan: Plan) -> tuple[str, ...]:
    """The fields of rows that some source carries, each once, in the order of the configuration."""
    return tuple(dict.fromkeys(name for source in plan.config.sources for name in source.carry))


def column_names(plan: Plan, scorer: Any) -> list[str]:
    """Names of the columns that a scorer makes."""
    names: list[str] = scorer.columns(plan.config, partial(head_names, plan))
    return names


def scorers_by_column(plan: Plan) -> dict[str, Any]:
    """Completion column → the scorer that makes it.

    Raises:
        UserError: two scorers make the same column.
    """
    found: dict[str, Any] = {}
    for scorer in plan.scorers:
        for column in column_names(plan, scorer):
            if column in found:
                raise UserError(f"scorers: {column!r} would be made twice; give one of the models another name")
            found[column] = scorer
    return found


def scorers_for(plan: Plan, flat_names: Sequence[str], *, field: str) -> list[Any]:
    """The scorers that make the given flat columns (`rm_x_chosen`), in configuration order.

    Raises:
        UserError: nothing makes one of them; `field` says who needs it.
    """
    makers, needed, carried = scorers_by_column(plan), [], carried_names(plan)
    for name in flat_names:
        column = name if name in makers else completion_column(name)
        if column in KEYS or name in carried:
            continue
        if column == "num_tokens":  # of whichever model counted them first
            column = next((made for made in makers if made.startswith("num_tokens_")), column)
        if column not in makers:
            maker, made = maker_of(column) or "no kind of scorer of this package", ", ".join(makers) or "none"
            hint = "" if maker_of(column) else "; a field of the rows is there if sources[].carry names it"
            raise UserError(f"{field}: needs column {column!r}, which {maker} makes; made: {made}{hint}")
        needed.append(makers[column])
    return [scorer for scorer in plan.scorers if any(scorer is one for one in needed)]


def reference_scorer(plan: Plan, model: str) -> Any:
    """The scorer that makes `logps_<model>`; errors as `scorers_for`."""
    return scorers_for(plan, [f"logps_{model}_chosen"], field=f"reference {model}")[0]


def _needs_no_training(plan: Plan, scorer: Any) -> bool:
    """Whether the columns of a scorer can be there before anything is trained."""
    made_before = plan.outer.config.train if plan.outer else []
    trained = [spec for spec in plan.config.train if find(made_before, spec.name) is None]
    return not any(find(trained, name) for name in scorer.models(plan.config))


def length_scorer(plan: Plan) -> Any:
    """Whose token counts are the lengths of reports and of `length_bin`; None: characters are counted."""
    return next((one for one in plan.scorers if one.reference_model and _needs_no_training(plan, one)), None)


def dataset_scorers(plan: Plan, name: str) -> list[Any]:
    """The scorers whose columns stand in the dataset of selection (or control, or part) `name`.

    Those that need no training, what its rule reads, and the references of the trainings on it: all of them are there
    when the dataset is written, and a scorer that runs on a model trained on it is not among them.
    """
    wanted = [scorer for scorer in plan.scorers if _needs_no_training(plan, scorer)]
    for selection in plan.config.selections:
        if name in selection.names:
            for metric in rule_scores(selection.rule):
                wanted += scorers_for(plan, metric_columns(plan, metric), field=f"metrics.{metric}")
    trained = [spec for spec in plan.config.train if name in (spec.selection, getattr(spec, "mixed_with", None))]
    references = [spec.reference for spec in trained if spec.reference]
    played = [arm.reference_of(1) for arm in plan.config.selfplay if arm.mixed_with == name and plan.made is None]
    references += [reference for reference in played if reference]
    wanted += [reference_scorer(plan, reference) for reference in references]
    return [scorer for scorer in plan.scorers if any(scorer is one for one in wanted)]


def column_nodes(plan: Plan, scorers: Sequence[Any], *, lengths: bool = True) -> dict[Node, tuple[str, ...]]:
    """The column sets of some scorers, and the lengths unless they are not needed, with the columns read from each."""
    found = {plan.node("columns", scorer.label): tuple(column_names(plan, scorer)) for scorer in scorers}
    counter = length_scorer(plan) if lengths else None
    if counter is not None and counter not in scorers:
        found[plan.node("columns", counter.label)] = (length_column(plan) or "",)
    return found


def length_column(plan: Plan) -> str | None:
    """The column of token counts that lengths are read from; None: characters are counted."""
    counter = length_scorer(plan)
    return f"num_tokens_{counter.reference_model}" if counter else None


def pair_texts(plan: Plan) -> PairReader:
    """A reader of pairs without any column: texts and drop reasons."""
    return PairReader(plan.storage, plan.node("eligible", "all").path)


def pair_reader(plan: Plan, scorers: Sequence[Any], *, lengths: bool = True) -> PairReader:
    """A reader of flat pair tables with the columns of some scorers, and the lengths unless they are not needed.

    Raises:
        UserError: a model that a column needs is not made yet.
    """
    nodes = column_nodes(plan, scorers, lengths=lengths)
    columns = tuple((node.path, names) for node, names in nodes.items())
    eligible = plan.node("eligible", "all").path
    length = length_column(plan) if lengths else None
    return PairReader(plan.storage, eligible, columns, length, carried_names(plan))
