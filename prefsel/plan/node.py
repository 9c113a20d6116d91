"""A node of the plan: something that is made, what it needs first, and the recipe and the place that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from prefsel.workspace.recipes import fingerprint

MadeKind = Literal["prompts", "groups", "pairs", "evaluation"]
Kind = Literal[MadeKind, "eligible", "scratch", "columns", "tangent", "scores", "selection", "dataset", "model"]
Upstream = Callable[["Node"], tuple[str, str]]
"""A needed node → the name and the text it has among the upstream of a recipe."""


@dataclass(frozen=True)
class Need:
    """A node that must be there first."""

    node: Node
    upstream: Upstream | None = None
    """How the recipe names it; None: only its content stands there, as that of a model does, or nothing of it."""


def by_fingerprint(node: Node, name: str) -> Need:
    """Named by its fingerprint, under `name`."""
    return Need(node, lambda needed: (name, needed.fingerprint))


def by_path(node: Node, name: str) -> Need:
    """Named by its path, under `name`."""
    return Need(node, lambda needed: (name, needed.path))


def by_columns(node: Node, columns: str = "") -> Need:
    """A column set, named by the columns that are read from it."""
    return Need(node, lambda needed: (needed.path, columns))


def by_part(node: Node, part: str, name: str) -> Need:
    """A part of the eligible corpus, under `name`."""
    return Need(node, lambda needed: (name, f"{part} of {needed.path}"))


@dataclass(frozen=True, eq=False)
class Node:
    """Something the pipeline makes: one artifact, or one kind of score, model or subset.

    Its recipe can be written down once all models that it needs are made, because their weights are part of it.
    """

    kind: Kind
    name: str
    spec: Any
    """The record of the configuration that asks for it."""
    needs: tuple[Need, ...]
    write_recipe: Callable[[Node], dict[str, Any]] = field(repr=False)
    folder: str
    """Where artifacts of its kind lie."""
    member: Any = None
    """Of a trained model: which of its training's (`config.TrainedModel`). Of a control: the name of its selection."""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Why it is this artifact and no other.

        Raises:
            UserError: a model that it needs is not made yet.
        """
        return self.write_recipe(self)

    @property
    def upstream(self) -> dict[str, str]:
        """The part of the recipe that names what it is made from."""
        return dict(need.upstream(need.node) for need in self.needs if need.upstream is not None)

    @cached_property
    def fingerprint(self) -> str:
        """The 16 hex digits that stand after `@` in its path; errors as `recipe`."""
        return fingerprint(self.recipe)

    @property
    def path(self) -> str:
        """Its folder in the workspace; errors as `recipe`."""
        return f"{self.folder}/{self.name}@{self.fingerprint}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"
