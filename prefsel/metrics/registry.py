"""Every metric by name: one line each."""

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
from prefsel.metrics.statistics import Metric
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
