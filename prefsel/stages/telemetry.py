"""What actors count, as Ray metrics: a cluster's Prometheus sees `ray_prefsel_…` while the job runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

COUNTERS = {
    "completions": "Completions scored on packed rows",
    "trunk_tokens": "Tokens through the trunk",
    "head_rows": "Rows through the head",
    "padding_tokens": "Tokens of the trunk that belong to no completion",
    "flops_model": "Floating-point operations of the models, by formula",
    "flops_min": "The least floating-point operations that the groups need",
    "seconds_model": "Seconds in forward passes",
    "oom_halvings": "Times that memory ran out and the token budget was halved",
}
"""Counter of a `ScoredShard` → what `prefsel_<counter>_total` says."""
GAUGES = {
    "token_budget_least": "Tokens of a packed row now",  # nosec B105 # counts of tokens
    "useful_mfu": "flops_min of the last shard over what matrix products could have done in its model seconds",
    "padding_share": "Padding of the last shard over its trunk tokens",
}


def record(scorer: str, counters: Mapping[str, float], gauges: Mapping[str, float]) -> None:
    """Add a shard's counters, and set the gauges; names that are not exported are left out.

    Args:
        scorer: The label of its column set, the only tag.
        counters: Of the shard.
        gauges: Of the shard or the actor.
    """
    tags = {"scorer": scorer}
    for name in COUNTERS:
        if counters.get(name, 0) > 0:  # a Ray counter refuses to be raised by 0
            _counter(name).inc(counters[name], tags)
    for name in GAUGES:
        if name in gauges:
            _gauge(name).set(gauges[name], tags)


@cache
def _counter(name: str) -> Counter:
    return Counter(f"prefsel_{name}_total", COUNTERS[name], tag_keys=("scorer",))


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"prefsel_{name}", GAUGES[name], tag_keys=("scorer",))
