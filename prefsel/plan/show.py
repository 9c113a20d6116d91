"""The plan as text or as a Graphviz graph: what would be made, from what, and what of it is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from prefsel.errors import UserError
from prefsel.plan.node import Node
from prefsel.plan.nodes import all_nodes, writes_dataset
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.rounds import generation_plan, last_node, round_plans
from prefsel.workspace.catalog import PATH as CATALOG
from prefsel.workspace.folders import SEAL
from prefsel.workspace.ledger import Artifact

State = Literal["there", "partly there", "to be made"]
COLOURS: dict[State, str] = {"there": "palegreen", "partly there": "khaki", "to be made": "white"}


def shown_nodes(plan: Plan) -> list[Node]:
    """Every node that a run makes, datasets of selections included, each after what it needs."""
    found: list[Node] = []
    for node in all_nodes(plan):
        found.append(node)
        if node.kind == "selection" and writes_dataset(plan, node.name):
            found.append(plan.node("dataset", node.name))
    return found


def shown_corpora(plan: Plan) -> list[tuple[Plan, list[Node]]]:
    """The corpora that models answer, in the order in which they are made, each with the nodes of its own."""
    found = [
        (one, one.node("groups", spec.model)) for spec in plan.config.generate for one in [generation_plan(plan, spec)]
    ]
    for arm in plan.config.selfplay:
        outer = plan
        for number in range(1, arm.rounds + 1):
            plans = round_plans(outer, arm, number)
            found += [(one, last_node(one)) for one in plans]
            outer = plans[-1]
    return [(one, [node for node in in_order([last]) if one.makes(node)]) for one, last in found]


def state(plan: Plan, node: Node) -> tuple[State, str]:
    """What of a node is in the workspace, and its path as far as it can be known.

    A path follows from the weights of all models that are needed, so before they are made it is only a name.
    """
    try:
        path = node.path
    except (UserError, AssertionError):
        return "to be made", f"{node.folder}/{node.name}@…"
    if node.kind != "columns":
        is_there = plan.is_complete(node) or plan.storage.exists(f"{path}/{SEAL}")
        return "there" if is_there else "to be made", path
    if not plan.storage.exists(CATALOG):
        return "to be made", path
    done = sum(len(Artifact(plan.storage, f"{path}/{source}").entries()) for source in plan.catalog.sources_of())
    return _share(done, len(plan.catalog.shards)), path


def _share(done: int, wanted: int) -> State:
    return "there" if done >= wanted else "partly there" if done else "to be made"


def text(plan: Plan) -> Iterator[str]:
    """One line per node: what it is, whether it is there, where it lies, and what it is made from."""
    nodes = shown_nodes(plan)
    width = max(len(str(node)) for node in nodes)
    for node in nodes:
        found, path = state(plan, node)
        needs = ", ".join(dict.fromkeys(str(need.node) for need in node.needs if need.node.kind != "eligible"))
        yield f"{node!s:<{width}}  {found:<12}  {path}" + (f"  ← {needs}" if needs else "")
    for one, own in shown_corpora(plan):
        yield f"{one.made.name if one.made else ''}:"
        for node in own:
            needs = ", ".join(dict.fromkeys(str(need.node) for need in node.needs))
            yield f"  {node}" + (f"  ← {needs}" if needs else "")


def dot(plan: Plan) -> Iterator[str]:
    """Lines of a Graphviz digraph: boxes are nodes, arrows go from what is needed to what is made."""
    yield "digraph prefsel {"
    yield '  rankdir=LR; node [shape=box, style=filled, fontname="sans-serif"];'
    for node in shown_nodes(plan):
        found, _ = state(plan, node)
        yield f"  {_quoted(node)} [fillcolor={COLOURS[found]}];"
        yield from _arrows(_quoted(node), {_quoted(need.node) for need in node.needs})
    for number, (one, own) in enumerate(shown_corpora(plan)):
        # Nodes of several corpora are called alike, so they are told apart by theirs.
        called = {node: _quoted(node, one.made.name if one.made else "") for node in own}
        yield f"  subgraph cluster_{number} {{"
        for node in own:
            yield f"    {called[node]};"
        yield "  }"
        for node in own:
            yield from _arrows(called[node], {called.get(need.node, _quoted(need.node)) for need in node.needs})
    yield "}"


def _quoted(node: Node, corpus: str = "") -> str:
    return '"' + f"{corpus} {node}".strip().replace('"', "'") + '"'


def _arrows(target: str, sources: Iterable[str]) -> Iterator[str]:
    yield from (f"  {source} -> {target};" for source in sorted(sources))
