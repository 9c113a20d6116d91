"""Every metric by name: one line each, the name of its file."""

from __future__ import annotations

from importlib import import_module

from prefsel.metrics.statistics import Metric
from prefsel.plugins.registry import Registry

FILES = (
    "explicit_margin",
    "implicit_margin",
    "alignment_potential",
    "preference_divergence",
    "lossdiff",
    "influence",
    "dual_margin",
    "difficulty_gap",
    "selective_dpo",
    "data_map",
    "filtered_dpo",
    "ifd_margin",
    "less",
    "length_difference",
    "rejected_reward",
    "rejected_length",
    "uncertain_margin",
    "davir",
    "reliability",
    "random_control",
)
"""The files of this folder that hold a `METRIC`, in the order in which they are listed to people."""

_BUILT_IN: list[Metric] = [import_module(f"prefsel.metrics.{file}").METRIC for file in FILES]

METRICS: Registry[Metric] = Registry("metrics", {metric.name: metric for metric in _BUILT_IN})
"""Every metric by name, those of plugins included."""
