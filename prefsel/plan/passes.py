"""Nodes that are made together: models made on the spot, and log-probs that share a pass over the shards."""

from __future__ import annotations

from collections.abc import Sequence

from prefsel.plan.node import Node


def in_passes(order: Sequence[Node]) -> list[list[Node]]:
    """`order` with nodes that can be made together put beside the first of them for which everything is there as well.

    Every node still comes after what it needs; what is needed and not in `order` is there.
    """
    left, passes = list(order), []
    known = set(order)
    done: set[Node] = set()
    while left:
        together = [left.pop(0)]
        if _shares_pass(together[0]):
            alike = [node for node in left if _shares_pass(node) and node.kind == together[0].kind]
            together += [
                node for node in alike if done.issuperset(need.node for need in node.needs if need.node in known)
            ]
            left = [node for node in left if node not in together]
        passes.append(together)
        done.update(together)
    return passes


def _shares_pass(node: Node) -> bool:
    """Whether other nodes of its kind may be made in one pass with it."""
    return node.kind == "scratch" or (node.kind == "columns" and node.spec.can_share_pass)
