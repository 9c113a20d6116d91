"""The report of a score, from what its shards put into their ledgers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefsel.numbers.histogram import Histogram
from prefsel.numbers.moments import Covariation, Moments, merge_covariations, merge_moments
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import merge_counts
from prefsel.workspace.manifest import StageReport


def score_report(
    entries: Sequence[Entry],
    *,
    stage: str,
    name: str,
    folder: str,
    computed: int,
    started: float,
    facts: Mapping[str, Any],
) -> StageReport:
    """The report of a score, from what its shards put into the ledger.

    Args:
        entries: of all shards, in corpus order.
        stage: `metric` or `fuse`.
        name: of the score.
        folder: where it lies.
        computed: shards this run computed.
        started: `time.monotonic()` when the work began.
        facts: `kind`, `params`, `fitted` and `length_unit`.
    """
    infos = [entry.info for entry in entries]
    rows_in = sum(entry.rows for entry in entries)
    dropped = merge_counts(info["dropped"] for info in infos)
    moments = merge_moments(Moments(**info["moments"]) for info in infos if info["moments"])
    details = {
        **facts,
        "moments": _shown(moments),
        "histogram": Histogram.merge(
            Histogram.from_text(row) for info in infos for row in info["histograms"]
        ).to_json(),
        "length_correlation": correlation(info["length"] for info in infos if info["length"]),
        "length": {"all": mean_lengths([info["length_sums"] for info in infos])},
        "strata": merge_counts(
            {
                f"{row['source']} / {row['aspect']}" if row["aspect"] else row["source"]: row["rows"]
                for row in info["histograms"]
            }
            for info in infos
        ),
    }
    return StageReport(
        stage=stage,
        name=name,
        unit="pairs",
        rows_in=rows_in,
        rows_out=rows_in - sum(dropped.values()),
        dropped=dropped,
        shards=len(entries),
        computed_shards=computed,
        seconds=time.monotonic() - started,
        artifact=folder,
        details=details,
    )


def _shown(moments: Moments) -> dict[str, float | None] | None:
    """What a report says of a score's distribution; no mean and deviation where their sums overflow."""
    if not moments.count:
        return None
    mean, std = (None, None) if moments.fault() else (moments.mean, moments.std)
    return {"mean": mean, "std": std, "min": moments.low, "max": moments.high}


def correlation(parts: Iterable[Mapping[str, Any]]) -> float | None:
    """Pearson correlation of the score with the length difference chosen − rejected; None when it has none."""
    return merge_covariations(
        Covariation(Moments(**part["x"]), Moments(**part["y"]), part["product"]) for part in parts
    ).correlation


def mean_lengths(sums: list[list[float]]) -> dict[str, float | None]:
    """Mean lengths from (count, chosen, rejected) sums."""
    count, chosen, rejected = (sum(row[i] for row in sums) for i in range(3))
    if not count:
        return {"chosen": None, "rejected": None, "difference": None}
    return {"chosen": chosen / count, "rejected": rejected / count, "difference": (chosen - rejected) / count}
