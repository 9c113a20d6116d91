"""Metrics, losses, formats and scorers from other packages.

    entry point of an installed package ─┐
    `plugins: [module]` of a run         ├─▶ by name, beside the built-in ones ─▶ checked against its contract
    register_metric(…) in a notebook    ─┘                                       └▶ its source file is in the recipe

An installed package names its objects in the entry-point groups `prefsel.metrics`, `prefsel.losses`, `prefsel.formats`
and `prefsel.scorers`; nothing of it is imported before one of its names is used. A module that is listed under
`plugins` calls `register_metric` and the like when it is imported, which happens before the configuration is checked
and again in every worker.
"""

from prefsel.plugins.contracts import FormatContract, LossContract, MetricContract, ScorerContract, ScorerKind
from prefsel.plugins.registry import register_format, register_loss, register_metric, register_scorer

__all__ = [
    "FormatContract",
    "LossContract",
    "MetricContract",
    "ScorerContract",
    "ScorerKind",
    "register_format",
    "register_loss",
    "register_metric",
    "register_scorer",
]
