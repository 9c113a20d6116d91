"""Models of an earlier run, kept for scoring: what a refresh scores with, so that stored numbers stay comparable.

The recipe of a trained model names the corpus, so a corpus that has grown asks for other models, and these for all
numbers anew. A refresh keeps the former ones instead, as long as the configuration asks for them in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from prefsel.plan.node import Kind, Node
from prefsel.plan.plan import Plan, in_order

STAGES: Mapping[str, Kind] = {"train": "model", "reward": "model", "scratch": "scratch", "tangent": "tangent"}
"""Stages of a manifest, and the kinds of nodes that they make."""


@dataclass(frozen=True)
class Former:
    """What an earlier run made and this one goes by."""

    kept: Mapping[tuple[Kind, str], str]
    """(kind, name) → fingerprint of a model or tangent that is scored with again."""
    shards: frozenset[str]
    """Keys of the shards that the corpus had: numbers of their completions are not computed again."""


@dataclass(frozen=True, eq=False)
class PinnedNode(Node):
    """A node whose artifact is one that an earlier run made: it needs nothing, and its recipe is that one's."""

    pinned: str = field(default="", kw_only=True)
    """The fingerprint of the artifact."""

    @cached_property
    def fingerprint(self) -> str:
        """That of the earlier run."""
        return self.pinned


def pin(node: Node, fingerprint: str) -> Node:
    """The node with an artifact of its name and this fingerprint."""
    kept = {one.name: getattr(node, one.name) for one in fields(Node)} | {"needs": ()}
    return PinnedNode(**kept, pinned=fingerprint)


def scoring_models(plan: Plan) -> list[Node]:
    """The models and tangents that column sets need, and those that these need; not what is trained at the end."""
    columns = [plan.node("columns", scorer.label) for scorer in plan.scorers]
    return [node for node in in_order(columns) if node.kind in STAGES.values()]


def former(plan: Plan, then: Plan, manifest: Mapping[str, Any]) -> tuple[Former, list[str]]:
    """What of an earlier run this one goes by.

    Args:
        plan: Of the configuration as it is now.
        then: Of that run's configuration; nothing of it is computed.
        manifest: Of that run.

    Returns:
        It, and the names of models that are asked for in other words than then, or that it did not make: they are made
        anew, and score everything.
    """
    stages = [one for one in manifest["stages"] if one["stage"] in STAGES]
    made = {(STAGES[one["stage"]], one["name"]): one["fingerprint"] for one in stages}
    kept: dict[tuple[Kind, str], str] = {}
    anew = []
    for node in scoring_models(plan):
        key = (node.kind, node.name)
        if key in made and asked_alike(node, then.node(*key)):
            kept[key] = made[key]
        else:
            anew.append(node.name)
    return Former(kept, frozenset(manifest.get("shards", ()))), anew


def asked_alike(left: Node, right: Node) -> bool:
    """Whether two configurations ask for a node, and for all that it needs, in the same words."""
    if (left.kind, left.name, left.spec, left.member) != (right.kind, right.name, right.spec, right.member):
        return False
    needs = (left.needs, right.needs)
    if len(needs[0]) != len(needs[1]):
        return False
    return all(asked_alike(one.node, other.node) for one, other in zip(*needs))
