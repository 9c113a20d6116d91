"""Choose the preference data worth training on: score, select exactly, train on what was kept.

    prefsel.metrics.score_table(table, metric, …)    scores of pairs, from any table
    prefsel.select.select_table(table, rule)         the rows a rule keeps, exactly
    prefsel.models.score_groups(model, …)            log-probs of completions, prompts computed once
    prefsel.models.directional_logps(model, …)       what they do along a direction of the weights
    prefsel.open(workspace)                          what a finished run left: pairs, scores, reasons
    prefsel.trl                                      TRL's DPO trainer on stored reference log-probs
    prefsel.plugins                                  metrics, losses and formats of your own
    prefsel.config, prefsel.errors                   records of a configuration, and what is raised

What is not exported here or in these modules (`__all__`) is private: it may change without notice. Plugins are written
with `prefsel.ingest.formats` and `prefsel.config.losses.Loss` besides. Modules are imported when they are asked for, so
that `import prefsel` stays light; torch and Ray come with what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prefsel.version import __version__ as __version__

if TYPE_CHECKING:
    from prefsel import config, errors, metrics, models, plugins, select, trl
    from prefsel.report.opened import PairTable, Workspace
    from prefsel.report.opened import open_workspace as open

__all__ = [
    "PairTable",
    "Workspace",
    "config",
    "errors",
    "metrics",
    "models",
    "open",
    "plugins",
    "select",
    "trl",
]

_ELSEWHERE = {"PairTable": "PairTable", "Workspace": "Workspace", "open": "open_workspace"}
"""Name → what it is called in `prefsel.report.opened`; the other names are modules."""


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module("prefsel.report.opened"), _ELSEWHERE[name])
    if name in __all__:
        return importlib.import_module(f"prefsel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
