"""Metrics and the selections that are made by them."""

from __future__ import annotations

from typing import Any, Literal

from prefsel.config.options import Name, Options


class MetricSpec(Options):
    """A pair score, stored as `score_<name>`."""

    name: Name
    """Name of the metric, and of the score column `score_<name>` that rules read."""
    metric: str
    """Which method scores the pairs: a name from the table of metric parameters, such as `explicit_margin`."""
    params: dict[str, Any] = {}
    """The parameters of that method."""


class Selection(Options):
    """A subset, kept by one rule."""

    name: Name
    """Name of the subset: of its dataset, and what trainings give as `selection`."""
    rule: dict[str, Any]
    """What is kept: a table with a `kind` and that rule's keys. Its scores are called `score_<metric name>`."""
    controls: list[Literal["random", "reverse"]] = []
    """Subsets to emit for comparison: `random` gives `<name>-random`, as many pairs drawn at random from those the rule
    could have kept; `reverse` gives `<name>-reverse`, the rule's opposite."""
    dataset: Literal["always", "auto", "never"] = "always"
    """Whether the kept rows are written out as a dataset. `always` writes them, because the rows are what most people
    came for; `never` writes none, and trainings read the corpus through the selection; `auto` writes them unless the
    trainings on them read them once in all (every worker of a training reads once, for all epochs)."""

    @property
    def names(self) -> list[str]:
        """Its own name and those of its controls."""
        return [self.name, *(f"{self.name}-{control}" for control in self.controls)]
