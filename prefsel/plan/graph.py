"""Which artifact needs which: a graph of nodes, walked so that everything comes after what it is made from.

A training is a model, models make columns, columns make scores, scores make selections, and selections are trained on:
so there is no fixed line of stages, only what each node names in the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prefsel.config import PARTS, CausalLogps, DirectionalLogps, GeneratedReward, PairGradients, Train
from prefsel.config.naming import scorer_label, scorer_models, selection_names
from prefsel.errors import UserError, invalid
from prefsel.plan.lineage import Lineage
from prefsel.rules import rule_scores

Kind = Literal["scratch", "columns", "tangent", "metric", "select", "train", "holdout"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Node:
    """Something the pipeline makes: all scratch models, a column set, a tangent, a metric, a selection, a training."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


def all_nodes(lineage: Lineage) -> list[Node]:
    """Everything the configuration asks for, in its own order."""
    config = lineage.config
    nodes = [Node("scratch")] if any(spec.kind != "pretrained" for spec in config.models) else []
    nodes += [Node("columns", scorer_label(scorer)) for scorer in lineage.scorers]
    nodes += [Node("tangent", spec.name) for spec in config.tangents]
    nodes += [Node("metric", name) for name in lineage.metrics]
    nodes += [Node("select", spec.name) for spec in config.selections]
    nodes += [Node("train", spec.name) for spec in config.train]
    return [*nodes, Node("holdout")] if any(isinstance(spec, Train) for spec in config.train) else nodes


def needs(lineage: Lineage, node: Node) -> list[Node]:
    """What must be there before `node` can be made.

    Raises:
        UserError: the configuration names something that it does not have.
    """
    return list(dict.fromkeys(_needs(lineage, node)))


def _needs(lineage: Lineage, node: Node) -> Iterator[Node]:
    if node.kind == "columns":
        scorer = lineage.scorer(node.name)
        for name in scorer_models(scorer, lineage.tangents):
            yield from _model(lineage, name)
        if isinstance(scorer, DirectionalLogps | PairGradients):
            yield Node("tangent", _known(lineage, scorer.tangent))
        if isinstance(scorer, PairGradients):
            yield _reference(lineage, lineage.tangents[scorer.tangent].reference)
        if isinstance(scorer, GeneratedReward):
            yield from _model(lineage, scorer.policy)
    elif node.kind == "tangent":
        spec = lineage.tangents[node.name]
        yield from _model(lineage, spec.model)
        yield _reference(lineage, spec.reference)
    elif node.kind == "metric":
        scorers = lineage.scorers_for(lineage.metric_columns(node.name), field=f"metrics.{node.name}")
        yield from _columns(lineage, scorers)
        if node.name in lineage.controls:
            yield Node("metric", lineage.controls[node.name])
    elif node.kind == "select":
        selection = next(spec for spec in lineage.config.selections if spec.name == node.name)
        scores = rule_scores(selection.rule)
        yield from (Node("metric", metric) for metric in scores)
        if "random" in selection.controls:
            yield from (Node("metric", name) for name, base in lineage.controls.items() if base in scores)
        written = [name for name in selection_names(selection) if lineage.writes_dataset(name)]
        yield from _columns(lineage, [scorer for name in written for scorer in lineage.exported(name)])
    elif node.kind == "train":
        yield from _training(lineage, node.name)
    elif node.kind == "holdout":
        yield from _columns(lineage, lineage.exported("holdout"))


def _columns(lineage: Lineage, scorers: Sequence[object]) -> Iterator[Node]:
    # Lengths, which every score is set against, are a column too.
    wanted = [*scorers, lineage.length_scorer] if lineage.length_scorer else scorers
    yield from (Node("columns", scorer_label(scorer)) for scorer in lineage.scorers if any(scorer is w for w in wanted))


def _training(lineage: Lineage, name: str) -> Iterator[Node]:
    spec = lineage.training(name)
    yield from _model(lineage, spec.model)
    if not isinstance(spec, Train):
        return
    if spec.reference:
        yield _reference(lineage, spec.reference)
    if spec.selection not in PARTS:
        base = next((s for s in lineage.config.selections if spec.selection in selection_names(s)), None)
        if base is None:
            valid = [*PARTS, *(one for s in lineage.config.selections for one in selection_names(s))]
            raise invalid(f"train.{name}.selection", spec.selection, valid)
        yield Node("select", base.name)
    if spec.divergence:
        yield Node("metric", spec.divergence)


def _model(lineage: Lineage, name: str) -> Iterator[Node]:
    if name in lineage.trainings:
        yield Node("train", name)
    elif lineage.model_spec(name).kind != "pretrained":
        yield Node("scratch")


def _reference(lineage: Lineage, name: str) -> Node:
    return Node("columns", scorer_label(lineage.logps_scorer(name)))


def _known(lineage: Lineage, tangent: str) -> str:
    if tangent not in lineage.tangents:
        raise invalid("scorers.tangent", tangent, lineage.tangents or "none: `tangents` is empty")
    return tangent


def in_passes(lineage: Lineage, order: Sequence[Node]) -> list[list[Node]]:
    """`order` with columns of log-probs put beside the first of them for which everything is there as well.

    What stands together can be made in one pass over the shards; every node still comes after what it needs.
    """
    left, passes = list(order), []
    done: set[Node] = set()
    while left:
        together = [left.pop(0)]
        if _is_logps(lineage, together[0]):
            ready = [node for node in left if _is_logps(lineage, node) and done.issuperset(needs(lineage, node))]
            together += ready
            left = [node for node in left if node not in ready]
        passes.append(together)
        done.update(together)
    return passes


def _is_logps(lineage: Lineage, node: Node) -> bool:
    return node.kind == "columns" and isinstance(lineage.scorer(node.name), CausalLogps)


def ordered(lineage: Lineage, targets: list[Node]) -> list[Node]:
    """`targets` and all they need, every node after what it needs.

    Raises:
        UserError: a node needs itself, through others; names the circle.
    """
    done: dict[Node, None] = {}

    def visit(node: Node, above: tuple[Node, ...]) -> None:
        if node in done:
            return
        if node in above:
            circle = " → ".join(str(one) for one in (*above[above.index(node) :], node))
            raise UserError(f"configuration: {node} needs itself: {circle}")
        for needed in needs(lineage, node):
            visit(needed, (*above, node))
        done[node] = None

    for target in targets:
        visit(target, ())
    return list(done)
