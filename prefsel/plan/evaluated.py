"""The node of an evaluation: what it follows from, and what its judges must be asked."""

from __future__ import annotations

from typing import Any

from prefsel.config import Evaluation, PairwiseFunction
from prefsel.errors import UserError
from prefsel.evaluate.judges import ColumnJudge, judged_before
from prefsel.plan.columns import column_names
from prefsel.plan.made import Evaluated, Made
from prefsel.plan.models import model_nodes
from prefsel.plan.node import Need, Node, by_fingerprint, by_path
from prefsel.plan.plan import Plan
from prefsel.score.function import pairwise_judge, reward_judge
from prefsel.workspace.recipes import fingerprint, recipe


def evaluated_of(plan: Plan) -> tuple[Made, Evaluated]:
    """How the answers of an evaluation's plan are made, and what is measured of them."""
    assert plan.made is not None, "an evaluation is of a corpus that is made"
    assert plan.made.evaluation is not None, "an evaluation is of a corpus that is made to be evaluated"
    return plan.made, plan.made.evaluation


def reward_columns(plan: Plan) -> dict[str, str]:
    """The rewards of an evaluation's judges: column → label of the scorer that makes it.

    Raises:
        UserError: a judge makes other columns than rewards, two make the same one, or one that a pairwise judge is
            called like.
    """
    options, found = plan.root.config.evaluate, dict[str, str]()
    assert options is not None, "asked of configurations that evaluate"
    expanded = [one for judge in options.judges for one in judge.expanded(plan.config)]
    for judge in expanded:
        for column in column_names(plan, judge):
            if not column.startswith("rm_") or column in found:
                why = "is made twice" if column in found else "is no reward (`rm_…`)"
                raise UserError(f"evaluate.judges: column {column!r} of {judge.label!r} {why}")
            found[column] = judge.label
    if twice := [one.name for one in options.pairwise if f"rm_{one.name}" in found]:
        raise UserError(f"evaluate.pairwise: the name {twice[0]!r} is that of a reward already; names must differ")
    return found


def evaluation_node(plan: Plan, name: str) -> Node:
    """What is measured of a model's answers: it follows from them, from those of its baseline, and from their columns.

    The weights are named too: with them come the margins of held-out pairs.
    """
    made, evaluated = evaluated_of(plan)
    options: Evaluation = evaluated.options
    rewards, other = reward_columns(plan), evaluated.baseline
    needs = [
        by_fingerprint(plan.node("prompts", made.prompts.name), "prompts"),
        by_path(plan.node("groups", made.answers), "groups"),
    ]
    needs += [by_path(plan.node("columns", scorer.label), scorer.label) for scorer in plan.scorers]
    if other is not None:
        needs.append(by_path(other.node("groups", other.made.answers), "baseline groups"))
        needs += [
            by_path(other.node("columns", label), f"baseline {label}") for label in dict.fromkeys(rewards.values())
        ]
    needs += [by_path(node, "model") if node.kind == "model" else Need(node) for node in model_nodes(plan, made.policy)]

    def write_recipe(node: Node) -> dict[str, Any]:
        settings = {
            "resamples": options.resamples,
            "rewards": list(rewards),
            "baseline": other.made.policy if other else None,
            "pairwise": [pairwise_settings(one) for one in options.pairwise] if other else [],
            "warned": list(warnings(plan).values()),
        } | _counted(made)
        return recipe("evaluate", settings, upstream=node.upstream)

    return Node("evaluation", name, made, tuple(needs), write_recipe, "evaluations")


def _counted(made: Made) -> dict[str, str]:
    """Stands in recipes of several samples, of which earlier versions counted a text once however often it came."""
    return {"repeated": "counted"} if made.generation.samples > 1 else {}


def pairwise_settings(judge: PairwiseFunction) -> dict[str, str]:
    """What of a pairwise judge changes what it says."""
    return {"name": judge.name, "function": judge.function, "code": pairwise_judge(judge.function).identity}


def verdicts_path(plan: Plan, judge: PairwiseFunction) -> str:
    """Folder of what a pairwise judge said of the answers of a model and of its baseline."""
    made, evaluated = evaluated_of(plan)
    other = evaluated.baseline
    ours, theirs = plan.node("groups", made.answers), other.node("groups", other.made.answers)
    settings = {key: value for key, value in pairwise_settings(judge).items() if key != "name"} | _counted(made)
    made_of = recipe("verdicts", settings, upstream={"ours": ours.path, "theirs": theirs.path})
    return f"verdicts/{judge.name}@{fingerprint(made_of)}"


def warnings(plan: Plan) -> dict[str, str]:
    """Every judge that also chose or labelled what the evaluated model was trained on → one sentence that says so."""
    _, evaluated = evaluated_of(plan)
    used = evaluated.used() if evaluated.used is not None else {}
    judges = [
        ColumnJudge(column.removeprefix("rm_"), judge_identity(plan, label))
        for column, label in reward_columns(plan).items()
    ]
    return {judge.name: told for judge in judges if (told := judged_before(judge, used))}


def judge_identity(plan: Plan, label: str) -> str:
    """What decides the numbers of a scorer, whatever its column is called: the code of a function, or its recipe."""
    path = next((one.function_path for one in plan.scorers if one.label == label), None)
    return reward_judge(path).identity if path else plan.node("columns", label).fingerprint
