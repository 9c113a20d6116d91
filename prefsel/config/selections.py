"""Metrics and the selections that are made by them."""

from __future__ import annotations

from typing import Any, Literal

from prefsel.config.options import Name, Options


class MetricSpec(Options):
    """A pair score, stored as `score_<name>`."""

    name: Name
    metric: str
    """A metric of `prefsel.metrics.METRICS`."""
    params: dict[str, Any] = {}


class Selection(Options):
    """A subset, kept by one rule."""

    name: Name
    rule: dict[str, Any]
    """See `select/rules.py`; a leaf's `score` is `score_<metric name>`."""
    controls: list[Literal["random", "reverse"]] = []
    """Also emit `<name>-random` (same budget) and `<name>-reverse`."""
    dataset: Literal["always", "auto", "never"] = "always"
    """Whether the kept rows are written out; a training reads through the selection where they are not.

    `auto`: not where the trainings on it read it once in all; every worker of a training reads once, for all epochs.
    """

    @property
    def names(self) -> list[str]:
        """Its own name and those of its controls."""
        return [self.name, *(f"{self.name}-{control}" for control in self.controls)]
