"""completion columns -> pair scores: one pure file per method, larger is selected first.

statistics.py  what a metric is, and how the corpus-wide numbers it needs are found from shards
moments.py     mergeable means, variances and slopes
tail.py        mergeable counts of the largest values
join.py        completion columns -> one row per pair, by identifier
table.py       everything over one Arrow table, and the steps a stage repeats per shard
<metric>.py    parameters, columns, score and source of one method; `METRICS` lists them
"""

from __future__ import annotations

from prefsel.metrics import (
    alignment_potential,
    data_map,
    difficulty_gap,
    dual_margin,
    explicit_margin,
    filtered_dpo,
    ifd_margin,
    implicit_margin,
    influence,
    less,
    lossdiff,
    preference_divergence,
    random_control,
    selective_dpo,
)
from prefsel.metrics.statistics import Metric, Need, Statistic
from prefsel.plugins.registry import Registry

METRICS: Registry[Metric] = Registry(
    "metrics",
    {
        metric.name: metric
        for metric in (
            explicit_margin.METRIC,
            implicit_margin.METRIC,
            alignment_potential.METRIC,
            preference_divergence.METRIC,
            lossdiff.METRIC,
            influence.METRIC,
            dual_margin.METRIC,
            difficulty_gap.METRIC,
            selective_dpo.METRIC,
            data_map.METRIC,
            filtered_dpo.METRIC,
            ifd_margin.METRIC,
            less.METRIC,
            random_control.METRIC,
        )
    },
)
"""Every metric by name, those of plugins included."""

from prefsel.metrics.table import score_table  # noqa: E402  (it looks names up in METRICS)

__all__ = ["METRICS", "Metric", "Need", "Statistic", "score_table"]
