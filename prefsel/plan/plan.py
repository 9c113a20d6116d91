"""The plan of a configuration in a workspace: its nodes, each made once and after everything that it needs.

    plan.node("model", "dpo-pd30") ─▶ its builder ─▶ asks for the nodes it needs ─▶ … ─▶ all of them, in order

Nothing is computed here and nothing is written: the same configuration always names the same artifacts, so what is
missing is one comparison with the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from prefsel.config import Config
from prefsel.errors import UserError
from prefsel.plan.made import Made
from prefsel.plan.node import Kind, Node
from prefsel.workspace.catalog import Catalog, read_catalog
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.storage import Storage


class Plan:
    """The nodes of one configuration in one workspace. Make one with `nodes.make_plan`.

    A plan whose corpus a model makes stands within another one, whose models it knows by name.
    """

    def __init__(
        self,
        config: Config,
        storage: Storage,
        builders: Mapping[Kind, Callable[[Plan, str], Node]],
        *,
        outer: Plan | None = None,
        made: Made | None = None,
        catalog_of: Callable[[Plan], Catalog] | None = None,
        pinned: Callable[[Node], Node] | None = None,
        former_shards: frozenset[str] = frozenset(),
    ) -> None:
        """Begin without any node.

        Args:
            config: Of the run.
            storage: The workspace.
            builders: How nodes of each kind are made from their name.
            outer: The plan that this one stands within: its models may be named here.
            made: How a model makes the corpus; None: it is read from files.
            catalog_of: The catalog of a corpus that is made.
            pinned: A node as it stands in the plan: itself, or with the artifact of an earlier run.
            former_shards: Keys of the shards that the corpus had in that run.
        """
        self.config, self.storage = config, storage
        self.outer, self.made = outer, made
        self._catalog_of = catalog_of
        self._pinned, self.former_shards = pinned, former_shards
        self._builders = builders
        self._nodes: dict[tuple[Kind, str], Node] = {}
        self._begun: list[tuple[Kind, str]] = []

    @property
    def root(self) -> Plan:
        """The plan of the corpus that is read from files."""
        return self if self.outer is None else self.outer.root

    @cached_property
    def catalog(self) -> Catalog:
        """The corpus: as ingested, or as a model made it.

        Raises:
            UserError: nothing was ingested yet.
        """
        return read_catalog(self.storage) if self._catalog_of is None else self._catalog_of(self)

    @cached_property
    def corpus(self) -> str:
        """The corpus fingerprint; errors as `catalog`."""
        return self.catalog.fingerprint(self.storage)

    @cached_property
    def scorers(self) -> list[Any]:
        """Every scorer; one per aspect of a reward training."""
        return [one for scorer in self.config.scorers for one in scorer.expanded(self.config)]

    def node(self, kind: Kind, name: str) -> Node:
        """The node of this kind and name.

        Raises:
            UserError: the configuration has none, names something that it does not have, or the node needs itself.
        """
        key = (kind, name)
        if self.outer is not None and self._is_of_outer(kind, name):
            return self.outer.node(kind, name)
        if key not in self._nodes:
            if key in self._begun:
                circle = [*self._begun[self._begun.index(key) :], key]
                shown = " → ".join(f"{one} {its}" for one, its in circle)
                raise UserError(f"configuration: {kind} {name} needs itself: {shown}")
            self._begun.append(key)
            try:
                node = self._builders[kind](self, name)
                self._nodes[key] = self._pinned(node) if self._pinned else node
            finally:
                self._begun.pop()
        return self._nodes[key]

    def makes(self, node: Node) -> bool:
        """Whether a node is one of this corpus, and not of one that it was made from."""
        return any(one is node for one in self._nodes.values())

    def _is_of_outer(self, kind: Kind, name: str) -> bool:
        """Whether the node belongs to a corpus that this one was made from."""
        assert self.outer is not None
        if kind == "model":
            return any(one.label == name for spec in self.outer.config.train for one in spec.trained_models)
        return kind in ("scratch", "tangent")

    def is_complete(self, node: Node) -> bool:
        """Whether an artifact, which is not a column set, is there."""
        return load_summary(self.storage, node.path) is not None


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Some nodes and all that they need, every node after what it needs."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in found:
            for need in node.needs:
                visit(need.node)
            found[node] = None

    for node in nodes:
        visit(node)
    return list(found)
