"""How busy a pool kept its models, from when each shard entered and left them.

actor a   ├ read ┤██ first ██┤gap├██ … ██┤gap├██ last ██┤        efficiency: Σ model seconds ÷ Σ wall,
                              └─── steady ───┘                    both between the end of the first and the last
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """One shard's stay in an actor; seconds since the epoch, on the actor's machine."""

    actor: str
    began: float
    """When the shard was taken up."""
    entered: float
    """When it got the models, all to itself."""
    left: float
    seconds_model: float
    """Of that time inside a model's forward passes."""


def utilization(spans: Iterable[Span]) -> dict[str, float]:
    """Shares of wall time that models worked.

    Args:
        spans: Of one column set; each actor counts for itself, and one that died and came back is another.

    Returns:
        `overall`: model seconds ÷ (actors × the time from the first shard taken up to the last one left), start-up and
        the uneven end included; and where an actor had three shards or more, `steady`: of every such actor the time
        from when its first shard left the models to when its last one entered them, with the shards between, `steady_s`
        of wall time and `steady_shards`. Empty without spans.
    """
    by_actor: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.entered):
        by_actor.setdefault(span.actor, []).append(span)
    if not by_actor:
        return {}
    every = [span for stayed in by_actor.values() for span in stayed]
    wall = max(span.left for span in every) - min(span.began for span in every)
    found = {"actors": float(len(by_actor)), "wall_s": wall}
    found["overall"] = sum(span.seconds_model for span in every) / (len(by_actor) * max(wall, 1e-9))
    inner = [(stayed[-1].entered - stayed[0].left, stayed[1:-1]) for stayed in by_actor.values() if len(stayed) > 2]
    if inner:
        steady_s = sum(seconds for seconds, _ in inner)
        model_s = sum(span.seconds_model for _, stayed in inner for span in stayed)
        num_shards = sum(len(stayed) for _, stayed in inner)
        found |= {"steady": model_s / steady_s, "steady_s": steady_s, "steady_shards": float(num_shards)}
    return found


def span_of(info: Mapping[str, Any]) -> Span | None:
    """The span that a ledger entry keeps; None for a shard that no actor scored."""
    return Span(**info["span"]) if info.get("span") else None


def as_info(span: Span) -> dict[str, Any]:
    """What a ledger entry keeps of a span."""
    return asdict(span)
