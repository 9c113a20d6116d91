"""completion columns -> pair scores: one pure file per method, larger is selected first.

statistics.py  what a metric is, and how the corpus-wide numbers it needs are found from shards
registry.py    `METRICS`: every metric by name
table.py       everything over one Arrow table, and the steps a stage repeats per shard
<metric>.py    parameters, columns, score and source of one method
"""

from prefsel.metrics.registry import METRICS
from prefsel.metrics.statistics import Metric, Need, Statistic
from prefsel.metrics.table import score_table

__all__ = ["METRICS", "Metric", "Need", "Statistic", "score_table"]
